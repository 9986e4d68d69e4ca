"""Writing the stores of several locations together: a shard is committed in all of them or in none.

A location is a layer and a hook point. For every shard the data are written first, then the line of the commit log,
then the array shapes that Zarr readers see. The caller's thread only queues work; one background thread writes.

If the process is killed at any moment, the stores hold exactly the shards that every log lists. The next
:meth:`StoreSetWriter.open` drops a half-written line, a line that some stores lack, ``.partial`` files and uncommitted
shards; those rows are then written again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import StoreError
from ..sites import Location
from .background import BackgroundWorker
from .format.commit_log import LOG, Commit, ShardRecord, execution_of, rows_in
from .format.layout import RowBlock, StoreLayout
from .format.log_index import IndexedLog
from .format.manifest import Execution, StoreManifest, group_document
from .format.shard_writer import ShardSetWriter
from .format.zarr_documents import ARRAYS, array_document, to_json
from .resume import check_space, lock_all, open_or_create, recover, remove_partial
from .storage.lock import Lock
from .storage.open_place import place_of
from .storage.places import Place

_QUEUE_BYTES = 512_000_000  # append() waits while more than this is queued


class StoreSetWriter:
    """Writes the stores of several locations row by row; create it with :meth:`open`. A context manager.

    Leaving the context writes what is queued; after an exception the uncommitted shard is discarded instead. In both
    cases the commits stay and the locks are released. On resume, use ``layout`` (the layout of the existing store)
    instead of the layout you planned.
    """

    def __init__(
        self,
        places: dict[Location, Place],
        manifests: dict[Location, StoreManifest],
        locks: list[Lock],
        planned_rows: int,
    ):
        self._places, self._manifests, self._locks = places, manifests, locks
        self._first = min(manifests)
        self._logs = recover(places, self._layouts)
        self._planned = max(planned_rows, self.rows_stored)
        self._shard: ShardSetWriter | None = None
        self._began = False
        self._settled = _settled(self._log, self._planned, self.layout.shard_rows)
        self._queued_rows = self._shard_start = self.rows_committed
        self._tail_queued = False
        self._bytes = 0
        self.execution = (
            execution_of(self._log[-1], manifests[self._first]) if self._log else manifests[self._first].execution
        )
        check_space(places, self._layouts, self._planned, self.rows_committed)
        self._worker = BackgroundWorker("store-writer", _QUEUE_BYTES)

    @classmethod
    def open(
        cls, paths: Mapping[Location, str | Path], manifests: Mapping[Location, StoreManifest], *, fresh: bool = False
    ) -> StoreSetWriter:
        """Create the stores, or continue them after the last common commit.

        A finished store is extended if its manifest now plans more rows. If its last shard is short, ``rows_committed``
        is the first row of that shard: extract that shard again completely; its stored rows are compared and kept.

        Args:
            paths: location → folder or fsspec URL.
            manifests: location → what the store shall hold. The identity must agree with that of an existing store; a
                larger ``planned_rows`` replaces the old plan.
            fresh: delete existing stores and start again.

        Raises:
            StoreError: the identity differs (the field is named), another process writes the store, the store is
                damaged, or permission is missing.
            ResourceError: the plan does not fit on the disk; the message gives the bytes.

        """
        places = {layer: place_of(path) for layer, path in paths.items()}
        locks = lock_all(places, fresh=fresh)
        try:
            found = {layer: open_or_create(places[layer], manifests[layer], fresh=fresh) for layer in places}
            return cls(places, found, locks, max(m.planned_rows for m in manifests.values()))
        except BaseException:
            for lock in locks:
                lock.release()
            raise

    # --- state

    @property
    def _log(self) -> IndexedLog:
        return self._logs[self._first]

    @property
    def _layouts(self) -> dict[Location, StoreLayout]:
        return {layer: manifest.layout for layer, manifest in self._manifests.items()}

    @property
    def layout(self) -> StoreLayout:
        """The layout in use (that of the first location; all stores have the same rows per chunk and shard)."""
        return self._manifests[self._first].layout

    @property
    def run(self) -> str:
        """The token of this run; ``write_shard`` compares it with the token in the lock."""
        return self._locks[0].owner

    @property
    def manifests(self) -> Mapping[Location, StoreManifest]:
        """The manifests as stored."""
        return self._manifests

    @property
    def rows_stored(self) -> int:
        """Rows in the stores now, including those of a short last shard."""
        return rows_in(self._log)

    @property
    def rows_committed(self) -> int:
        """The row at which appending continues. A short last shard that will be extended does not count."""
        return 0 if self._settled is None else self._settled.stop_row

    @property
    def next_shard(self) -> int:
        """The shard that begins at row :attr:`rows_committed`."""
        return 0 if self._settled is None else self._settled.shard + 1

    @property
    def kept_rows(self) -> int:
        """Number of rows of :attr:`next_shard` that are already stored; they will be compared and kept."""
        return self.rows_stored - self.rows_committed

    @property
    def cursor(self) -> dict[str, Any] | None:
        """The text position saved with the commit that ends at :attr:`rows_committed`; None at the start."""
        return None if self._settled is None else self._settled.cursor

    @property
    def last_cursor(self) -> dict[str, Any] | None:
        """The text position saved with the last commit, at :attr:`rows_stored`."""
        return self._log[-1].cursor if self._log else None

    @property
    def seconds_blocked(self) -> float:
        """Seconds for which :meth:`append` waited for the disk."""
        return self._worker.seconds_blocked

    @property
    def bytes_written(self) -> int:
        """Bytes of the files committed by this writer."""
        return self._bytes

    # --- writing

    def begin(self) -> None:
        """Mark the stores as unfinished and record the plan.

        :meth:`append` calls it; otherwise call it before workers write shards.
        """
        if self._began:
            return
        self._began = True
        for layer, place in self._places.items():
            wanted = self._manifests[layer].model_copy(update={"planned_rows": self._planned, "finished": False})
            self._set_manifest(layer, place, wanted)

    def append(self, block: RowBlock, activations: Mapping[Location, np.ndarray]) -> None:
        """Queue rows of the current shard; waits only if too much is queued already.

        The arrays must not be changed afterwards. ``activations``: location → uint16 bits ``[B, T, D]``.

        Raises:
            ValueError: the rows extend beyond the end of the shard, a layer is missing, or a shape is wrong.
            StoreError, ResourceError: an earlier row could not be written.

        """
        if self._tail_queued:
            raise ValueError("a short shard was committed: it is the last of this plan, no rows can follow it")
        room = self._shard_start + self.layout.shard_rows - self._queued_rows
        if len(block) > room:
            raise ValueError(
                f"{len(block)} rows do not fit into the shard, which has room for {room}: cut the block there"
            )
        self.begin()
        self._queued_rows += len(block)
        self._worker.put(lambda: self._write(block, activations), sum(a.nbytes for a in activations.values()))

    def commit(self, cursor: dict[str, Any]) -> None:
        """Queue the commit of the current shard. Only the last shard of the plan may be short.

        Args:
            cursor: the text position after these rows, as JSON; :attr:`cursor` returns it on resume.

        """
        self._tail_queued = self._queued_rows % self.layout.shard_rows != 0
        self._shard_start = self._queued_rows
        self._worker.put(lambda: self._commit(cursor), 0)

    def commit_records(self, records: Sequence[ShardRecord], cursor: dict[str, Any] | None) -> None:
        """Commit shards that workers have written with :func:`write_shard`, in row order; returns when it is done.

        ``cursor`` is saved with the last of them.

        Raises:
            StoreError: a record is not the next shard, or the lock was lost.

        """
        self.begin()
        self.drain()
        for record in records:
            if (record.shard, record.first_row) != (self.next_shard, self.rows_committed):
                raise StoreError(
                    f"shard {record.shard} cannot be committed: the stores go on with shard {self.next_shard}"
                )
            self._record(record, cursor if record is records[-1] else None)
        self._queued_rows = self._shard_start = self.rows_committed

    def restart_shard(self, execution: Execution | None = None) -> None:
        """Discard the rows since the last commit and start the shard again.

        Used to try again with a smaller batch. ``execution`` is recorded with the shard. Set the text back to
        :attr:`cursor` as well.
        """
        self._worker.put(self._discard, 0)
        self.drain()
        self._queued_rows = self._shard_start = self.rows_committed
        self._tail_queued = False
        self.execution = execution or self.execution

    def drain(self) -> None:
        """Wait until everything queued is on disk; raises the failure of the background thread, if any."""
        self._worker.drain()

    def finish(self) -> None:
        """Mark the stores as finished with the rows they hold.

        Raises:
            ValueError: rows were appended since the last commit.

        """
        self.drain()
        if self._shard is not None:
            raise ValueError("rows were appended since the last commit: commit() before finish()")
        for layer, place in self._places.items():
            for name in ARRAYS:
                remove_partial(place, name)  # left by workers that died; their shards were written again by others
            done = self._manifests[layer].model_copy(update={"planned_rows": self.rows_stored, "finished": True})
            self._set_manifest(layer, place, done)

    # --- run by the background thread

    def _write(self, block: RowBlock, activations: Mapping[Location, np.ndarray]) -> None:
        if self._shard is None:
            begin = self.rows_committed
            check_space(self._places, self._layouts, min(self._planned, begin + self.layout.shard_rows), begin)
            begun = (self._places, self._layouts, self.next_shard)
            self._shard = ShardSetWriter(*begun, kept_rows=self.kept_rows, owner=self.run)
        self._shard.append(block, activations)

    def _commit(self, cursor: dict[str, Any]) -> None:
        if self._shard is None:
            raise ValueError("nothing was appended since the last commit")
        with self._shard as shard:
            record = shard.commit()
        self._shard = None
        self._record(record, cursor)

    def _discard(self) -> None:
        if self._shard is not None:
            self._shard.__exit__(None)
            self._shard = None

    def _record(self, record: ShardRecord, cursor: dict[str, Any] | None) -> None:
        for lock in self._locks:
            lock.confirm()
        changed = self.execution != self._manifests[self._first].execution
        execution = self.execution.model_dump() if changed else None
        for layer, place in self._places.items():
            commit = record.for_layer(layer, cursor, execution)
            place.append(LOG, commit.to_line())
            self._logs[layer].append(commit)
            self._bytes += sum(file.bytes for file in commit.files.values())
        self._settled = _settled(self._log, self._planned, self.layout.shard_rows)
        for layer, place in self._places.items():
            for name in ARRAYS:
                document = array_document(name, self._manifests[layer].layout, self.rows_stored)
                place.replace(f"{name}/zarr.json", to_json(document))

    def _set_manifest(self, layer: Location, place: Place, manifest: StoreManifest) -> None:
        if manifest != self._manifests[layer]:
            place.replace("zarr.json", to_json(group_document(manifest)))
            self._manifests[layer] = manifest

    # --- context manager

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with nullcontext() if kind is None else suppress(Exception):  # what stopped us is what is raised
                self.drain()  # what was committed before a failure is kept, not computed again
        finally:
            self._worker.close()
            self._discard()
            for lock in self._locks:
                lock.release()


def _settled(log: Sequence[Commit], planned: int, shard_rows: int) -> Commit | None:
    """The last log line that remains valid: the last one, or the one before a short last shard that the plan will
    extend.
    """
    last = log[-1] if log else None
    if last is None or last.rows == shard_rows or last.stop_row >= planned:
        return last
    at = len(log) - 1
    while at >= 0 and log[at].shard == last.shard:
        at -= 1
    return log[at] if at >= 0 else None
