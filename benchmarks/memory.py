"""Memory stays constant while a store several times larger than it is read, in order and in shuffled windows.

    python benchmarks/memory.py                 # 64 GB of Gemma-2-2b-shaped activations in 0.6 GB of disk
    python benchmarks/memory.py --gb 4

A separate process writes two different shards; all others are hard links to one of them, each with its own commit line,
so that every read compares a real hash. The store is then read once in order (``ActivationStore.iter_rows``) and once
as an epoch of windows of 5 (``TokenStream``). The result is the peak of the process's own memory in each tenth of the
reading (RssAnon of /proc/self/status, sampled every 10 ms); the page cache is not part of it. Since all shards are the
same two files, they are in the page cache, and the speeds are those of memory, not of a disk. Prints a JSON record; MB
and GB are decimal. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tcsae.cache.format.layout import plan_layout
from tcsae.cache.store import ActivationStore
from tcsae.cache.stream import TokenStream
from tcsae.cache.views import Windows
from tcsae.cache.writer import StoreSetWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
CONTEXT, DISTINCT, PARTS = 128, 2, 10


def build(path: Path, gb: float, d_model: int) -> None:
    """A store of ``gb`` GB of activations, of which only ``DISTINCT`` shards take space on the disk."""
    from stores import make_block, make_manifest, tile_store

    layout = plan_layout(d_model, CONTEXT)
    size, rows = layout.shard_rows, DISTINCT * layout.shard_rows
    block = make_block(rows, CONTEXT)
    normal = torch.Generator().manual_seed(0)
    with StoreSetWriter.open({0: path}, {0: make_manifest(layer=0, layout=layout, planned_rows=rows)}) as writer:
        for low in range(0, rows, 16):
            x_BTD = torch.randn(16, CONTEXT, d_model, generator=normal).bfloat16()
            writer.append(block.slice(low, low + 16), {0: x_BTD.view(torch.uint16).numpy()})
            if (low + 16) % size == 0:
                writer.commit({"row": low + 16})
        writer.finish()
    tile_store(path, max(DISTINCT, round(gb * 1e9 / layout.shard_bytes)))


def own_bytes() -> int:
    """Memory that belongs to this process alone: not backed by a file, and not the page cache."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peaks:
    """The peak of :func:`own_bytes` in every tenth of the reading, sampled by a thread."""

    def __init__(self):
        self.way, self._peaks, self._stop = 0.0, np.zeros(PARTS), threading.Event()

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            part = min(int(self.way * PARTS), PARTS - 1)
            self._peaks[part] = max(self._peaks[part], own_bytes())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample inside the block."""
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def facts(self, read: float, seconds: float) -> dict[str, object]:
        """Peak MB in each tenth, the growth after the second tenth, and the speed.

        The second tenth is the reference, since the first one begins with empty buffers. ``read`` is in GB.
        """
        peaks = (self._peaks / 1e6).round().astype(int).tolist()
        speed = {"gb_read": round(read, 1), "gb_per_s": round(read / seconds, 1)}
        return {"peak_mb_by_tenth": peaks, "grown_mb": max(peaks[2:]) - peaks[1], **speed}


def in_order(store: ActivationStore) -> dict[str, object]:
    """Read all rows, 64 at a time."""
    peaks, done, began = Peaks(), 0, time.perf_counter()
    with peaks.watched():
        for x_BTD in store.iter_rows(64):
            done += len(x_BTD)
            peaks.way = done / store.n_rows
    return peaks.facts(done * store.context * store.d_model * 2 / 1e9, time.perf_counter() - began)


def shuffled(store: ActivationStore) -> dict[str, object]:
    """Read one epoch of windows."""
    peaks, done, began = Peaks(), 0, time.perf_counter()
    with TokenStream(store, [Windows(5)], tokens_per_batch=2048, seed=0) as stream, peaks.watched():
        while stream.epoch == 0:
            done += stream.next_batches()[0].x_NWD.numel() * 2
            peaks.way = done / (store.n_tokens * store.d_model * 2)
    return peaks.facts(done / 1e9, time.perf_counter() - began)


def main() -> None:
    """Build, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=64)
    parser.add_argument("--d-model", type=int, default=2304)
    parser.add_argument("--folder", type=Path, help="where to put the store; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "l0.zarr"
        writer = multiprocessing.get_context("spawn").Process(target=build, args=(path, options.gb, options.d_model))
        writer.start()
        writer.join()
        files = {(s := file.stat()).st_ino: s.st_blocks * 512 for file in path.rglob("*") if file.is_file()}
        before = own_bytes()
        store = ActivationStore.open(path)
        record = {
            "what": "memory",
            "gb_of_activations": round(store.n_tokens * store.d_model * 2 / 1e9, 1),
            "gb_on_disk": round(sum(files.values()) / 1e9, 2),
            "gb_of_ram": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "shards": store.layout.shards_for(store.n_rows),
            "mb_before": round(before / 1e6),
            "mb_opened": round(own_bytes() / 1e6),
            "in_order": in_order(store),
            "shuffled": shuffled(store),
        }
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }
    machine |= {name: version(name) for name in ("torch", "numpy")}
    print(json.dumps(record | {"machine": machine}))


if __name__ == "__main__":
    main()
