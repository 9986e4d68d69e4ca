"""Files that are written whole: a reader sees the old file or the new one, and a power cut leaves one of the two.

``NAME.TOKEN.partial`` is written, fsynced, renamed, and the folder is fsynced; so what a later file vouches for is on
the disk before that file is. Whatever writes the content gets a Python file, so that a full disk is an OSError also
where a library (torch, safetensors) would call it something else; every OSError becomes one sentence with a remedy.
"""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ResourceError, RunError

PARTIAL = ".partial"  # suffix of a file in the making
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
NO_FOLDER = frozenset({errno.ENOTDIR, errno.EEXIST})

Content = bytes | str | Callable[[BinaryIO], object]


def write_file(path: str | Path, content: Content) -> Path:
    """Write a file whole and durably, in a folder that is made if it is not there.

    Args:
        path: the file; one that is there is replaced.
        content: bytes, text (written as UTF-8), or a function that writes into the binary file it is given.

    Returns:
        The path. When this returns, the file survives a power cut; when it raises, no partial file is left.

    Raises:
        ResourceError: no space, a quota used up, or the file would be larger than allowed.
        RunError: the folder or the file cannot be written for another reason.

    """
    path = Path(path)
    with plain_errors(f"write {path}"):
        make_folder(path.parent)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            _fill(partial, content)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return path


def write_json(path: str | Path, content: Any, *, indent: int = 2, ascii_only: bool = True) -> Path:
    """:func:`write_file` of JSON; ``ascii_only`` for files that other programs open in whatever encoding they like.

    Raises:
        ResourceError, RunError: as :func:`write_file`.
        ValueError: a number in it is not finite.

    """
    return write_file(path, json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=ascii_only) + "\n")


def make_folder(folder: str | Path) -> Path:
    """Make a folder and its parents, durably, if they are not there.

    Raises:
        ResourceError, RunError: as :func:`write_file`.

    """
    folder = Path(folder)
    with plain_errors(f"make the folder {folder}"):
        if not os.path.isdir(folder):
            missing = [path for path in (folder, *folder.parents) if not os.path.isdir(path)]
            folder.mkdir(parents=True, exist_ok=True)
            for made in missing:
                sync_folder(made.parent)
    return folder


def sync_folder(folder: str | Path) -> None:
    """Make new names, renames and removals inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partials(folder: str | Path, *, older_than: float = 0.0) -> None:
    """Remove what a killed process left half written.

    Args:
        folder: where to look; not inside its folders.
        older_than: seconds since they were written to; above 0 where another process may just be writing one.

    """
    for partial in Path(folder).glob(f"*{PARTIAL}"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime >= older_than:
                partial.unlink()


@contextmanager
def plain_errors(doing: str) -> Iterator[None]:
    """Turn an OSError inside into one sentence: what could not be done, why, and the remedy.

    Args:
        doing: what is being done, as the sentence goes on after "cannot" ("write runs/a/train.json").

    Raises:
        ResourceError: no space, a quota used up, or a file would be larger than allowed.
        RunError: any other OSError.

    """
    try:
        yield
    except OSError as failure:
        reason = failure.strerror or str(failure) or type(failure).__name__
        if failure.errno in FULL:
            remedy = "free some space and run the same command again, what was finished stays"
            raise ResourceError(f"the disk is full: cannot {doing} ({reason}); {remedy}") from failure
        raise RunError(f"cannot {doing}: {reason}; {_remedy(failure.errno)}") from failure


def _remedy(number: int | None) -> str:
    if number in FORBIDDEN:
        return "make it writable for this user, or choose another place"
    if number in NO_FOLDER or number == errno.EISDIR:
        return "a file and a folder go by the same name, choose another place"
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    return "check the disk, or choose another place"


def _fill(partial: Path, content: Content) -> None:
    """Write and fsync a new file."""
    raw = _Remembering(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")
    try:
        with io.BufferedWriter(raw) as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except Exception as failure:
        if raw.failure is not None and not isinstance(failure, OSError):
            raise raw.failure from failure
        raise


class _Remembering(io.FileIO):
    """Keeps the first OSError of a write: libraries replace it with an error of their own that no longer says why."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as failure:
            self.failure = self.failure or failure
            raise
