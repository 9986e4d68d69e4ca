"""Stage one: from text and a language model to activation stores."""

from ..callable_package import make_callable

make_callable(__name__)  # tcsae.extract(…)
