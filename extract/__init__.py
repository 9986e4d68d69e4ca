"""Stage one: text and a language model become activation stores."""

from ..callable_package import make_callable

make_callable(__name__)  # tcsae.extract(…)
