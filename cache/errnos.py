"""What the operating system says, as one sentence with a remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ResourceError, StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def plain_errors(doing: str) -> Iterator[None]:
    """Turn a full disk and a forbidden folder into ours; every other OSError (a missing file, say) passes.

    Raises:
        ResourceError: no space, quota used up, or the file would be larger than allowed.
        StoreError: no permission, or a read-only file system.

    """
    try:
        yield
    except OSError as problem:
        if problem.errno in _FULL:
            raise ResourceError(
                f"the disk is full: cannot {doing} ({problem.strerror}); free some space and run the same command again, "
                "what was committed stays"
            ) from problem
        if problem.errno in _FORBIDDEN:
            raise StoreError(
                f"cannot {doing}: {problem.strerror}; make it accessible to this user or choose another place"
            ) from problem
        raise
