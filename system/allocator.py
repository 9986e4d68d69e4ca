"""Freed memory that stays with the process for as long as it does the same thing over and over.

A step allocates tens of megabytes and frees them again. The C library hands blocks of that size back to the system at
once, and the next step gets them as new pages, each of which faults and is filled with zeros: on two cores a fifth of a
training step (benchmarks/README.md). A caching allocator, as CUDA's tensors have one, is what a CPU lacks.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h of glibc
# What a process that has allocated large blocks ends up with by itself; once set, glibc no longer adapts them.
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}
_lock = Lock()
_inside = 0
"""How many contexts are open, in all threads."""


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Inside, freed memory is reused and not given back to the system; at the end it is given back.

    Only for what allocates the same again and again: elsewhere the process would stay as large as it ever was. Contexts
    may lie inside one another. Does nothing where the C library is not glibc.
    """
    global _inside
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is None:
        yield
        return
    with _lock:
        _inside += 1
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for option, value in _USUAL.items():
                    libc.mallopt(option, value)
                libc.malloc_trim(ctypes.c_size_t(0))
