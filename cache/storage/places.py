"""Where a store lies: a local folder or anything fsspec reaches, behind the dozen operations the cache needs.

What differs is how a file becomes durable at its final name. Locally: write ``NAME.TOKEN.partial``, fsync, rename,
fsync the folder. On an object store: an upload that appears only when it is completed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Sink(Protocol):
    """A file in the making; nobody sees it under its name before :meth:`commit` returns."""

    def write(self, buffers: Sequence[Any]) -> None:
        """Append the bytes of these buffers."""
        ...

    def commit(self, confirm: Callable[[], None] | None = None) -> None:
        """Make the file durable, ask ``confirm`` (which raises if it is no longer wanted), and make it visible at its
        name.
        """
        ...

    def discard(self) -> None:
        """Drop it."""
        ...


class Files(Protocol):
    """Files of a place held ready for many small reads. Thread-safe."""

    def size(self, key: str) -> int:
        """Bytes of a file; FileNotFoundError without it."""
        ...

    def read_into(self, key: str, offset: int, buffers: Sequence[Any]) -> int:
        """As :meth:`Place.read_into`."""
        ...

    def stream_into(self, key: str, offset: int, body: Any, seen: Callable[[Any], object]) -> int:
        """Fill ``body`` from ``offset``, showing ``seen`` each part as soon as it is there; returns the bytes read."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class Place(Protocol):
    """A folder of files named by keys such as ``activations/c.0.0.0``."""

    local: bool

    def exists(self, key: str) -> bool:
        """Whether there is such a file (or folder; "" is the place itself)."""
        ...

    def size(self, key: str) -> int:
        """Bytes of a file; FileNotFoundError without it."""
        ...

    def read(self, key: str) -> bytes:
        """A whole file; FileNotFoundError without it."""
        ...

    def read_into(self, key: str, offset: int, buffers: Sequence[Any]) -> int:
        """Fill the buffers one after the other from ``offset``; returns the bytes read, fewer at the end
        of the file.
        """
        ...

    def open_many(self) -> Files:
        """Repeated reads of many files, keeping them open where that helps."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names directly inside a folder, sorted; none without it."""
        ...

    def make_folder(self, key: str) -> None:
        """Create a folder durably, where there is such a thing."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Write a small file whole, atomically and durably."""
        ...

    def append(self, key: str, line: bytes) -> None:
        """Add a line to a log durably; it may be torn by a crash, never silently lost once this returns."""
        ...

    def create(self, key: str) -> Sink:
        """Begin a file."""
        ...

    def remove(self, key: str) -> None:
        """Delete a file if it is there."""
        ...

    def free_bytes(self) -> tuple[Any, int] | None:
        """(identity of the file system, bytes free for us); None where space is no local matter."""
        ...
