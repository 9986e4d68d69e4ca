"""Errors of the operating system as one sentence with a remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import ResourceError, StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER = {errno.ENOTDIR, errno.EEXIST}


@contextmanager
def plain_errors(doing: str) -> Iterator[None]:
    """Replace the OSErrors that a user can resolve by ours; others (a missing file, for example) pass unchanged.

    Raises:
            ResourceError: the disk or quota is full, or the file would be larger than allowed.
        StoreError: permission is missing, the file system is read-only, a file is where a folder should be, or a name
            is too long.

    """
    try:
        yield
    except OSError as problem:
        if problem.errno in _FULL:
            raise ResourceError(
                f"the disk is full: cannot {doing} ({problem.strerror}); free some space and run the same command "
                "again, what was committed stays"
            ) from problem
        if problem.errno in _FORBIDDEN:
            raise StoreError(
                f"cannot {doing}: {problem.strerror}; make it accessible to this user or choose another place"
            ) from problem
        if problem.errno in _NO_FOLDER:
            raise StoreError(f"cannot {doing}: a file lies where a folder should be; choose another place") from problem
        if problem.errno == errno.ENAMETOOLONG:
            raise StoreError(f"cannot {doing}: {problem.strerror}; choose a shorter name") from problem
        raise
