"""One layer's activations, opened for reading: rows, chunks, tokens, and what the store records about itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from ..errors import StoreError
from ..sites import Location
from .format.commit_log import LOG, Commit, fingerprint, latest, rows_in
from .format.layout import StoreLayout
from .format.log_index import IndexedLog, open_log
from .format.manifest import StoreManifest, manifest_at
from .format.shard_reader import ShardReader
from .storage.local_cache import ChunkFiles, LocalCache, check_room
from .storage.open_place import place_of
from .storage.places import Place

if TYPE_CHECKING:
    from .statistics import StoreStatistics


class ActivationStore:
    """The committed rows of one layer: ``n_rows`` × ``context`` × ``d_model`` bfloat16, with tokens, documents, flags.

    Every read compares the chunk's hash with the committed one. Thread-safe. Works on folders and on fsspec URLs. An
    opened store sees the rows that were committed when it was opened, and stays readable while the store grows.
    """

    def __init__(
        self, place: Place, manifest: StoreManifest, commits: Sequence[Commit], cache: LocalCache | None = None
    ):
        self._place, self._commits = place, commits
        self.manifest = manifest
        self._latest = latest(commits)
        self._n_rows = rows_in(commits)
        kept = None
        if cache is not None:
            check_room(cache, manifest.layout.chunk_bytes, str(place))
            kept = ChunkFiles(cache, str(place))
        self._reader = ShardReader(place, manifest.layout, kept)

    @classmethod
    def open(cls, path: str | Path, *, allow_unfinished: bool = False, cache: LocalCache | None = None) -> Self:
        """Open a store for reading.

        Args:
            path: its folder, or a URL such as ``s3://bucket/l12.zarr``.
            allow_unfinished: also open a store whose extraction is not finished, with the rows committed so far.
            cache: keep chunks that were read on the disk of this machine.

        Raises:
            StoreError: the store is missing, is no store, has a newer format, is damaged, or is not finished.
            UsageError: its chunks are too large for this cache.

        """
        place = place_of(path)
        manifest = manifest_at(place)
        try:
            log, length = open_log(place)
        except FileNotFoundError:
            raise StoreError(f"{place}/{LOG} is missing, so nothing says which rows are good: restore it") from None
        rows = rows_in(log)
        if not manifest.finished and not allow_unfinished:
            raise StoreError(
                f"{place} holds {rows} of {manifest.planned_rows} rows, not finished: finish it with "
                "the same extract command"
            )
        if manifest.finished and (log.sound != length or rows != manifest.planned_rows):
            raise StoreError(
                f"{place}/{LOG} is damaged: {rows} of {manifest.planned_rows} rows can be read; restore it"
            )
        return cls(place, manifest, log, cache)

    def __repr__(self) -> str:
        shape = f"{self.n_rows} × {self.context} × {self.d_model}"
        return f"ActivationStore({self.path!r}, layer {self.location}, {shape})"

    @property
    def path(self) -> str:
        """The folder or URL."""
        return str(self._place)

    @property
    def place(self) -> Place:
        """The folder or URL as the cache's own modules read it."""
        return self._place

    @property
    def commits(self) -> Sequence[Commit]:
        """The commit log; of a long one, lines are read when they are asked for."""
        return self._commits

    @property
    def n_bytes(self) -> int:
        """Of all committed files."""
        if isinstance(self._commits, IndexedLog):
            return self._commits.bytes()
        return sum(file.bytes for commit in self._latest for file in commit.files.values())

    @property
    def layer(self) -> int:
        """The transformer block of these activations, counted from 0."""
        return self.manifest.layer

    @property
    def location(self) -> Location:
        """The layer and the hook point of these activations."""
        return self.manifest.location

    @property
    def layout(self) -> StoreLayout:
        """Rows per chunk and shard."""
        return self.manifest.layout

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return self.layout.d_model

    @property
    def context(self) -> int:
        """Positions per row."""
        return self.layout.context

    @property
    def n_rows(self) -> int:
        """Committed rows."""
        return self._n_rows

    @property
    def n_tokens(self) -> int:
        """Positions in all rows, special tokens and padding included."""
        return self.n_rows * self.context

    @property
    def chunk_rows(self) -> int:
        """Rows per chunk; the last chunk of the store may be shorter."""
        return self.layout.chunk_rows

    @property
    def n_chunks(self) -> int:
        """Chunks in the store."""
        return self.layout.chunks_for(self.n_rows)

    @property
    def finished(self) -> bool:
        """Whether extraction completed its plan."""
        return self.manifest.finished

    def fingerprint(self, rows: int | None = None) -> str:
        """Hash of the identity and of the committed files of the first ``rows`` rows (default: all).

        It does not change when the store grows.

        Raises:
            StoreError: the store has fewer rows.

        """
        rows = self.n_rows if rows is None else rows
        self._check_rows(0, rows)
        return fingerprint(self.manifest, self._commits, rows)

    # --- activations

    def chunk_range(self, chunk: int) -> range:
        """The rows of one chunk."""
        first = chunk * self.chunk_rows
        return range(first, min(first + self.chunk_rows, self.n_rows))

    def read_chunks(self, chunks: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """Read whole chunks, in the order given, as bfloat16 ``[rows, T, D]``. This is the fastest way to read.

        Args:
            chunks: chunk numbers.
            out: contiguous bfloat16 memory to fill, with at least as many rows as the chunks hold. Pass the same memory
                again and again: allocating new memory takes longer than the read. Pinned memory works.

        Raises:
            StoreError: a chunk does not exist or is damaged.

        """
        sizes = [len(self.chunk_range(self._check_chunk(chunk))) for chunk in chunks]
        total = sum(sizes)
        if out is None:
            out = torch.empty((total, self.context, self.d_model), dtype=torch.bfloat16)
        width = (self.context, self.d_model)
        if out.dtype != torch.bfloat16 or not out.is_contiguous() or len(out) < total or out.shape[1:] != width:
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)}: it must be contiguous bfloat16 {(total, *width)} or longer"
            )
        target = out.view(torch.uint16).numpy()
        starts = np.cumsum([0, *sizes])
        jobs = [partial(self._fill, c, 0, n, target[s : s + n]) for c, n, s in zip(chunks, sizes, starts, strict=False)]
        self._reader.run(jobs)
        return out[:total]

    def rows(self, start: int, stop: int, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Rows ``start`` … ``stop`` as ``[rows, T, D]``.

        Raises:
            StoreError: the rows do not exist or are damaged.

        """
        self._check_rows(start, stop)
        out = torch.empty((stop - start, self.context, self.d_model), dtype=torch.bfloat16)
        target = out.view(torch.uint16).numpy()
        size, jobs = self.chunk_rows, []
        for chunk in range(start // size, -(-stop // size)):
            low, high = max(start, chunk * size), min(stop, (chunk + 1) * size)
            jobs.append(
                partial(self._fill, chunk, low - chunk * size, high - chunk * size, target[low - start : high - start])
            )
        if jobs:
            self._reader.run(jobs)
        return out.to(dtype)

    def _fill(self, chunk: int, low: int, high: int, into: np.ndarray) -> None:
        """Read rows ``low`` … ``high`` of a chunk into ``into``; a part of a chunk goes through a scratch buffer."""
        commit = self._latest[chunk * self.chunk_rows // self.layout.shard_rows]
        within = chunk % self.layout.shard_chunks
        direct = high - low == self.chunk_rows
        target = into if direct else self._reader.scratch()
        # A partly filled last chunk may have been completed since we read the log, so the log's hash may be outdated:
        # compare the chunk's own checksum instead.
        full = (within + 1) * self.chunk_rows <= commit.rows
        hashes = commit.files["activations"].chunks
        self._reader.read_chunk(commit.shard, within, commit.rows, target, hashes[within] if full and hashes else None)
        if not direct:
            into[:] = target[low:high]

    def iter_rows(self, rows_per_step: int, *, dtype: torch.dtype = torch.bfloat16) -> Iterator[torch.Tensor]:
        """All rows in order, ``rows_per_step`` at a time; the last step may be shorter."""
        for start in range(0, self.n_rows, rows_per_step):
            yield self.rows(start, min(start + rows_per_step, self.n_rows), dtype=dtype)

    # --- text

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids of rows ``start`` … ``stop``, int32 ``[rows, T]``."""
        return self._text("tokens", start, stop)

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Running document numbers, int32 ``[rows, T]``."""
        return self._text("documents", start, stop)

    def flags(self, start: int, stop: int) -> np.ndarray:
        """Bits ``SPECIAL`` and ``PADDING``, uint8 ``[rows, T]``."""
        return self._text("flags", start, stop)

    def _text(self, name: str, start: int, stop: int) -> np.ndarray:
        self._check_rows(start, stop)
        parts, size = [], self.layout.shard_rows
        for shard in range(start // size, -(-stop // size)):
            first = shard * size
            parts.append(self._reader.text(shard)[name][max(start - first, 0) : stop - first])
        return np.concatenate(parts) if parts else np.empty((0, self.context), np.int32)

    # --- statistics

    def statistics(self, *, scheduler: str = "threads") -> StoreStatistics:
        """Mean, variance, norms and norm per position, computed once and saved in the store.

        Args:
            scheduler: ``threads``, ``synchronous``, or the address of a Dask cluster that reaches the store.

        """
        from .statistics import store_statistics

        return store_statistics(self, scheduler=scheduler)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload the store to a dataset repository of the Hugging Face hub, with a card; see :func:`.push.push_stores`.

        Args:
            repository: ``OWNER/NAME``, made if it is not there. The store becomes a folder of its own name in it.
            private: whether a repository that is made now can be seen by its owner alone.

        Returns:
            The address of its page.

        Raises:
            StoreError: it is not finished or not on this machine; or the hub refuses or is out of reach.

        """
        from .push import push_stores

        return push_stores([self], repository, private=private).page

    def close(self) -> None:
        """Close files and clear the caches; the store can still be read afterwards."""
        self._reader.forget()

    def _check_rows(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_rows:
            raise StoreError(f"rows {start} to {stop} were asked for, {self.path} holds rows 0 to {self.n_rows}")

    def _check_chunk(self, chunk: int) -> int:
        if not 0 <= chunk < self.n_chunks:
            raise StoreError(f"chunk {chunk} was asked for, {self.path} holds chunks 0 to {self.n_chunks - 1}")
        return chunk
