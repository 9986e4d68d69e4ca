"""Writing one shard of every layer at once, in a single process or in one of many workers.

The files become durable under their final names, and a :class:`ShardRecord` describes them. This module does not write
the commit log.
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
# Forward passes with different batch sizes may differ in the last bits of bfloat16 (2⁻⁸ relative), and such roundings
# add up over layers. A larger difference than this, relative to the token's largest value, means another model or text.
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
    """Write one whole shard of every layer durably under its final names, as a worker.

    The coordinator then commits the returned record.

    Args:
        paths: location → store (folder or URL), created by the coordinator's ``StoreSetWriter.open``.
        layouts: location → layout of that store.
        shard: its number.
        blocks: the shard's rows in order.
        kept_rows: number of rows of this shard that are already committed (if a short last shard is extended). The new
            rows are compared with them, and the stored bits are kept.
        owner: token of the run that asks for the shard (``StoreSetWriter.run``). It is compared with the token in the
            lock at the start and again immediately before each file gets its final name.

    Raises:
        StaleRunError: that run no longer holds the lock; what was written is dropped.
        StoreError: a row differs from the stored one.
        ResourceError: the disk is full.

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
    """Writes the rows of one shard into the files of every layer. An exception inside the context discards them."""

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
        self._any_layout = next(iter(layouts.values()))
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
        """Number of rows that still fit."""
        return self._any_layout.shard_rows - self.rows

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
        """Make the files of all layers durable under their final names."""
        block = RowBlock.concatenate(self._text)
        files = self._each(lambda layer: self._commit_layer(layer, block))
        self._done = True
        return ShardRecord(self._shard, self._shard * self._any_layout.shard_rows, self.rows, files)

    def _commit_layer(self, layer: Location, block: RowBlock) -> dict[str, FileRecord]:
        confirm = self._confirm[layer]
        text = write_text(self._places[layer], self._shard, self._layouts[layer], block, confirm)
        return {"activations": self._writers[layer].commit(confirm), **text}

    def discard(self) -> None:
        """Drop what was written; does nothing after a commit."""
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
    """The committed rows of a short last shard that is being replaced by a longer one."""

    def __init__(self, place: Place, layout: StoreLayout, shard: int, rows: int):
        from .shard_reader import ShardReader

        self._place, self._layout, self._shard, self._rows = place, layout, shard, rows
        self._reader = ShardReader(place, layout)
        self._text = self._reader.text(shard)

    def reconcile(self, start: int, block: RowBlock, bits: np.ndarray) -> np.ndarray:
        """Compare new rows, from row ``start`` of the shard on, with the stored ones, and return the bits to store.

        Stored bits are kept where they exist.
        """
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
            f"{self._place}: the {what} extracted now differ from the stored ones at row {first} or soon after, so "
            "this is not the same model, text or machine: extract into another folder"
        )


def _close(old: np.ndarray, new: np.ndarray) -> bool:
    def real(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    a, b = real(old), real(new)
    scale = np.abs(a).max(axis=-1, keepdims=True)
    return bool((np.abs(a - b) <= _TOLERANCE * scale).all())
