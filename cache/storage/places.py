"""The interface to where a store lies: a local folder, or anything that fsspec reaches.

The two differ in how a file becomes durable under its final name. Locally: write ``NAME.TOKEN.partial``, fsync, rename,
fsync the folder. On object storage: an upload, which appears only when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Sink(Protocol):
    """An unfinished file. It is not visible under its name before :meth:`commit` returns."""

    def write(self, buffers: Sequence[Any]) -> None:
        """Append the bytes of these buffers."""
        ...

    def commit(self, confirm: Callable[[], None] | None = None) -> None:
        """Make the file durable, call ``confirm`` (which raises if it is no longer wanted), and make it visible."""
        ...

    def discard(self) -> None:
        """Delete the unfinished file."""
        ...


class Files(Protocol):
    """Files of a place, prepared for many small reads. Thread-safe."""

    def size(self, key: str) -> int:
        """Bytes of a file; FileNotFoundError if it is missing."""
        ...

    def read_into(self, key: str, offset: int, buffers: Sequence[Any]) -> int:
        """As :meth:`Place.read_into`."""
        ...

    def stream_into(self, key: str, offset: int, body: Any, seen: Callable[[Any], object]) -> int:
        """Fill ``body`` from ``offset``, and call ``seen`` with each part after it was read; returns the bytes read."""
        ...

    def close(self) -> None:
        """Close all files."""
        ...


class Place(Protocol):
    """A folder of files named by keys such as ``activations/c.0.0.0``."""

    local: bool

    def exists(self, key: str) -> bool:
        """Whether there is such a file or folder ("" is the place itself)."""
        ...

    def size(self, key: str) -> int:
        """Bytes of a file; FileNotFoundError if it is missing."""
        ...

    def read(self, key: str) -> bytes:
        """A whole file; FileNotFoundError if it is missing."""
        ...

    def read_into(self, key: str, offset: int, buffers: Sequence[Any]) -> int:
        """Fill the buffers one after the other from ``offset``; returns the bytes read (fewer at the file's end)."""
        ...

    def open_many(self) -> Files:
        """Open the place for repeated reads of many files, which may stay open."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names directly inside a folder, sorted; empty if there is no such folder."""
        ...

    def make_folder(self, key: str) -> None:
        """Create a folder durably. Does nothing on object storage, which has no folders."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Write a small file completely, atomically and durably."""
        ...

    def append(self, key: str, line: bytes) -> None:
        """Add a line to a log durably. A crash may leave it incomplete; once this returns, it is not lost."""
        ...

    def create(self, key: str) -> Sink:
        """Begin a new file."""
        ...

    def remove(self, key: str) -> None:
        """Delete a file if it is there."""
        ...

    def free_bytes(self) -> tuple[Any, int] | None:
        """(identity of the file system, bytes free); None on object storage."""
        ...
