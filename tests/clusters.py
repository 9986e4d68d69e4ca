"""A Dask scheduler with its worker in a process of its own: one to be reached by address, and to be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of every LocalCluster of the tests: on this machine alone, and each of its ports is any free one. Without
# ``dashboard_address`` Dask takes 8787 even with no dashboard, and warns if another process has it.
LOCAL = {
    "threads_per_worker": 1, "host": "127.0.0.1", "protocol": "tcp", "dashboard_address": "127.0.0.1:0",
    "scheduler_kwargs": {"dashboard": False}, "memory_limit": 0, "silence_logs": 60,
}  # fmt: skip
_CLUSTER = """
from distributed import LocalCluster
{prepare}
with LocalCluster(n_workers={workers}, processes={workers} > 1, **{options}) as cluster:
    print(cluster.scheduler_address, flush=True)
    input()
"""


@contextmanager
def cluster_elsewhere(
    prepare: str = "", folder: Path | None = None, workers: int = 1
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Address and process of a cluster whose one worker ran ``prepare`` (Python) first, in ``folder`` if given.

    Several ``workers`` are processes of their own.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    command = [sys.executable, "-c", _CLUSTER.format(prepare=prepare, workers=workers, options=LOCAL)]
    with subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()
