"""Connecting to a Dask cluster that is already running, with one clear sentence for every way in which that fails."""

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

    ``instead`` completes the error message when no scheduler answers ("use --workers"). ``then`` completes the one
    when the connection is lost inside the block: what was kept and how to continue.

    Raises:
        ResourceError: no scheduler answers, it has no workers, the connection is lost inside the block, or a task
            killed several workers.

    """
    needs("dask", "distributed", extra="cluster", what="--scheduler")
    from distributed import Client, KilledWorker
    from distributed.client import FutureCancelledError
    from distributed.comm.core import CommClosedError

    with _silent_dask_logs():
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
def _silent_dask_logs() -> Iterator[None]:
    """Silence Dask's client, which logs a lost connection in about a hundred lines; our error is one sentence."""
    from distributed.utils import silence_logging_cmgr

    with (
        silence_logging_cmgr(logging.CRITICAL, "distributed"),
        silence_logging_cmgr(logging.CRITICAL, "distributed.client"),
    ):
        yield
