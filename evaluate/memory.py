"""Out of memory, on whatever device: how it is recognised, and the one sentence that it becomes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import ResourceError

# What torch says where it has no exception of its own for it.
_WORDS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether an allocation failed: on the GPU, on the CPU by torch, or on the CPU by Python and NumPy."""
    if isinstance(failure, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(failure, RuntimeError) and any(words in str(failure) for words in _WORDS)


@contextmanager
def within_memory(batch_rows: int) -> Iterator[None]:
    """Measuring, SAE by SAE in the end: what then still does not fit is a batch of ``batch_rows`` rows.

    Raises:
        ResourceError: an allocation failed inside.

    """
    try:
        yield
    except Exception as failure:
        if not is_out_of_memory(failure):
            raise
        rows = f"{batch_rows} row{'' if batch_rows == 1 else 's'}"
        remedy = "give a smaller --batch-size" if batch_rows > 1 else "try another --device, or one SAE at a time with --run"
        raise ResourceError(
            f"out of memory with batches of {rows}, one SAE at a time: {remedy}; rows that are finished are kept"
        ) from failure


def release() -> None:
    """Give back to the device what a failed pass held."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
