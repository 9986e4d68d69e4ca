"""Documents: how they are numbered, ordered, read and held out.

A *document* is one ``.txt`` file, or one row of a table or dataset. Documents are numbered in reading order, which the
seed decides. A share of them, chosen by a hash of the text alone, is held out for evaluation and never extracted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import xxhash

from ...errors import TextError
from ..config import TextSource
from .chat import COLUMNS, Conversation, conversation_of

_HELD_OUT_SEED = 0x7C5AE  # never change it: the held-out documents of existing stores depend on it
LARGE = 1_000_000  # characters; a longer document is read, hashed and tokenised piece by piece
_PIECE = 262_144  # characters read at a time

Content: TypeAlias = "str | LargeText | np.ndarray | Conversation"
"""A document as it is read: its text, token ids that others made, or messages."""


@dataclass(frozen=True)
class LargeText:
    """A document that is not held in memory. ``pieces`` reads it from its beginning, piece by piece."""

    name: str
    pieces: Callable[[], Iterator[str]]

    @classmethod
    def of(cls, text: str, name: str) -> LargeText:
        """A text that is in memory, in pieces."""
        return cls(name, lambda: (text[at : at + _PIECE] for at in range(0, len(text), _PIECE)))

    @cached_property
    def _read_once(self) -> tuple[int, dict[int, int]]:
        hashes = {seed: xxhash.xxh3_64(seed=seed) for seed in (0, _HELD_OUT_SEED)}
        characters = 0
        for piece in self.pieces():
            characters += len(piece)
            for digest in hashes.values():
                digest.update(piece.encode("utf-8", "surrogatepass"))
        return characters, {seed: digest.intdigest() for seed, digest in hashes.items()}

    @property
    def n_characters(self) -> int:
        """Length of the text; the first time, it is read for it."""
        return self._read_once[0]

    def hash(self, seed: int) -> int:
        """See :func:`text_hash`; the first time, the text is read for it."""
        return self._read_once[1][seed]


def file_pieces(file: Any) -> Iterator[str]:
    """The pieces of an open text file, which is closed at the end."""
    with file:
        while piece := file.read(_PIECE):
            yield piece


class Documents(Protocol):
    """Text that can be read from any document onwards, always in the same order."""

    @property
    def fingerprint(self) -> str:
        """Identifies the whole text."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit of a hub dataset; None for local text."""
        ...

    def read(self, start: int) -> Iterator[tuple[int, Content]]:
        """(number, text) of every document from number ``start`` on."""
        ...

    def label(self, number: int) -> str | None:
        """The label of a document that was read; None where it has none."""
        ...


def is_held_out(text: Content, share: float) -> bool:
    """Whether a document belongs to the held-out ``share``.

    Only a hash of its text decides, so the answer does not change when documents are added.
    """
    return text_hash(text, _HELD_OUT_SEED) < share * 2.0**64


def text_hash(text: Content, seed: int = 0) -> int:
    """XXH3-64 of the text's UTF-8 bytes, or of token ids as little-endian int64."""
    if isinstance(text, LargeText):
        return text.hash(seed)
    if isinstance(text, Conversation):
        text = text.key
    if isinstance(text, np.ndarray):
        return xxhash.xxh3_64_intdigest(text.astype("<i8").tobytes(), seed)
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed)


def shuffled(n: int, seed: int) -> np.ndarray:
    """A permutation of ``n`` documents that depends only on ``n`` and ``seed``, not on the version of any library.

    Each document gets a pseudo-random number (the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014), and
    documents are sorted by it.
    """
    with np.errstate(over="ignore"):
        z = (np.arange(n, dtype=np.uint64) + np.uint64(text_hash(str(seed)))) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable")


def text_of(example: Mapping[str, Any], column: str, name: str) -> str | np.ndarray:
    """The text of one row, or its token ids if the column holds whole numbers; an empty value is an empty document.

    Raises:
        TextError: there is no such column, or it holds neither text nor token ids.

    """
    if column not in example:
        raise TextError(
            f"{name} has no column '{column}': its columns are {', '.join(example)}; name one with --text-column"
        )
    text = example[column]
    if text is None:
        return ""
    if isinstance(text, str):
        return text
    if isinstance(text, list | np.ndarray):
        ids = np.asarray(text) if len(text) else np.empty(0, np.int64)
        if ids.ndim == 1 and ids.dtype.kind in "iu":
            return ids.astype(np.int64)
    kind = type(text).__name__
    if isinstance(text, list) and text:
        kind = f"lists of {type(text[0]).__name__}"
    if kind == "lists of dict":
        raise TextError(f"column '{column}' of {name} holds messages: put them into words with --chat-template")
    raise TextError(f"column '{column}' of {name} holds {kind}, not text or token ids: name another with --text-column")


def content_of(example: Mapping[str, Any], column: str, name: str, *, chat: bool) -> Content:
    """As :func:`text_of`; with ``chat`` the messages of the row."""
    if not chat:
        return text_of(example, column, name)
    if column not in example:
        raise TextError(
            f"{name} has no column '{column}': its columns are {', '.join(example)}; name the one with the messages "
            "with --text-column"
        )
    return conversation_of(example[column], f"column '{column}' of {name}")


def column_of(source: TextSource, columns: Sequence[str]) -> str:
    """The column that is read: the one asked for; of conversations the usual one if that is not there."""
    usual = [name for name in COLUMNS if source.chat_template and name in columns]
    return source.text_column if source.text_column in columns or not usual else usual[0]


def names_of(table: Any, column: str | None) -> list[str]:
    """The names of a column's labels, where the table has them (a ``ClassLabel``)."""
    features = getattr(table, "features", None) or {}
    return list(getattr(features.get(column), "names", None) or [])


def label_of(example: Mapping[str, Any], column: str | None, name: str, names: Sequence[str] = ()) -> str | None:
    """The label of one row: text or a whole number, None where it is empty or there is no column of labels.

    ``names``: what the numbers mean.

    Raises:
        TextError: there is no such column, or it holds something else.

    """
    if column is None:
        return None
    if column not in example:
        raise TextError(
            f"{name} has no column '{column}': its columns are {', '.join(example)}; name one with --label-column"
        )
    label = example[column]
    if label is not None and not isinstance(label, str | int):
        raise TextError(
            f"column '{column}' of {name} holds {type(label).__name__}, no labels: name another with --label-column"
        )
    if names and isinstance(label, int):
        return names[label] if 0 <= label < len(names) else None  # −1 stands for an unknown label
    return None if label in (None, "") else str(label)
