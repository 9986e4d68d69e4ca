"""Stage three: SAEs and their language model become a report."""

from ..callable_package import make_callable

make_callable(__name__)  # tcsae.evaluate(…)
