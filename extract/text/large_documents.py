"""The tokens of a large document, with bounded memory: it is tokenised in overlapping pieces.

Two neighbouring pieces are joined in the middle of a long run of tokens on which both agree, ids and places alike. What
lies left of the join was tokenised with the true text before it, what lies right of it with the true text after it.
Where the pieces agree nowhere the overlap is doubled, and in the end a sentence is raised: never are there other tokens
than those of the whole text. docs/METHOD.md ("Large documents") says why the rule is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...errors import TextError
from .documents import LargeText

PIECE = 262_144  # characters that are tokenised at a time: a tokenizer needs some 250 bytes for each
OVERLAP = 4096  # characters that two pieces share at first; at most half a piece
AGREE = 64  # tokens in a row on which both must agree
_WHOLE = 20_000_000  # characters that a tokenizer without places of its tokens gets at once


class Tokens(NamedTuple):
    """Token ids, and where in the whole text each begins and ends, in characters."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def between(self, first: int, last: int | None = None) -> Tokens:
        """The tokens with these numbers."""
        return Tokens(*(part[first:last] for part in self))


Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


def tokenize_large(text: LargeText, tokenizer: Any, encode: Callable[..., Any]) -> Iterator[np.ndarray]:
    """The token ids of the whole text, in order, as arrays of moderate size.

    ``encode`` is the tokenizer with the options that every document is tokenised with.

    Raises:
        TextError: the pieces agree nowhere, or the tokenizer does not say where its tokens lie and the text is too
            large to be tokenised at once.

    """
    if getattr(tokenizer, "is_fast", False):

        def both(piece: str) -> tuple[list[int], list[tuple[int, int]]]:
            encoded = encode(piece, return_offsets_mapping=True)
            return encoded["input_ids"], encoded["offset_mapping"]

        # WordPiece has one token for a whole word that is too long: what is shared must show how long a word is.
        longest_word = getattr(tokenizer.backend_tokenizer.model, "max_input_chars_per_word", 0)
        yield from in_pieces(text, both, overlap=max(OVERLAP, 8 * longest_word))
        return
    if text.n_characters > _WHOLE:
        raise TextError(
            f"{text.name} is one document of {text.n_characters:,} characters, and this model's tokenizer, which is "
            f"written in Python, takes at most {_WHOLE:,} at once: split it into several documents"
        )
    yield np.asarray(encode("".join(text.pieces()))["input_ids"], dtype=np.int32)


def in_pieces(
    text: LargeText, encode: Encode, *, piece: int = PIECE, overlap: int = OVERLAP, agree: int = AGREE
) -> Iterator[np.ndarray]:
    """The token ids of the whole text; the top of this file says how."""
    reader = _Reader(text.pieces())
    end = reader.read_to(piece)
    left = _encoded(reader, 0, end, encode)
    while reader.read_to(end + 1) > end:
        shared = overlap
        while True:
            begin = max(end - shared, reader.begin)
            stop = reader.read_to(begin + piece)
            right = _encoded(reader, begin, stop, encode)
            if (join := _join(left, right, begin, end, agree, reader)) is not None:
                break
            if begin == reader.begin or 2 * shared > piece // 2:
                raise TextError(
                    f"{text.name} is too large to be tokenised at once and cannot be cut near character {end:,}: "
                    f"{shared:,} characters have no ordinary text (they may all be digits, or one word, or blank); "
                    "break them into lines, or split the file into several"
                )
            shared *= 2
        yield left.ids[: join[0]]
        left, end = right.between(join[1]), stop
        reader.forget(begin)
    yield left.ids


def _encoded(reader: _Reader, begin: int, end: int, encode: Encode) -> Tokens:
    ids, offsets = encode(reader.text(begin, end))
    offsets_N2 = np.asarray(offsets, dtype=np.int64).reshape(-1, 2) + begin
    return Tokens(np.asarray(ids, dtype=np.int32), offsets_N2[:, 0], offsets_N2[:, 1])


def _join(left: Tokens, right: Tokens, begin: int, end: int, agree: int, reader: _Reader) -> tuple[int, int] | None:
    """How many tokens of ``left`` come before which number of ``right``; None if they do not agree long enough."""
    first = int(np.searchsorted(left.starts, begin))
    ours, theirs = left.between(first), right.between(0, int(np.searchsorted(right.starts, end)))
    best: tuple[int, int, int] = (0, 0, 0)  # length of the run, its first token in ours, the shift to theirs
    for shift in _shifts(ours, theirs):
        low, high = max(0, -shift), min(len(ours.ids), len(theirs.ids) - shift)
        a, b = ours.between(low, high), theirs.between(low + shift, high + shift)
        same = (a.ids == b.ids) & (a.starts == b.starts) & (a.ends == b.ends)
        length, at = _longest_run(same)
        best = max(best, (length, low + at, shift))
    length, at, shift = best
    if length < agree:
        return None
    middle = at + length // 2
    # Numbers may be grouped from their end, which neither piece may have seen: digits alone prove nothing.
    for low, high in ((at, middle), (middle, at + length)):
        if reader.text(int(ours.starts[low]), int(ours.ends[high - 1])).strip().isnumeric():
            return None
    return first + middle, middle + shift


def _shifts(ours: Tokens, theirs: Tokens) -> list[int]:
    """By how much the numbers of tokens that begin at the same place differ; the most frequent differences."""
    if not len(ours.ids) or not len(theirs.ids):
        return []
    at = np.searchsorted(theirs.starts, ours.starts).clip(max=len(theirs.ids) - 1)
    together = (theirs.starts[at] == ours.starts) & np.append(True, ours.starts[1:] != ours.starts[:-1])
    shifts, counts = np.unique((at - np.arange(len(at)))[together], return_counts=True)
    return shifts[np.argsort(-counts, kind="stable")[:8]].tolist()


def _longest_run(same: np.ndarray) -> tuple[int, int]:
    """Length and beginning of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    if not len(edges):
        return 0, 0
    begins, lengths = edges[::2], edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(lengths[longest]), int(begins[longest])


@dataclass
class _Reader:
    """The part of a text that is still needed. Places are characters of the whole text."""

    pieces: Iterator[str]
    begin: int = 0
    _held: str = ""

    def read_to(self, end: int) -> int:
        """Read on until character ``end``; returns the end of what is there up to it, smaller if the text ends."""
        new = []
        have = self.begin + len(self._held)
        while have < end and (piece := next(self.pieces, None)) is not None:
            new.append(piece)
            have += len(piece)
        if new:
            self._held = "".join([self._held, *new])
        return min(end, have)

    def text(self, begin: int, end: int) -> str:
        return self._held[begin - self.begin : end - self.begin]

    def forget(self, before: int) -> None:
        self._held, self.begin = self._held[before - self.begin :], before
