"""Reading shard files into memory fast: one read per chunk, hashes checked without the GIL, buffers used again.

Uncompressed chunks are read directly into the caller's memory. On some machines this is 3–4 times faster if that memory
is page-aligned: use memory from ``torch.empty``, not a large numpy array.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_64

from ...errors import StoreError
from ..storage.local_cache import ChunkFiles
from ..storage.places import Place
from .codecs import CRC_BYTES, DamageError, check, decode
from .layout import StoreLayout
from .shard import index_bytes, parse_index, read_text
from .zarr_documents import TEXT_ARRAYS, shard_key

_FAR_THREADS = 32  # that wait for the network
_OPEN_TEXT = 16  # shards whose tokens, documents and flags are kept


@cache
def read_pool(local: bool = True) -> ThreadPoolExecutor:
    """The threads that read chunks; all stores of this process share them.

    On a disk there are as many as the machine has cores, up to 8. Those that wait for object storage need no core.
    """
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1) if local else _FAR_THREADS, "chunk-reader")


class ShardReader:
    """Reads chunks of activations and whole text arrays of shards, and checks all of them.

    Thread-safe. ``rows`` arguments give the number of committed rows of a shard; what comes after them is never read.
    """

    def __init__(self, place: Place, layout: StoreLayout, kept: ChunkFiles | None = None):
        self.place, self.layout, self._kept = place, layout, kept
        self._indices: dict[tuple[int, int], np.ndarray] = {}
        self._reading: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._texts: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._files = place.open_many()
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def forget(self) -> None:
        """Close files and clear the caches."""
        self._files.close()
        self._indices.clear()
        self._texts.clear()

    def read_chunk(self, shard: int, chunk: int, rows: int, into: np.ndarray, xxh3: str | None = None) -> None:
        """Read one chunk of a shard (``chunk`` counts within the shard) into uint16 ``[chunk_rows, T, D]``.

        ``xxh3`` is the hash of the encoded chunk from the commit log, and is compared. Without it the chunk's own
        CRC-32C is compared, which takes twice as long and does not notice a chunk of another store.

        Raises:
            StoreError: the shard is missing, truncated or altered; names the file.

        """
        key = shard_key("activations", shard)
        with damage(self.place, key):
            offset, length = (int(x) for x in self._index(shard, rows)[chunk])
            plain = self.layout.compression == "none"
            body: Any = into.reshape(-1).view(np.uint8) if plain else memoryview(bytearray(length - CRC_BYTES))
            if xxh3 is None:
                crc = bytearray(CRC_BYTES)
                self._fill(key, offset, [body, crc])
                check(body, crc)
            else:
                self._fill_hashed(key, offset, body, xxh3)
            if not plain:
                decode(body, into.reshape(-1).view(np.uint8), self.layout.compression)

    def _fill(self, key: str, offset: int, buffers: Sequence[Any]) -> None:
        if self._files.read_into(key, offset, buffers) != sum(map(len, buffers)):
            raise DamageError("it ends too early")

    def _fill_hashed(self, key: str, offset: int, body: Any, xxh3: str) -> None:
        if self._kept is not None and self._kept.read(key, offset, body, xxh3):
            return
        hasher = xxh3_64()
        if self._files.stream_into(key, offset, body, hasher.update) != len(body):
            raise DamageError("it ends too early")
        if hasher.hexdigest() != xxh3:
            raise DamageError("its bytes are not those that were committed")
        if self._kept is not None:
            self._kept.keep(key, offset, body, xxh3)

    def _index(self, shard: int, rows: int) -> np.ndarray:
        chunks = self.layout.chunks_for(rows)
        found = self._indices.get((shard, chunks))
        if found is None:
            with self._reading[shard]:  # the others that wait for the same index need not ask for it
                found = self._indices.get((shard, chunks))
                if found is None:
                    found = self._indices[shard, chunks] = self._read_index(shard, chunks)
        return found

    def _read_index(self, shard: int, chunks: int) -> np.ndarray:
        key, raw = shard_key("activations", shard), bytearray(index_bytes(self.layout))
        size = self._files.size(key)
        if size < len(raw) or self._files.read_into(key, size - len(raw), [raw]) != len(raw):
            raise DamageError("it is too short to be a shard")
        return parse_index(raw, self.layout, size, chunks)

    def shard_rows(self, shard: int, start: int, stop: int, rows: int) -> np.ndarray:
        """Rows ``start`` … ``stop`` of one shard as uint16 ``[stop − start, T, D]``; whole chunks are read and cut."""
        size = self.layout.chunk_rows
        out = np.empty((stop - start, self.layout.context, self.layout.d_model), np.uint16)
        for chunk in range(start // size, -(-stop // size)):
            scratch = self.scratch()
            self.read_chunk(shard, chunk, rows, scratch)
            low, high = max(start, chunk * size), min(stop, (chunk + 1) * size)
            out[low - start : high - start] = scratch[low - chunk * size : high - chunk * size]
        return out

    def scratch(self) -> np.ndarray:
        """A buffer of one chunk, separate for each thread."""
        if not hasattr(self._scratch, "chunk"):
            shape = (self.layout.chunk_rows, self.layout.context, self.layout.d_model)
            self._scratch.chunk = torch.empty(shape, dtype=torch.uint16).numpy()
        return self._scratch.chunk

    def text(self, shard: int) -> dict[str, np.ndarray]:
        """``tokens``, ``documents`` and ``flags`` of one shard, ``[shard_rows, T]``; recent ones stay in memory."""
        with self._lock:
            if shard in self._texts:
                self._texts.move_to_end(shard)
                return self._texts[shard]
        arrays = {}
        for name in TEXT_ARRAYS:
            with damage(self.place, shard_key(name, shard)):
                arrays[name] = read_text(self.place, name, shard, self.layout)
        with self._lock:
            self._texts[shard] = arrays
            while len(self._texts) > _OPEN_TEXT:
                self._texts.popitem(last=False)
        return arrays

    def run(self, jobs: Sequence[Any]) -> None:
        """Run all jobs on the reading threads (a single job in the calling thread) and raise the first failure."""
        if len(jobs) == 1:
            jobs[0]()
            return
        pool, waiting = read_pool(self.place.local), iter(jobs)

        def work() -> None:
            for job in waiting:  # the iterator is shared: each thread takes the next job that nobody has taken
                job()

        futures = [pool.submit(work) for _ in range(min(pool._max_workers, len(jobs)))]
        problems = [future.exception() for future in futures]  # wait for all: they write into the caller's buffers
        for problem in problems:
            if problem is not None:
                raise problem


class damage:  # noqa: N801 — lower case, since it is used as a statement: `with damage(place, key):`
    """Turns damaged or missing bytes into an error of one sentence that names the file."""

    def __init__(self, place: Place, key: str):
        self._file = f"{place}/{key}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> bool:
        if isinstance(problem, DamageError):
            raise StoreError(
                f"{self._file} is damaged: {problem}; `pipeline verify` lists all damage; restore the "
                "file or extract again"
            ) from problem
        if isinstance(problem, FileNotFoundError):
            raise StoreError(
                f"{self._file} is missing: restore it, or extract the store again with --fresh"
            ) from problem
        return False
