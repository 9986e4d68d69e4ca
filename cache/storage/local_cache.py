"""A bounded folder of chunks that were read from far away: what is read again comes from the disk of this machine.

Every chunk is a file, named by where it came from and by the hash of its bytes in the commit log, so that nothing old
is ever taken for something new. Whoever reads it compares that hash: a file that a crash cut short, or that was
altered, is removed and read from afar. Files appear by rename and are never changed, so that several processes can
share a folder; each removes the files that were used longest ago. Nothing is fsynced: what is lost is read again.

fsspec has caches of files and blocks, too, but none with a bound, and none that two processes can share.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from ...console import format_bytes, warn
from ...errors import UsageError
from ...system.atomic_files import PARTIAL, make_folder

DEFAULT_FOLDER = "~/.cache/tcsae"
_PARTS = 16
"""A folder is looked through whenever a process has added this part of its limit; no chunk may be larger."""
_KEPT = 12
"""Sixteenths of the limit that are left then: several processes may add one each before they look again."""
_ABANDONED = 3600.0  # seconds after which an unfinished file is no longer anybody's


@dataclass(frozen=True)
class LocalCache:
    """Where chunks are kept, and how many bytes of them.

    Raises:
        UsageError: no room at all.

    """

    limit_bytes: int
    folder: str = DEFAULT_FOLDER

    def __post_init__(self) -> None:
        if self.limit_bytes < 1:
            raise UsageError("a local cache of 0 bytes keeps nothing: give some gigabytes, or leave it out")

    @property
    def largest(self) -> int:
        """Bytes of the largest chunk that is kept."""
        return self.limit_bytes // _PARTS


class ChunkFiles:
    """The files of a local cache, for the chunks of one store. Thread-safe.

    Args:
        cache: where, and how many.
        origin: the path or URL of the store.

    """

    def __init__(self, cache: LocalCache, origin: str):
        self._cache, self._origin = cache, origin
        self._folder = make_folder(Path(cache.folder).expanduser())
        self._lock, self._added, self._full = threading.Lock(), 0, False
        self._shrink()

    def read(self, key: str, offset: int, body: Any, xxh3: str) -> bool:
        """Fill ``body`` with a chunk whose hash this is; false where it is not kept, or not whole."""
        path = self._path(key, offset, len(body), xxh3)
        try:
            with path.open("rb", buffering=0) as file:
                read = file.readinto(body)
        except OSError:
            return False
        if read != len(body) or xxh3_64_hexdigest(body) != xxh3:
            with suppress(OSError):
                path.unlink()
            return False
        with suppress(OSError):  # another process may just have removed it
            os.utime(path)
        return True

    def keep(self, key: str, offset: int, body: Any, xxh3: str) -> None:
        """Keep a chunk that was read and whose hash was compared. A disk without room is said once."""
        path = self._path(key, offset, len(body), xxh3)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb", buffering=0) as file:
                written = file.write(body)
            if written != len(body):
                raise OSError("only a part of it could be written")
            os.replace(partial, path)
        except OSError as problem:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            if not self._full:
                self._full = True
                warn(f"nothing more can be kept in {self._folder} ({problem}): reading goes on without")
            return
        with self._lock:
            self._added += len(body)
            if self._added < self._cache.largest:
                return
            self._added = 0
        self._shrink()

    def _path(self, key: str, offset: int, length: int, xxh3: str) -> Path:
        name = sha256(f"{self._origin} {key} {offset} {length} {xxh3}".encode()).hexdigest()[:32]
        return self._folder / name[:2] / name[2:]

    def _shrink(self) -> None:
        """Remove what was used longest ago, as far as the limit asks for it."""
        found: list[tuple[bool, float, int, str]] = []
        for folder in self._folder.iterdir():
            with suppress(OSError), os.scandir(folder) as files:
                for file in files:
                    with suppress(OSError):
                        about = file.stat()
                        abandoned = file.name.endswith(PARTIAL) and time.time() - about.st_mtime > _ABANDONED
                        found.append((not abandoned, about.st_mtime, about.st_size, file.path))
        total, most = sum(size for _, _, size, _ in found), self._cache.limit_bytes * _KEPT // _PARTS
        for wanted, _, size, path in sorted(found):
            if wanted and total <= most:
                return
            with suppress(OSError):
                os.unlink(path)
            total -= size


def check_room(cache: LocalCache, chunk_bytes: int, path: str) -> None:
    """Raise a UsageError if the chunks of a store are too large for a cache."""
    if chunk_bytes > cache.largest:
        raise UsageError(
            f"a local cache of {format_bytes(cache.limit_bytes)} is too small for {path}, whose chunks have "
            f"{format_bytes(chunk_bytes)}: give at least {format_bytes(_PARTS * chunk_bytes)}"
        )
