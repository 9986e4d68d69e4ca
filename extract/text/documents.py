"""What a document is: a number in reading order and a text; how documents are held out, ordered and read.

A *document* is one ``.txt`` file, or one row of anything else. Documents are numbered in reading order, which the seed
decides; a share of them, chosen by a hash of the text alone, is held out for evaluation and never extracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import xxhash

from ...errors import TextError

_HELD_OUT_SEED = 0x7C5AE  # never change it: stores rely on the same documents being held out


class Documents(Protocol):
    """Text that can be read from any document on, always in the same order."""

    @property
    def fingerprint(self) -> str:
        """What identifies all of the text."""
        ...

    @property
    def revision(self) -> str | None:
        """The hub's commit; None for local text."""
        ...

    def read(self, start: int) -> Iterator[tuple[int, str]]:
        """(number, text) of every document from number ``start`` on."""
        ...


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out ``share``: a hash of its text alone decides, so growth changes
    nothing.
    """
    return text_hash(text, _HELD_OUT_SEED) < share * 2.0**64


def text_hash(text: str, seed: int = 0) -> int:
    """XXH3-64 of the text's UTF-8 bytes."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed)


def shuffled(n: int, seed: int) -> np.ndarray:
    """A permutation of ``n`` documents that depends on nothing but the two numbers, in any version of anything.

    Documents are sorted by a mixed number each (the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        z = (np.arange(n, dtype=np.uint64) + np.uint64(text_hash(str(seed)))) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable")


def text_of(example: Mapping[str, Any], column: str, name: str) -> str:
    """The text of one row; an empty value is an empty document.

    Raises:
        TextError: no such column, or it holds no text.

    """
    if column not in example:
        raise TextError(
            f"{name} has no column '{column}': its columns are {', '.join(example)}; name one with --text-column"
        )
    text = example[column]
    if text is not None and not isinstance(text, str):
        raise TextError(
            f"column '{column}' of {name} holds {type(text).__name__}, not text: name another with --text-column"
        )
    return text or ""
