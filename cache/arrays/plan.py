"""From an array to rows: which positions each row of the store holds, and which rows are held out.

A sequence is never mixed with another in a row; its last row is filled up with padding. Every sequence is a document of
the store, so that neighbours are only compared, and intervals only resampled, as the order of the positions allows.

Shapes: S sequences, R rows, N positions of the array.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ...console import format_bytes, format_count
from ...errors import ArrayError, UsageError
from ...system.untrusted_files import shown
from ..format.layout import StoreLayout, plan_layout
from ..format.manifest import NO_MODEL, Execution, ModelIdentity, StoreManifest, TextIdentity
from .config import HELD_OUT, ImportConfig
from .sources import ArrayFile, open_array, open_beside, read_list

_CONTEXT, _LONGEST = 128, 1024  # positions of a row; longer rows of an array are cut unless --context says so
_BLOCK = 1 << 22  # token numbers that are looked at together


@dataclass(frozen=True)
class Rows:
    """Rows of a store: row r holds ``count_R[r]`` positions from ``start_R[r]`` on, all of one sequence."""

    start_R: np.ndarray
    count_R: np.ndarray
    sequence_R: np.ndarray

    def __len__(self) -> int:
        return len(self.start_R)

    @property
    def positions(self) -> int:
        """Positions without padding."""
        return int(self.count_R.sum())

    def only(self, chosen_R: np.ndarray) -> Rows:
        """Some of them."""
        return Rows(self.start_R[chosen_R], self.count_R[chosen_R], self.sequence_R[chosen_R])

    def stretches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Rows ``first`` … ``last`` as stretches of rows (from, to) whose positions lie in the array without a gap."""
        end_R = self.start_R[first:last] + self.count_R[first:last]
        breaks = np.flatnonzero(end_R[:-1] != self.start_R[first + 1 : last]) + 1
        edges = [first, *(first + breaks).tolist(), last]
        yield from itertools.pairwise(edges)


