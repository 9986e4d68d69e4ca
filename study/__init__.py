"""A study: one file from text to verdict. What it compares and how it decides is fixed before anything runs."""

from ..callable_package import make_callable

make_callable(__name__)  # tcsae.study(…)
