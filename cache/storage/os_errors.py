"""What the operating system says, as one sentence with a remedy."""

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
    """Turn a full disk, a forbidden folder and a file in a folder's place into ours; other OSErrors (a missing file,
    say) pass.

    Raises:
        ResourceError: no space, quota used up, or the file would be larger than allowed.
        StoreError: no permission, a read-only file system, a file where a folder should be, or a name too long.

    """
    try:
        yield
    except OSError as problem:
        if problem.errno in _FULL:
            raise ResourceError(
                f"the disk is full: cannot {doing} ({problem.strerror}); free some space and run the "
                "same command again, "
                "what was committed stays"
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