@dataclass
class ImportPlan:
    """What an import will do, worked out before anything is written."""

    config: ImportConfig
    vectors: ArrayFile
    tokens: ArrayFile | None
    labels: list[str | None] | None
    token_text: list[str] | None
    axes: int
    """Axes of the array that count positions: 2 of ``[row, position, d]``."""
    context: int
    train: Rows
    held_out: Rows
    sequences: int
    vocab_size: int
    fingerprint: str

    @property
    def d_model(self) -> int:
        """Width of a vector."""
        return self.vectors.shape[-1]

    def layout(self, rows: Rows) -> StoreLayout:
        """Of the store of these rows."""
        size, how = self.config.shard_bytes, self.config.compression
        return plan_layout(self.d_model, self.context, compression=how, shard_bytes=size, planned_rows=len(rows))

    def manifest(self, rows: Rows, split: str) -> StoreManifest:
        """Of the store of these rows."""
        config = self.config
        return StoreManifest(
            layer=config.layer,
            hook_name=config.at.hook_name,
            d_model=self.d_model,
            model=ModelIdentity(
                id=config.called,
                fingerprint=self.fingerprint,
                architecture=NO_MODEL,
                n_layers=config.layer + 1,
                vocab_size=self.vocab_size,
                attn_implementation=NO_MODEL,
                dtype=self.vectors.dtype,
                tokenizer_fingerprint=NO_MODEL if self.tokens is None else self.fingerprint,
            ),
            text=TextIdentity(
                dataset=config.array,
                split=split,
                text_column=config.key or "vectors",
                label_column=config.labels,
                fingerprint=self.fingerprint,
                packing="document",
                context=self.context,
                seed=config.seed,
                held_out=config.held_out,
            ),
            execution=Execution(batch_size=1, threads=1, device="cpu"),
            layout=self.layout(rows),
            planned_rows=len(rows),
        )

    @property
    def parts(self) -> list[tuple[str, str, Rows]]:
        """Store, split and rows of what is written; the second is left out where nothing is held out."""
        found = [(self.config.store, "train", self.train), (self.config.held_out_store, HELD_OUT, self.held_out)]
        return [part for part in found if len(part[2])]

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the summary: plain values for machines, words for people."""
        stores = {name: self.layout(rows).store_bytes(len(rows)) for name, _, rows in self.parts}  # before compression
        plain = {
            "sequences": self.sequences,
            "d_model": self.d_model,
            "context": self.context,
            "rows": len(self.train),
            "positions": self.train.positions,
            "held_out_rows": len(self.held_out),
            "held_out_positions": self.held_out.positions,
            "padding": (len(self.train) + len(self.held_out)) * self.context
            - self.train.positions
            - self.held_out.positions,
            "bytes": stores,
        }
        if as_json:
            return plain
        return {
            "array": f"{self.sequences:,} sequences, {format_count(self.train.positions + self.held_out.positions)} "
            f"positions × {self.d_model}, {self.vectors.dtype}",
            **{
                name: f"{len(rows):,} rows of {self.context}, {format_count(rows.positions)} positions, "
                f"{format_bytes(stores[name])}"
                for name, _, rows in self.parts
            },
        }


def make_plan(config: ImportConfig) -> ImportPlan:
    """Open the array and all that belongs to it, compare their shapes, and lay out the rows.

    Raises:
        ArrayError: the array is none of vectors, or what belongs to it does not fit it.

    """
    vectors = open_array(config.array, config.key)
    if vectors.dtype.removeprefix("b").startswith(("i", "u", "int", "uint", "ool")):
        raise ArrayError(f"{shown(config.array)} holds {vectors.dtype}: vectors are floating-point numbers, convert it")
    ragged = vectors.lengths_S is not None
    if len(vectors.shape) not in (2, 3) or 0 in vectors.shape:
        raise ArrayError(
            f"{shown(config.array)} has shape {list(vectors.shape)}: vectors are [row, position, d] or [n, d]"
        )
    axes = len(vectors.shape) - 1
    start_S, length_S = _sequences(config, vectors)
    context = config.context or (vectors.shape[1] if axes == 2 and vectors.shape[1] <= _LONGEST else _CONTEXT)
    if context < 2:
        raise ArrayError(
            f"{shown(config.array)} has rows of one position, so that nothing has a neighbour: give [n, d] with "
            "--lengths"
        )
    rows = _rows(start_S, length_S, context)
    tokens, vocab_size = _tokens(config, vectors)
    labels = _labels(config, len(length_S))
    text = None if config.token_text is None else read_list(config.token_text, config.array, "token text")
    if text is not None and len(text) < vocab_size:
        raise ArrayError(f"--token-text has {len(text)} texts, there are tokens up to {vocab_size - 1}: give all")
    out_R = _held_out(config, rows, len(length_S))
    if not len(rows) or out_R.all():
        raise UsageError(
            f"{len(length_S)} sequences in {len(rows)} rows leave none to train on with --held-out {config.held_out}: "
            "use a smaller --context, or a smaller share"
        )
    return ImportPlan(
        config,
        vectors,
        tokens,
        labels,
        None if text is None else list(map(str, text)),
        1 if ragged else axes,
        context,
        rows.only(~out_R),
        rows.only(out_R),
        len(length_S),
        vocab_size,
        _fingerprint(config, vectors, length_S, axes),
    )


def _sequences(config: ImportConfig, vectors: ArrayFile) -> tuple[np.ndarray, np.ndarray]:
    """Where each sequence begins, counted in positions of the whole array, and how long it is."""
    shape, what = vectors.shape, shown(config.array)
    given = None
    if config.lengths is not None:
        given = np.asarray(read_list(config.lengths, config.array, "lengths"))
        if given.ndim != 1 or given.dtype.kind not in "iu" or not len(given) or given.min() < 0:
            raise ArrayError("--lengths must be whole numbers from 0 up, one for each sequence")
        given = given.astype(np.int64)
    if vectors.lengths_S is not None:
        if given is not None:
            raise UsageError(f"{what} says itself how long its sequences are: leave --lengths out")
        given = vectors.lengths_S
    if len(shape) == 3:
        rows, positions = shape[:2]
        if given is None:
            given = np.full(rows, positions)
        if len(given) != rows or given.max() > positions:
            raise ArrayError(
                f"--lengths has {len(given)} numbers up to {given.max()}, {what} has {rows} rows of {positions} "
                "positions: give one for each row"
            )
        return np.arange(rows) * positions, given
    given = np.array([shape[0]]) if given is None else given
    if given.sum() != shape[0]:
        raise ArrayError(f"--lengths adds up to {given.sum()}, {what} has {shape[0]} vectors: give all sequences")
    return np.cumsum(given) - given, given


def _rows(start_S: np.ndarray, length_S: np.ndarray, context: int) -> Rows:
    rows_S = -(-length_S // context)
    sequence_R = np.repeat(np.arange(len(length_S)), rows_S)
    nth_R = np.arange(len(sequence_R)) - np.repeat(np.cumsum(rows_S) - rows_S, rows_S)
    begin_R = nth_R * context
    return Rows(start_S[sequence_R] + begin_R, np.minimum(context, length_S[sequence_R] - begin_R), sequence_R)


def _held_out(config: ImportConfig, rows: Rows, sequences: int) -> np.ndarray:
    """Which rows are held out: those of some sequences; of a single sequence the last ones."""
    if not config.held_out or not len(rows):
        return np.zeros(len(rows), dtype=bool)
    if sequences == 1:
        last = max(1, round(config.held_out * len(rows)))
        return np.arange(len(rows)) >= len(rows) - last
    count = max(1, round(config.held_out * sequences))
    chosen = np.random.default_rng(config.seed).permutation(sequences)[:count]
    return np.isin(rows.sequence_R, chosen)


def _tokens(config: ImportConfig, vectors: ArrayFile) -> tuple[ArrayFile | None, int]:
    """The array of tokens, and how many different numbers they may have."""
    if config.tokens is None:
        return None, 1
    tokens = open_array(*open_beside(config.tokens, config.array), what="tokens")
    if tokens.shape != vectors.shape[:-1]:
        raise ArrayError(
            f"--tokens has shape {list(tokens.shape)}, {shown(config.array)} has vectors for "
            f"{list(vectors.shape[:-1])}: give one token for each vector"
        )
    largest = 0
    each = max(1, int(np.prod(tokens.shape[1:], dtype=np.int64)))
    for start in range(0, tokens.shape[0], max(1, _BLOCK // each)):
        part = tokens.read(start, min(tokens.shape[0], start + max(1, _BLOCK // each)))
        if part.is_floating_point() or int(part.min()) < 0 or int(part.max()) >= 1 << 31:
            raise ArrayError("--tokens must be whole numbers from 0 to 2³¹ − 1: convert them")
        largest = max(largest, int(part.max()))
    return tokens, largest + 1


def _labels(config: ImportConfig, sequences: int) -> list[str | None] | None:
    if config.labels is None:
        return None
    found = read_list(config.labels, config.array, "labels")
    if len(found) != sequences:
        raise ArrayError(f"--labels has {len(found)} entries for {sequences} sequences: give one for each")
    return [None if label is None else str(label) for label in found]


def _fingerprint(config: ImportConfig, vectors: ArrayFile, length_S: np.ndarray, axes: int) -> str:
    """Of shape, type, sequences, the file's size and its first vectors; the whole of it is hashed as it is written."""
    place = Path(config.array)
    size = sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) if place.is_dir() else place.stat().st_size
    digest = xxhash.xxh3_128(repr((vectors.shape, vectors.dtype, size)).encode())
    digest.update(np.ascontiguousarray(length_S).tobytes())
    digest.update(repr(vectors.flat(0, min(16, int(length_S.max())), axes).double().tolist()).encode())
    return digest.hexdigest()
