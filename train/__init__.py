"""Stage two: windows of a store become sparse autoencoders. Knows nothing of language models."""

from ..callable_package import make_callable

make_callable(__name__)  # tcsae.train(…)
