"""A Dask cluster that somebody else runs: reached, or lost in the middle, with one sentence for either."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ResourceError, needs

CONNECT_SECONDS = 15


@contextmanager
def connected(address: str, *, instead: str, then: str) -> Iterator[Any]:
    """A Dask client of the scheduler at ``address``.

    ``instead`` ends the sentence where none answers ("use --workers"), ``then`` that of one lost inside: what was kept,
    how to go on.

    Raises:
        ResourceError: no scheduler answers there, it has no workers, or it is lost before the block is left; or a task
            took several workers down with it.

    """
    needs("dask", "distributed", extra="cluster", what="--scheduler")
    from distributed import Client, KilledWorker
    from distributed.client import FutureCancelledError
    from distributed.comm.core import CommClosedError

    with _our_words_only():
        try:
            client = Client(address, timeout=CONNECT_SECONDS)
        except (OSError, TimeoutError, ValueError) as problem:
            start = "start one with `dask scheduler`"
            raise ResourceError(f"no Dask scheduler answers at {address}: {start}, or {instead}") from problem
        try:
            with client:
                if not client.nthreads():
                    start = f"start some with `dask worker {address}`"
                    raise ResourceError(f"the Dask scheduler at {address} has no workers: {start}")
                yield client
        except (FutureCancelledError, CommClosedError) as lost:
            raise ResourceError(
                f"the Dask scheduler at {address} was lost in the middle ({_reason(lost)}): {then}"
            ) from lost
        except KilledWorker as lost:
            many = "a task took every worker that tried it down with it, most likely out of memory"
            raise ResourceError(f"{many}: give the workers of {address} more of it") from lost


def _reason(lost: Exception) -> str:
    return str(getattr(lost, "reason", None) or "connection closed").replace("-", " ")


@contextmanager
def _our_words_only() -> Iterator[None]:
    """Dask's client logs a lost connection in a hundred lines; here it is one sentence."""
    from distributed.utils import silence_logging_cmgr

    with (
        silence_logging_cmgr(logging.CRITICAL, "distributed"),
        silence_logging_cmgr(logging.CRITICAL, "distributed.client"),
    ):
        yield
