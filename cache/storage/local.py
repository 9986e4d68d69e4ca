"""A store in a local folder.

New files get a temporary name and appear by rename; files and folders are fsynced; one read call fills several buffers.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import StoreError
from ...system.atomic_files import sync_folder
from ...system.untrusted_files import IrregularFileError, regular_descriptor
from .os_errors import plain_errors

_MOST_BYTES = 1 << 32  # of a file that is read at once
PARTIAL = ".partial"  # suffix of an unfinished file


class LocalPlace:
    """A folder of this machine or of a mounted file system."""

    local = True

    def __init__(self, path: str):
        self.root = Path(path).expanduser()

    def __str__(self) -> str:
        return str(self.root)

    def path(self, key: str) -> Path:
        """The path of a key."""
        return self.root / key if key else self.root

    def exists(self, key: str) -> bool:  # noqa: D102 — see places.py
        with plain_errors(f"look at {self}/{key}"):
            return self.path(key).exists()

    def size(self, key: str) -> int:  # noqa: D102
        with plain_errors(f"look at {self}/{key}"):
            return self.path(key).stat().st_size

    def read(self, key: str) -> bytes:  # noqa: D102
        with plain_errors(f"read {self}/{key}"), os.fdopen(_descriptor(self.path(key)), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MOST_BYTES:
                raise StoreError(f"{self}/{key} has {size:,} bytes, more than it can have: restore it")
            return file.read()

    def read_into(self, key: str, offset: int, buffers: Sequence[Any]) -> int:  # noqa: D102
        with plain_errors(f"read {self}/{key}"), open_readonly(self.path(key)) as fd:
            return preadv_all(fd, offset, buffers)

    def open_many(self) -> LocalFiles:  # noqa: D102
        return LocalFiles(self)

    def names(self, folder: str) -> list[str]:  # noqa: D102
        try:
            return sorted(os.listdir(self.path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        """Names of the files directly inside a folder, and their bytes; nothing if there is no such folder."""
        with plain_errors(f"list {self}/{folder}"):
            try:
                found = os.scandir(self.path(folder))
            except (FileNotFoundError, NotADirectoryError):
                return
            with found as files:
                yield from ((file.name, file.stat().st_size) for file in files)

    def make_folder(self, key: str) -> None:  # noqa: D102
        folder = self.path(key)
        with plain_errors(f"create {folder}"):
            missing = [p for p in (folder, *folder.parents) if not p.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            for made in missing:
                sync_folder(made.parent)

    def replace(self, key: str, data: bytes) -> None:  # noqa: D102
        sink = self.create(key)
        try:
            sink.write([data])
            sink.commit()
        except BaseException:
            sink.discard()
            raise

    def append(self, key: str, line: bytes) -> None:  # noqa: D102
        with plain_errors(f"write {self}/{key}"):
            fd = os.open(self.path(key), os.O_WRONLY | os.O_APPEND)
            try:
                write_all(fd, [line])
                os.fsync(fd)
            finally:
                os.close(fd)

    def create(self, key: str) -> LocalSink:  # noqa: D102
        return LocalSink(self.path(key))

    def remove(self, key: str) -> None:  # noqa: D102
        with plain_errors(f"remove {self}/{key}"):
            self.path(key).unlink(missing_ok=True)

    def free_bytes(self) -> tuple[Any, int] | None:  # noqa: D102
        nearest = next(p for p in (self.root.absolute(), *self.root.absolute().parents) if p.exists())
        return os.stat(nearest).st_dev, shutil.disk_usage(nearest).free


# Each part is hashed right after it was read, while it is still in the core's cache. This reaches 0.85 of the speed of
# reading without hashing; hashing the whole chunk afterwards reaches 0.7.
_SLICE_BYTES = 1 << 19


class LocalFiles:
    """Keeps the descriptors of recently read files open. An evicted one is closed when its last reader is done."""

    _KEEP = 128

    def __init__(self, place: LocalPlace):
        self._place, self._lock = place, threading.Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    def size(self, key: str) -> int:  # noqa: D102
        with plain_errors(f"read {self._place}/{key}"):
            return os.fstat(self._file(key).fd).st_size

    def read_into(self, key: str, offset: int, buffers: Sequence[Any]) -> int:  # noqa: D102
        with plain_errors(f"read {self._place}/{key}"):
            file = self._file(key)
            return preadv_all(file.fd, offset, buffers)

    def stream_into(self, key: str, offset: int, body: Any, seen: Callable[[Any], object]) -> int:  # noqa: D102
        with plain_errors(f"read {self._place}/{key}"):
            file, view = self._file(key), memoryview(body).cast("B")
            for start in range(0, len(view), _SLICE_BYTES):
                part = view[start : start + _SLICE_BYTES]
                n = os.preadv(file.fd, (part,), offset + start)
                if n < len(part) and (n := n + preadv_all(file.fd, offset + start + n, [part[n:]])) < len(part):
                    return start + n
                seen(part)
            return len(view)

    def close(self) -> None:  # noqa: D102
        with self._lock:
            self._open.clear()

    def _file(self, key: str) -> _OpenFile:
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
            file = self._open[key] = _OpenFile(_descriptor(self._place.path(key)))
            if len(self._open) > self._KEEP:
                self._open.popitem(last=False)
            return file


class _OpenFile:
    def __init__(self, fd: int):
        self.fd = fd

    # `close` is a default argument, since the module `os` may be gone when the interpreter ends.
    def __del__(self, close: Callable[[int], None] = os.close):
        close(self.fd)


# The kernel starts writing to disk while the rest of the file is still hashed and written, so that the final fsync is
# short.
_WRITEBACK_BYTES = 16 << 20


class LocalSink:
    """A file named ``NAME.TOKEN.partial`` until :meth:`commit` renames it.

    No two sinks share a name: if a worker was given up but still runs, it and the worker that repeats its shard write
    different files.
    """

    def __init__(self, final: Path):
        self._final = final
        self._partial = final.with_name(f"{final.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
        with plain_errors(f"write {final}"):
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._written = self._started = 0

    def write(self, buffers: Sequence[Any]) -> None:  # noqa: D102
        with plain_errors(f"write {self._final}"):
            write_all(self._fd, buffers)
            self._written += sum(memoryview(b).nbytes for b in buffers)
            if self._written - self._started >= _WRITEBACK_BYTES:
                start_writeback(self._fd, self._started, self._written - self._started)
                self._started = self._written

    def commit(self, confirm: Callable[[], None] | None = None) -> None:  # noqa: D102
        with plain_errors(f"write {self._final}"):
            os.fsync(self._fd)
            self._close()
            if confirm is not None:
                confirm()
            os.replace(self._partial, self._final)
            sync_folder(self._final.parent)

    def discard(self) -> None:  # noqa: D102
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _descriptor(path: Path) -> int:
    try:
        return regular_descriptor(path)
    except IrregularFileError as other:
        raise StoreError(f"{path} is {other} and no regular file: restore it, or extract anew with --fresh") from None


@contextmanager
def open_readonly(path: Path) -> Iterator[int]:
    """Open a file for reading and yield its descriptor."""
    fd = _descriptor(path)
    try:
        yield fd
    finally:
        os.close(fd)


def preadv_all(fd: int, offset: int, buffers: Sequence[Any]) -> int:
    """Fill the buffers from ``offset`` on; returns the number of bytes read, fewer at the end of the file."""
    pending = [memoryview(b).cast("B") for b in buffers]
    done = 0
    while pending:
        n = os.preadv(fd, pending, offset + done)
        if n == 0:
            break
        done += n
        pending = _advance(pending, n)
    return done


def write_all(fd: int, buffers: Sequence[Any]) -> None:
    """Write all bytes. One system call writes at most 2 GB and may write less."""
    pending = [memoryview(b).cast("B") for b in buffers]
    while pending:
        pending = _advance(pending, os.writev(fd, pending))


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Ask Linux to start writing modified pages to disk, without waiting. Does nothing on other systems."""
    if sys.platform == "linux":
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def _advance(pending: list[memoryview], n: int) -> list[memoryview]:
    while pending and n >= len(pending[0]):
        n -= len(pending.pop(0))
    if pending and n:
        pending[0] = pending[0][n:]
    return pending
