"""Stores on object storage through fsspec: s3://, gs://, memory:// and every other protocol it knows.

An object appears completely or not at all. A shard is therefore one upload (its bytes stay in memory until then, for
all layers), and the commit log is extended by replacing the object with a longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...errors import StoreError, TcsaeError
from .os_errors import plain_errors
from .places import Files, Sink

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}


class RemotePlace:
    """A prefix of an object store."""

    local = False

    def __init__(self, url: str):
        import fsspec

        self._url = url.rstrip("/")
        protocol = url.split("://", 1)[0]
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self._url, **_uncached(protocol))
        except ImportError:
            package = _PACKAGES.get(protocol, f"fsspec's package for {protocol}")
            raise StoreError(f"{url} needs {package}, which is not installed: pip install {package}") from None
        except ValueError as problem:
            raise StoreError(f"{url} cannot be opened: {problem}; use a folder or a protocol fsspec knows") from None

    def __str__(self) -> str:
        return self._url

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def exists(self, key: str) -> bool:  # noqa: D102 — see Place
        with _plain(f"look at {self}/{key}"):
            return self._fs.exists(self._path(key))

    def size(self, key: str) -> int:  # noqa: D102
        with _plain(f"look at {self}/{key}"):
            return int(self._fs.size(self._path(key)) or 0)

    def read(self, key: str) -> bytes:  # noqa: D102
        with _plain(f"read {self}/{key}"):
            return self._fs.cat_file(self._path(key))

    def read_into(self, key: str, offset: int, buffers: Sequence[Any]) -> int:  # noqa: D102
        views = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        if not any(map(len, views)):
            return 0  # S3 refuses a range of no bytes
        with _plain(f"read {self}/{key}"):
            data = self._fs.cat_file(self._path(key), start=offset, end=offset + sum(map(len, views)))
        found, done = np.frombuffer(data, np.uint8), 0
        for view in views:
            part = found[done : done + len(view)]
            view[: len(part)] = part  # NumPy copies without the GIL: other threads go on
            done += len(part)
        return done

    def open_many(self) -> Files:  # noqa: D102
        return _RemoteFiles(self)

    def names(self, folder: str) -> list[str]:  # noqa: D102
        with _plain(f"list {self}/{folder}"):
            try:
                paths = self._fs.ls(self._path(folder), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def make_folder(self, key: str) -> None:  # noqa: ARG002, D102
        return  # prefixes need none

    def replace(self, key: str, data: bytes) -> None:  # noqa: D102
        with _plain(f"write {self}/{key}"):
            try:
                self._fs.pipe_file(self._path(key), data)
            except FileNotFoundError as problem:
                raise StoreError(
                    f"cannot write {self}/{key}: {problem}; create the bucket first, or name another"
                ) from problem

    def append(self, key: str, line: bytes) -> None:  # noqa: D102
        self.replace(key, self.read(key) + line)

    def create(self, key: str) -> Sink:  # noqa: D102
        return _Upload(self, key)

    def remove(self, key: str) -> None:  # noqa: D102
        with _plain(f"remove {self}/{key}"):
            if self._fs.exists(self._path(key)):
                self._fs.rm_file(self._path(key))

    def free_bytes(self) -> tuple[Any, int] | None:  # noqa: D102
        return None


def _uncached(protocol: str) -> dict[str, Any]:
    """The options that stop fsspec from answering from an old listing."""
    return {"use_listings_cache": False} if protocol in ("s3", "s3a", "gs", "gcs") else {}


class _RemoteFiles:
    """Keeps sizes: only a store's last shard is ever replaced (by a longer one), and then the store is reopened."""

    def __init__(self, place: RemotePlace):
        self._place, self._sizes = place, {}

    def size(self, key: str) -> int:
        if key not in self._sizes:
            self._sizes[key] = self._place.size(key)
        return self._sizes[key]

    def read_into(self, key: str, offset: int, buffers: Sequence[Any]) -> int:
        return self._place.read_into(key, offset, buffers)

    def stream_into(self, key: str, offset: int, body: Any, seen: Callable[[Any], object]) -> int:
        read = self._place.read_into(key, offset, [body])  # one request
        seen(body)
        return read

    def close(self) -> None:
        self._sizes.clear()


class _Upload:
    """A shard held in memory and uploaded in one call; clients send large objects in parallel parts."""

    def __init__(self, place: RemotePlace, key: str):
        self._place, self._key, self._data = place, key, bytearray()

    def write(self, buffers: Sequence[Any]) -> None:
        for buffer in buffers:
            self._data += memoryview(buffer).cast("B")

    def commit(self, confirm: Callable[[], None] | None = None) -> None:
        if confirm is not None:
            confirm()
        self._place.replace(self._key, bytes(self._data))
        self.discard()

    def discard(self) -> None:
        self._data = bytearray()


@contextmanager
def _plain(doing: str) -> Iterator[None]:
    """Turn any error of a client library into one sentence; a missing object stays FileNotFoundError."""
    try:
        with plain_errors(doing):
            yield
    except (FileNotFoundError, TcsaeError):
        raise
    except Exception as problem:
        name = type(problem).__name__
        if "Credential" in name or "Auth" in name or isinstance(problem, PermissionError):
            raise StoreError(
                f"cannot {doing}: the object store refused ({problem}); set credentials for it, "
                "such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from problem
        raise StoreError(
            f"cannot {doing}: {name}: {problem}; check address and connection, then try again"
        ) from problem
