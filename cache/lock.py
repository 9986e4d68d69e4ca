"""One writer per store. Locally a lock the kernel drops with its owner; on an object store a lease that runs out.

Limits, said where they matter (docs/FORMAT.md): a lease is only as exclusive as the object store's conditional put. Where there
is none, two writers starting within the same instant can both believe they hold it; the loser finds out at its next commit.
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

from ..errors import StoreError
from .errnos import plain_errors
from .local import LocalPlace
from .places import Place

LOCK = "activations/writer.lock"
HEARTBEAT, STALE = 20.0, 90.0  # seconds between renewals of a lease, and after which it counts as dead


class Lock(Protocol):
    """Exclusive right to write a store."""

    def confirm(self) -> None:
        """Raise StoreError if somebody else holds it now."""
        ...

    def release(self) -> None:
        """Give it up; harmless the second time."""
        ...


def acquire(place: Place) -> Lock:
    """Take the writer's lock of a store.

    Raises:
        StoreError: another live writer holds it, or the folder cannot be written.

    """
    return LocalLock(place) if isinstance(place, LocalPlace) else LeaseLock(place)


def _refuse(place: Place, holder: bytes, remark: str = "") -> StoreError:
    try:
        who = json.loads(holder)
        named = f" (process {who['pid']} on {who['host']})"
    except (ValueError, KeyError, TypeError):
        named = ""
    return StoreError(f"another writer holds {place}{named}: wait until it is done, or stop it; one writer per store{remark}")


def _signature() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


class LocalLock:
    """``flock`` on a file beside the shards: the kernel releases it however the writer ends."""

    def __init__(self, place: LocalPlace):
        self._path = place.path(LOCK)
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
                os.pwrite(fd, json.dumps(_signature()).encode(), 0)
                return fd
        except BlockingIOError:
            holder = os.pread(fd, 4096, 0)
            os.close(fd)
            raise _refuse(place, holder) from None
        except FileNotFoundError:
            pass  # its last owner removed it between our open and our lock: try the new one
        os.close(fd)
        return -1

    def confirm(self) -> None:
        """The kernel keeps it for us."""

    def release(self) -> None:
        """Remove the file while it is still ours, then let go."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._fd)
            self._fd = -1


class LeaseLock:
    """A small object renewed every :data:`HEARTBEAT` seconds; a dead writer's lease is free after :data:`STALE`."""

    def __init__(self, place: Place):
        self._place = place
        self._owner = uuid.uuid4().hex
        self._stop = threading.Event()
        holder = self._holder()
        if holder and time.time() - holder.get("renewed", 0) < STALE:
            remark = f" (if it died, its lease runs out {STALE:.0f} seconds after its last sign of life)"
            raise _refuse(place, json.dumps(holder).encode(), remark)
        self._renew()
        self.confirm()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="store-lease")
        self._thread.start()

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._place.read(LOCK))
        except (FileNotFoundError, ValueError):
            return None

    def _renew(self) -> None:
        lease = {**_signature(), "owner": self._owner, "renewed": time.time()}
        self._place.replace(LOCK, json.dumps(lease).encode())

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # a missed beat is not the end; confirm() decides at the next commit
                holder = self._holder()
                if holder is None or holder.get("owner") == self._owner:
                    self._renew()

    def confirm(self) -> None:
        """Read the lease back."""
        holder = self._holder() or {}
        if holder.get("owner") != self._owner:
            raise StoreError(f"another writer took over {self._place} while this one was silent: let it go on, nothing is lost")

    def release(self) -> None:
        """Stop renewing and delete the lease if it is still ours; out of reach, it runs out by itself."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()  # a beat at this moment would bring back what is removed
            with contextlib.suppress(StoreError):
                if (self._holder() or {}).get("owner") == self._owner:
                    self._place.remove(LOCK)
