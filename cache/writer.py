"""The writer of a set of stores, one per layer, that commit together: data first, then the record, then the visible
shape.

The caller's thread only queues; one background thread writes. Whatever kills the process, the stores hold exactly the
shards whose record is in every log: a torn line, a line that some layers lack, a ``.partial`` file and a shard without
a record are dropped by the next :meth:`StoreSetWriter.open`, and those rows are written again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import StoreError
from ..sites import Location
from .background import BackgroundWorker
from .format.commit_log import LOG, Commit, ShardRecord, execution_of, latest, rows_in
from .format.layout import RowBlock, StoreLayout
from .format.manifest import Execution, StoreManifest, group_document
from .format.shard_writer import ShardSetWriter
from .format.zarr_documents import ARRAYS, array_document, to_json
from .resume import check_space, lock_all, open_or_create, recover, remove_partial
from .storage.lock import Lock
from .storage.open_place import place_of
from .storage.places import Place

_QUEUE_BYTES = 512_000_000  # activations waiting to be written before append() blocks


class StoreSetWriter:
    """Writes the stores of several layers row by row; see :meth:`open`. A context manager.

    Leaving it without an exception drains what was queued; with one, the shard in the making is discarded. Either way
    the commits stay and the locks are released. ``layout`` is the stored one on resume: use it, not the one you
    planned.
    """

    def __init__(
        self,
        places: dict[Location, Place],
        manifests: dict[Location, StoreManifest],
        locks: list[Lock],
        planned_rows: int,
    ):
        self._places, self._manifests, self._locks = places, manifests, locks
        self._one = min(manifests)
        self._logs = recover(places, self._layouts)
        self._planned = max(planned_rows, self.rows_stored)
        self._shard: ShardSetWriter | None = None
        self._began = False
        self._settled = _settled(self._log, self._planned, self.layout.shard_rows)
        self._queued_rows = self._shard_start = self.rows_committed
        self._tail_queued = False
        self._bytes = 0
        self.execution = (
            execution_of(self._log[-1], manifests[self._one]) if self._log else manifests[self._one].execution
        )
        check_space(places, self._layouts, self._planned, self.rows_committed)
        self._worker = BackgroundWorker("store-writer", _QUEUE_BYTES)

    @classmethod
    def open(
        cls, paths: Mapping[Location, str | Path], manifests: Mapping[Location, StoreManifest], *, fresh: bool = False
    ) -> StoreSetWriter:
        """Create the stores, or go on with them after the last common commit.

        A finished store whose manifest now plans more rows is extended: if its last shard is short, ``rows_committed``
            is where
        that shard begins; extract it again whole, its stored rows are compared and kept.

        Args:
            paths: location → folder or fsspec URL.
            manifests: location → what the store is to hold. Identity is compared with what is there; a larger
                ``planned_rows`` replaces the old plan.
            fresh: drop what is there and begin anew.

        Raises:
            StoreError: another identity (the field is named), another writer at work, damage, no permission.
            ResourceError: the plan does not fit on the disk; the bytes are in the sentence.

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

    # --- what is known
    # -------------------------------------------------------------------------------------------------

    @property
    def _log(self) -> list[Commit]:
        return self._logs[self._one]

    @property
    def _layouts(self) -> dict[Location, StoreLayout]:
        return {layer: manifest.layout for layer, manifest in self._manifests.items()}

    @property
    def layout(self) -> StoreLayout:
        """The layout in use (of the lowest layer; all layers share their row sizes)."""
        return self._manifests[self._one].layout

    @property
    def run(self) -> str:
        """Token of this run, which its workers show: see ``write_shard``."""
        return self._locks[0].owner

    @property
    def manifests(self) -> Mapping[Location, StoreManifest]:
        """The manifests as stored."""
        return self._manifests

    @property
    def rows_stored(self) -> int:
        """Rows in the stores now, a short last shard included."""
        return rows_in(self._log)

    @property
    def rows_committed(self) -> int:
        """Where appending goes on: rows of settled shards. A short last shard to be extended is not settled."""
        return rows_in(self._settled)

    @property
    def next_shard(self) -> int:
        """The shard that begins at :attr:`rows_committed`."""
        return len(latest(self._settled))

    @property
    def kept_rows(self) -> int:
        """Rows of :attr:`next_shard` that are stored already and will be compared and kept."""
        return self.rows_stored - self.rows_committed

    @property
    def cursor(self) -> dict[str, Any] | None:
        """The stream position given with the commit before :attr:`rows_committed`; None at the start."""
        return self._settled[-1].cursor if self._settled else None

    @property
    def last_cursor(self) -> dict[str, Any] | None:
        """The stream position after :attr:`rows_stored`: the short last shard's, where there is one."""
        return self._log[-1].cursor if self._log else None

    @property
    def seconds_blocked(self) -> float:
        """Time :meth:`append` waited because the disk did not keep up."""
        return self._worker.seconds_blocked

    @property
    def bytes_written(self) -> int:
        """Bytes of the files committed through this writer."""
        return self._bytes

    # --- writing
    # -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Mark the stores unfinished, with the plan. :meth:`append` does it; call it before workers write shards."""
        if self._began:
            return
        self._began = True
        for layer, place in self._places.items():
            wanted = self._manifests[layer].model_copy(update={"planned_rows": self._planned, "finished": False})
            self._set_manifest(layer, place, wanted)

    def append(self, block: RowBlock, activations: Mapping[Location, np.ndarray]) -> None:
        """Queue rows of the current shard; waits only while too much is queued already.

        The arrays must not be changed afterwards. ``activations``: location → uint16 bits ``[B, T, D]``.

        Raises:
            ValueError: the rows straddle the shard's end, a layer is missing, or a shape is wrong.
            StoreError, ResourceError: an earlier row could not be written.

        """
        if self._tail_queued:
            raise ValueError("a short shard was committed: it is the last of this plan, no rows can follow it")
        room = self._shard_start + self.layout.shard_rows - self._queued_rows
        if len(block) > room:
            raise ValueError(f"{len(block)} rows straddle a shard's end, {room} rows away: cut the block there")
        self.begin()
        self._queued_rows += len(block)
        self._worker.put(lambda: self._write(block, activations), sum(a.nbytes for a in activations.values()))

    def commit(self, cursor: dict[str, Any]) -> None:
        """Queue the commit of the current shard, whole or (as the last of the plan) short.

        Args:
            cursor: JSON that says where the text stream stands after these rows; :attr:`cursor` gives it back.

        """
        self._tail_queued = self._queued_rows % self.layout.shard_rows != 0
        self._shard_start = self._queued_rows
        self._worker.put(lambda: self._commit(cursor), 0)

    def commit_records(self, records: Sequence[ShardRecord], cursor: dict[str, Any] | None) -> None:
        """Commit shards that workers have written, in row order; the coordinator's half of :func:`write_shard`.

        ``cursor`` goes with the last of them. Returns when they are committed.

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
        """Discard the rows since the last commit and begin the shard anew, recording a changed execution with it.

        For another attempt with a smaller batch; rewind the text to :attr:`cursor`.
        """
        self._worker.put(self._discard, 0)
        self.drain()
        self._queued_rows = self._shard_start = self.rows_committed
        self._tail_queued = False
        self.execution = execution or self.execution

    def drain(self) -> None:
        """Wait until everything queued is on disk; raises what went wrong."""
        self._worker.drain()

    def finish(self) -> None:
        """Mark the stores finished with the rows they hold.

        Raises:
            ValueError: rows were appended that no commit covers.

        """
        self.drain()
        if self._shard is not None:
            raise ValueError("rows were appended since the last commit: commit() before finish()")
        for layer, place in self._places.items():
            for name in ARRAYS:
                remove_partial(place, name)  # of workers that died: whoever redid their shards wrote other files
            done = self._manifests[layer].model_copy(update={"planned_rows": self.rows_stored, "finished": True})
            self._set_manifest(layer, place, done)

    # --- the background thread's side
    # ----------------------------------------------------------------------------------

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
        changed = self.execution != self._manifests[self._one].execution
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

    # --- leaving
    # -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self._worker.close()
            self._discard()
            for lock in self._locks:
                lock.release()


def _settled(log: list[Commit], planned: int, shard_rows: int) -> list[Commit]:
    """The lines that stay as they are: all but those of a short last shard that the plan now reaches beyond."""
    if not log or log[-1].rows == shard_rows or rows_in(log) >= planned:
        return list(log)
    return [commit for commit in log if commit.shard != log[-1].shard]
