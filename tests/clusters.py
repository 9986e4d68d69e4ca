"""A Dask scheduler with its worker in a process of its own: one to be reached by address, and to be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLUSTER = """
from distributed import LocalCluster
{prepare}
options = dict(host="127.0.0.1", protocol="tcp", dashboard_address=None, memory_limit=0, silence_logs=60)
with LocalCluster(n_workers={workers}, threads_per_worker=1, processes={workers} > 1, **options) as cluster:
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
    command = [sys.executable, "-c", _CLUSTER.format(prepare=prepare, workers=workers)]
    with subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()
