"""One shard of every layer at once: what a process writes between two commits, alone or as one of many workers.

Nothing here knows of the commit log: the files become durable at their names, and a :class:`ShardRecord` says what they
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from ...errors import StoreError
from ...sites import Location
from ..storage.lock import confirm_owner
from ..storage.open_place import place_of
from ..storage.places import Place
from .commit_log import ShardRecord
from .layout import RowBlock, StoreLayout
from .shard import ActivationShard, FileRecord, write_text

Activations = Mapping[Location, np.ndarray]  # location → uint16 [B, T, D]
# Two forward passes that differ only in how rows were batched may differ in the last bits of bfloat16 (2⁻⁸ relative),
# and a few such roundings add up over layers. More than this, relative to the row's largest value, is another model or
# another text.
_TOLERANCE = 2.0**-4


def write_shard(
    paths: Mapping[Location, str | Path],
    layouts: Mapping[Location, StoreLayout],
    shard: int,
    blocks: Iterable[tuple[RowBlock, Activations]],
    *,
    kept_rows: int = 0,
    owner: str | None = None,
) -> ShardRecord:
    """Write one whole shard of every layer durably at its final names, as a worker; the coordinator commits the record.

    Args:
        paths: location → store (folder or URL), created by the coordinator's ``StoreSetWriter.open``.
        layouts: location → layout of that store.
        shard: its number.
        blocks: the shard's rows in order.
        kept_rows: rows of this shard already committed (a short last shard being extended): the new ones are compared
            with them and the stored bits stay.
        owner: token of the run that asks for the shard (``StoreSetWriter.run``), compared with that of the lock before
            anything is begun and again immediately before each file appears at its name.

    Raises:
        StaleRunError: that run holds the stores no longer; what was written is dropped.
        StoreError: a row differs from the one that is already stored. ResourceError: the disk is full.

    """
    places = {layer: place_of(path) for layer, path in paths.items()}
    if owner is not None:
        for place in places.values():
            confirm_owner(place, owner)
    with ShardSetWriter(places, layouts, shard, kept_rows=kept_rows, owner=owner) as writer:
        for block, activations in blocks:
            writer.append(block, activations)
        return writer.commit()


class ShardSetWriter:
    """Streams the rows of one shard into every layer's files. An exception inside discards them."""

    def __init__(
        self,
        places: Mapping[Location, Place],
        layouts: Mapping[Location, StoreLayout],
        shard: int,
        *,
        kept_rows: int = 0,
        owner: str | None = None,
    ):
        self._places, self._layouts, self._shard = dict(places), layouts, shard
        self._one = next(iter(layouts.values()))
        self._kept = (
            {n: _KeptRows(p, layouts[n], shard, kept_rows) for n, p in self._places.items()} if kept_rows else {}
        )
        self._confirm = {n: partial(confirm_owner, p, owner) if owner else None for n, p in self._places.items()}
        self._text: list[RowBlock] = []
        self._pool = ThreadPoolExecutor(min(4, len(self._places)), "shard")
        self._writers: dict[Location, ActivationShard] = {}
        self._done = False
        try:
            for layer, place in self._places.items():
                self._writers[layer] = ActivationShard(place, shard, layouts[layer])
        except BaseException:
            self.discard()
            raise
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if not self._done:
            self.discard()
        self._pool.shutdown()

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self._one.shard_rows - self.rows

    def append(self, block: RowBlock, activations: Activations) -> None:
        """Write rows of every layer; they must fit into the shard.

        Raises:
            ValueError: too many rows, a layer missing, or a shape that is not ``[B, T, D]`` uint16.

        """
        if len(block) > self.room:
            raise ValueError(f"{len(block)} rows do not fit into shard {self._shard}: {self.room} rows are left in it")
        for layer, layout in self._layouts.items():
            bits = activations[layer]
            if bits.dtype != np.uint16 or bits.shape != (len(block), layout.context, layout.d_model):
                wanted = (len(block), layout.context, layout.d_model)
                raise ValueError(f"layer {layer}: got {bits.dtype} {bits.shape}, its store takes uint16 {wanted}")
        self._each(lambda layer: self._append_layer(layer, block, activations[layer]))
        self._text.append(block)
        self.rows += len(block)

    def _append_layer(self, layer: Location, block: RowBlock, bits: np.ndarray) -> None:
        if layer in self._kept:
            bits = self._kept[layer].reconcile(self.rows, block, bits)
        self._writers[layer].append(bits)

    def commit(self) -> ShardRecord:
        """Make every file of every layer durable at its name."""
        block = RowBlock.concatenate(self._text)
        files = self._each(lambda layer: self._commit_layer(layer, block))
        self._done = True
        return ShardRecord(self._shard, self._shard * self._one.shard_rows, self.rows, files)

    def _commit_layer(self, layer: Location, block: RowBlock) -> dict[str, FileRecord]:
        confirm = self._confirm[layer]
        text = write_text(self._places[layer], self._shard, self._layouts[layer], block, confirm)
        return {"activations": self._writers[layer].commit(confirm), **text}

    def discard(self) -> None:
        """Drop what was written; harmless after a commit."""
        self._done = True
        for writer in self._writers.values():
            writer.discard()

    def _each(self, work) -> dict:
        futures = {layer: self._pool.submit(work, layer) for layer in self._places}
        problems = [f.exception() for f in futures.values()]  # waits for all before any is raised
        for problem in problems:
            if problem is not None:
                raise problem
        return {layer: future.result() for layer, future in futures.items()}


class _KeptRows:
    """The committed rows of a short last shard that is being written again, longer."""

    def __init__(self, place: Place, layout: StoreLayout, shard: int, rows: int):
        from .shard_reader import ShardReader

        self._place, self._layout, self._shard, self._rows = place, layout, shard, rows
        self._reader = ShardReader(place, layout)
        self._text = self._reader.text(shard)

    def reconcile(self, start: int, block: RowBlock, bits: np.ndarray) -> np.ndarray:
        """The bits to store for rows ``start`` … of the shard: the old ones where there are, after comparing."""
        n = min(len(block), self._rows - start)
        if n <= 0:
            return bits
        for name, new in (("tokens", block.tokens_BT), ("documents", block.documents_BT), ("flags", block.flags_BT)):
            if not np.array_equal(self._text[name][start : start + n], new[:n]):
                raise self._differs(start, name)
        old = self._reader.shard_rows(self._shard, start, start + n, self._rows)
        if not np.array_equal(old, bits[:n]):
            if not _close(old, bits[:n]):
                raise self._differs(start, "activations")
            bits = np.concatenate([old, bits[n:]])
        return bits

    def _differs(self, start: int, what: str) -> StoreError:
        first = self._shard * self._layout.shard_rows + start
        return StoreError(
            f"{self._place}: the {what} extracted now differ from the stored ones at row {first} or "
            "soon after, so this is not "
            "the same model, text or machine: extract into another folder"
        )


def _close(old: np.ndarray, new: np.ndarray) -> bool:
    def real(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    a, b = real(old), real(new)
    scale = np.abs(a).max(axis=-1, keepdims=True)
    return bool((np.abs(a - b) <= _TOLERANCE * scale).all())
