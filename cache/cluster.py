"""Dask clusters: one that is already running, with one clear sentence for every way in which that fails, or workers of
this machine.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
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


@contextmanager
def local_cluster(workers: int) -> Iterator[Any]:
    """A Dask client of as many processes of this machine, each with one thread of tasks.

    Raises:
        MissingPackageError: Dask is not installed.

    """
    needs("dask", "distributed", extra="cluster", what="--workers")
    import dask.config
    from distributed import Client, LocalCluster

    # Only on this machine, without the dashboard. Its server still opens a port: let it take any free one, since Dask
    # warns if the default 8787 is taken.
    options: dict[str, Any] = {"host": "127.0.0.1", "protocol": "tcp", "dashboard_address": "127.0.0.1:0"}
    options |= {"scheduler_kwargs": {"dashboard": False}, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    with dask.config.set({"distributed.scheduler.allowed-failures": 10}):
        with _ctrl_c_blocked():
            cluster = LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, **options)
        with cluster, Client(cluster) as client:
            yield client


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Block Ctrl-C in all threads and processes that are started inside.

    A terminal sends Ctrl-C to every process; only this one shall react to it.
    """
    resource_tracker.ensure_running()  # start it now: starting it later would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def own_device(device: str) -> str:
    """On a worker: its GPU. The workers of a local cluster are numbered, and are divided among the GPUs."""
    import torch
    from distributed import get_worker

    name = str(get_worker().name)
    if device == "cuda" and torch.cuda.device_count() > 1 and name.isdigit():
        return f"cuda:{int(name) % torch.cuda.device_count()}"
    return device
