"""A folder on a disk whose power can be cut: which bytes and names would be there afterwards.

:class:`Disk` watches the calls by which files become durable or change their names. A cut leaves, of every file, what
was fsynced last (what was written later comes back short, as zeros, or whole), and of every folder the names that were
fsynced last or those of the moment, as the dice say. That is worse than what ext4 and xfs do, and all that POSIX
promises. Renaming a file that was not fsynced is noted in :attr:`Disk.unsynced`.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class PowerCut(BaseException):
    """The machine stops here."""


class Disk:
    """Watch everything below ``root``.

    Args:
        root: a folder; what is in it now is taken for durable.
        monkeypatch: through which the calls are watched.
        cut_at: the number of the call before which the power is cut; None: never.
        seed: of the dice.

    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, cut_at: int | None = None, seed: int = 0):
        self.root = root.resolve()
        self.cut_at, self.calls, self.is_cut = cut_at, 0, False
        self.unsynced: list[str] = []
        self._dice = random.Random(seed)
        self._synced: dict[int, tuple[int, bytes]] = {}  # inode → (mtime, content) as of its last fsync
        self._names: dict[int, dict[str, int | bytes | None]] = {}  # folder's inode → names as of its last fsync
        for folder, _, files in os.walk(self.root):
            for name in files:
                self._keep_file(Path(folder, name))
            self._keep_folder(Path(folder))
        for name in ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
            self._watch(monkeypatch, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        call: Callable[..., Any] = getattr(os, name)

        def watched(first: Any, *args: Any, **kwargs: Any) -> Any:
            path = self._path(first, kwargs.get("dir_fd", kwargs.get("src_dir_fd")))
            if self.is_cut or not path.is_relative_to(self.root):
                return call(first, *args, **kwargs)
            self.calls += 1
            if self.cut_at is not None and self.calls >= self.cut_at:
                self.is_cut = True
                raise PowerCut
            if name in ("replace", "rename"):
                target = self._path(args[0], kwargs.get("dst_dir_fd"))
                if path.is_file() and not self._is_synced(path):
                    self.unsynced.append(str(target))
                self._freeze(target)
            elif name in ("unlink", "remove", "rmdir"):
                self._freeze(path)
            found = call(first, *args, **kwargs)
            if name == "fsync":
                (self._keep_folder if path.is_dir() else self._keep_file)(path)
            return found

        monkeypatch.setattr(os, name, watched)

    @staticmethod
    def _path(what: Any, folder_fd: int | None = None) -> Path:
        if isinstance(what, int):
            return Path(os.readlink(f"/proc/self/fd/{what}"))
        return Path(os.readlink(f"/proc/self/fd/{folder_fd}") if folder_fd else "", os.fspath(what)).absolute()

    def _is_synced(self, path: Path) -> bool:
        known = self._synced.get(path.stat().st_ino)
        return known is not None and known[0] == path.stat().st_mtime_ns and len(known[1]) == path.stat().st_size

    def _keep_file(self, path: Path) -> None:
        self._synced[path.stat().st_ino] = (path.stat().st_mtime_ns, path.read_bytes())

    def _keep_folder(self, path: Path) -> None:
        self._names[path.stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}

    def _freeze(self, path: Path) -> None:
        """A file is about to vanish: where its name is durable, keep its content: its inode will be used again."""
        if not path.exists():
            return
        inode = path.stat().st_ino
        content = None if path.is_dir() else self._content(path)
        for names in self._names.values():
            for name, known in names.items():
                if known == inode:
                    names[name] = content
        self._synced.pop(inode, None)
        if path.is_dir():
            self._names.pop(inode, None)

    def _content(self, path: Path) -> bytes:
        known, now = self._synced.get(path.stat().st_ino), path.read_bytes()
        if self._is_synced(path):
            return now
        kept = known[1] if known is not None and now.startswith(known[1]) else b""
        return self._dice.choice([kept, kept + bytes(len(now) - len(kept)), now])

    def survivors(self, target: Path) -> None:
        """Write what the cut leaves of the root into ``target``."""
        shutil.rmtree(target, ignore_errors=True)
        self._write(self.root, target)

    def _write(self, folder: Path, target: Path) -> None:
        target.mkdir(parents=True)
        now: dict[str, int | bytes | None] = {entry.name: entry.inode() for entry in os.scandir(folder)}
        durable = self._names.get(folder.stat().st_ino, {})
        there = {entry.inode(): Path(entry.path) for entry in os.scandir(folder)}
        for name, what in self._dice.choice([durable, now]).items():
            if isinstance(what, bytes):
                (target / name).write_bytes(what)
            elif what is None:
                (target / name).mkdir()
            elif there[what].is_dir():
                self._write(there[what], target / name)
            else:
                (target / name).write_bytes(self._content(there[what]))
