"""How much memory is free, on the machine and in the container that this process runs in, and how much was held."""

from __future__ import annotations

import os
import resource
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TcsaeError

if TYPE_CHECKING:
    import torch

# What torch says where it has no exception of its own for it.
_WORDS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def free_memory() -> int:
    """Bytes that can be allocated now without swapping."""
    return max(0, min(_machine(), _container()))


def _machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container() -> int:
    """What a control group (version 2) leaves, where there is one; pages of files that it would give up are free."""
    group = Path("/sys/fs/cgroup")
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        given_up = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + given_up
    except (OSError, ValueError, StopIteration):
        return 1 << 62


def held_memory(device: torch.device) -> int:
    """Bytes held now: on the GPU where there is one, else by the process (where there is no /proc: the most so far)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS")


def tensor_bytes(holder: object) -> int:
    """Bytes of the tensors and arrays in an object's attributes, and in theirs; each is counted once."""
    known: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [holder]
    while waiting:
        one: Any = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if hasattr(one, "untyped_storage"):
            known[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif hasattr(one, "__array_interface__"):
            known[one.__array_interface__["data"][0]] = one.nbytes
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple | set | deque):
            waiting += one
        elif not isinstance(one, type):
            waiting += vars(one).values() if hasattr(one, "__dict__") else ()
    return sum(known.values())


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on the GPU where there is one, else by the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM")


def _of_process(what: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
    except (OSError, StopIteration):
        # On Linux this would include what the process held that started this one: exec() hands it on.
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether an allocation failed: on the GPU, on the CPU by torch, or on the CPU by Python and NumPy."""
    import torch

    if isinstance(failure, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(failure, TcsaeError):  # a plug-in's failure is told in a sentence; what it was is its cause
        return failure.__cause__ is not None and is_out_of_memory(failure.__cause__)
    return isinstance(failure, RuntimeError) and any(words in str(failure) for words in _WORDS)
