"""One writer per store: locally a file lock, on object storage a lease.

The kernel releases a file lock when its process ends, however it ends. A lease expires if it is not renewed. It is only
as exclusive as the object store's conditional put: without one, two writers that start at the same instant may both
believe that they hold the lease; the loser notices at its next commit (see docs/FORMAT.md).

Both hold the token of the run. Workers on other machines get it with their shards and compare it before a file gets its
final name, since a worker may still be running after its run was stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from typing import Any, Protocol

from ...errors import StaleRunError, StoreError
from ...system.untrusted_files import parse_json
from .local import LocalPlace
from .os_errors import plain_errors
from .places import Place

LOCK = "activations/writer.lock"
HEARTBEAT, STALE = 20.0, 90.0  # seconds between renewals of a lease; seconds without renewal until it expires


class Lock(Protocol):
    """The exclusive right to write a store."""

    owner: str
    """Token of the run that holds the lock; a new random one for every run."""

    def confirm(self) -> None:
        """Raise StaleRunError if another run holds the lock now."""
        ...

    def release(self) -> None:
        """Release the lock; calling it twice is harmless."""
        ...


def acquire(place: Place, owner: str | None = None, key: str = LOCK) -> Lock:
    """Take the writer's lock of a store, the file ``key``, for the run with token ``owner`` (default: a new token).

    Raises:
        StoreError: another running process holds it, or the folder cannot be written.

    """
    owner = owner or uuid.uuid4().hex
    return LocalLock(place, owner, key) if isinstance(place, LocalPlace) else LeaseLock(place, owner, key)


def confirm_owner(place: Place, owner: str, key: str = LOCK) -> None:
    """Check, from any process that reaches the store, that the run with this token still holds the lock.

    Raises:
        StaleRunError: another run holds it, or none does.

    """
    holder = _holder(place, key)
    if holder.get("owner") == owner:
        return
    if holder:
        raise StaleRunError(
            f"another writer took over {place} while this one was silent: let it go on, nothing is lost"
        )
    raise StaleRunError(
        f"the run that was writing {place} has ended (it holds {key} no longer): its shard in the making is dropped, "
        "what was committed stays; the same command does the rest again"
    )


def _holder(place: Place, key: str) -> dict[str, Any]:
    """The content of the lock's file; empty if there is none or it is being written."""
    try:
        holder = parse_json(place.read(key))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _refuse(place: Place, holder: bytes, remark: str = "") -> StoreError:
    try:
        who = parse_json(holder)
        named = f" (process {who['pid']} on {who['host']})"
    except (ValueError, KeyError, TypeError):
        named = ""
    return StoreError(
        f"another writer holds {place}{named}: wait until it is done, or stop it; one writer per store{remark}"
    )


def _signature() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


class LocalLock:
    """``flock`` on a file beside the shards; the kernel releases it when the process ends."""

    def __init__(self, place: LocalPlace, owner: str, key: str = LOCK):
        self._path, self.owner = place.path(key), owner
        self._fd = -1
        with plain_errors(f"lock {place}"):
            while self._fd < 0:
                self._fd = self._try(place)

    def _try(self, place: LocalPlace) -> int:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps({**_signature(), "owner": self.owner}).encode(), 0)
                return fd
        except BlockingIOError:
            holder = os.pread(fd, 4096, 0)
            os.close(fd)
            raise _refuse(place, holder) from None
        except FileNotFoundError:
            pass  # the last owner removed the file between our open and our lock: the caller tries again
        os.close(fd)
        return -1

    def confirm(self) -> None:
        """Nothing to check: the kernel keeps the lock for us."""

    def release(self) -> None:
        """Remove the file while we still hold the lock, then release it."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._fd)
            self._fd = -1


class LeaseLock:
    """A small object, renewed every :data:`HEARTBEAT` seconds; without renewal it expires after :data:`STALE`."""

    def __init__(self, place: Place, owner: str, key: str = LOCK):
        self._place, self.owner, self._key = place, owner, key
        self._stop = threading.Event()
        holder = _holder(place, key)
        if holder and time.time() - holder.get("renewed", 0) < STALE:
            remark = f" (if it died, its lease runs out {STALE:.0f} seconds after its last sign of life)"
            raise _refuse(place, json.dumps(holder).encode(), remark)
        self._renew()
        self.confirm()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="store-lease")
        self._thread.start()

    def _renew(self) -> None:
        lease = {**_signature(), "owner": self.owner, "renewed": time.time()}
        self._place.replace(self._key, json.dumps(lease).encode())

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # one missed renewal does no harm; confirm() decides at a commit
                if _holder(self._place, self._key).get("owner", self.owner) == self.owner:
                    self._renew()

    def confirm(self) -> None:
        """Read the lease and compare its owner."""
        confirm_owner(self._place, self.owner, self._key)

    def release(self) -> None:
        """Stop renewing, and delete the lease if it is still ours; if the store is unreachable, it will expire."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()  # a renewal after the removal would create the lease again
            with contextlib.suppress(StoreError):
                if _holder(self._place, self._key).get("owner") == self.owner:
                    self._place.remove(self._key)
