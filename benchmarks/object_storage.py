"""Reading a store from object storage, against what fsspec itself delivers of the same bytes, in one run.

    python benchmarks/object_storage.py                       # 0.5 GB, an HTTP server on loopback that waits 20 ms
    python benchmarks/object_storage.py --gb 0.2 --latency-ms 5
    python benchmarks/object_storage.py --url s3://bucket/prefix   # a real bucket: writes there, and removes it again

The server answers ranges of files after a pause, as object storage does; it stands for the protocol and the latency,
not for the bandwidth of a network. ``fsspec`` asks for the same byte ranges with its own ``cat_ranges``, all of a read
at once. ``store`` is ``ActivationStore.read_chunks``: every hash compared, into memory that is there. ``kept`` reads
again through a local cache that holds all of it. Groups of chunks are read in a random order; both sides get the same
groups in turns. The last line is JSON: medians in GB/s, and the ratios as medians over turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tcsae.cache.format.layout import plan_layout
from tcsae.cache.format.zarr_documents import shard_key
from tcsae.cache.storage.local_cache import LocalCache
from tcsae.cache.store import ActivationStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
CONTEXT, GROUP = 128, 16  # positions; chunks per read


def make(gb: float, folder: Path) -> Path:
    """A store of Gemma-2-2b's width with smaller shards, so that a small one has several."""
    from stores import make_activations, make_block, make_manifest, write_rows
    from tcsae.cache.writer import StoreSetWriter

    layout = plan_layout(2304, CONTEXT, shard_bytes=64_000_000)
    rows = max(layout.shard_rows, round(gb * 1e9 / (2 * 2304 * CONTEXT)) // layout.shard_rows * layout.shard_rows)
    block = make_block(rows, CONTEXT)
    manifest = make_manifest(layer=0, layout=layout, planned_rows=rows)
    with StoreSetWriter.open({0: str(folder / "l0.zarr")}, {0: manifest}) as writer:
        write_rows(writer, block, {0: make_activations(block, 2304, layer=0)})
    return folder / "l0.zarr"


def serve(folder: str, latency: float, port: Any) -> None:
    """Run the server; for a process of its own."""
    from aiohttp import web

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(latency)
        path = Path(folder) / request.match_info["name"]
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/{name:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server: Any = site._server
        port.put(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(main())


@contextmanager
def served(folder: Path, latency: float) -> Iterator[str]:
    """Address of a server of the folder."""
    spawn = multiprocessing.get_context("spawn")
    port = spawn.Queue()
    process = spawn.Process(target=serve, args=(str(folder), latency, port), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port.get(timeout=60)}"
    finally:
        process.terminate()


@contextmanager
def uploaded(folder: Path, url: str) -> Iterator[str]:
    """The folder's files under a URL, for as long as the block lasts."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    for path in (one for one in folder.rglob("*") if one.is_file()):
        fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())
    try:
        yield url
    finally:
        fs.rm(root, recursive=True)


class Reads:
    """Groups of chunks in a random order, and the ways to read them."""

    def __init__(self, url: str, kept: Path):
        import fsspec

        self.store = ActivationStore.open(url)
        limit = 2 * 16 * max(self.store.n_bytes, 16 * self.store.layout.chunk_bytes)
        self.again = ActivationStore.open(url, cache=LocalCache(limit, str(kept)))
        self._fs, self._root = fsspec.core.url_to_fs(url)
        order = np.random.default_rng(0).permutation(self.store.n_chunks)
        self.groups = [order[at : at + GROUP].tolist() for at in range(0, len(order), GROUP)]
        rows = GROUP * self.store.chunk_rows
        self._out = torch.empty((rows, self.store.context, self.store.d_model), dtype=torch.bfloat16)
        self.bytes = self.store.n_rows * self.store.context * self.store.d_model * 2
        self._ranges = [[self._range(chunk) for chunk in group] for group in self.groups]

    def _range(self, chunk: int) -> tuple[str, int, int]:
        """Path, begin and end of a chunk; its index is in memory from here on."""
        shard, within = divmod(chunk, self.store.layout.shard_chunks)
        rows = self.store.layout.rows_of(shard, self.store.n_rows)
        begin, length = (int(x) for x in self.store._reader._index(shard, len(rows))[within])
        return f"{self._root}/{shard_key('activations', shard)}", begin, begin + length

    def fsspec(self) -> None:
        """The same ranges, by fsspec alone."""
        for group in self._ranges:
            paths, begins, ends = map(list, zip(*group, strict=True))
            found = self._fs.cat_ranges(paths, begins, ends)
            if sum(map(len, found)) != sum(ends) - sum(begins):
                raise RuntimeError("fsspec read something else")

    def direct(self) -> None:
        """Through the store."""
        for group in self.groups:
            self.store.read_chunks(group, self._out)

    def kept(self) -> None:
        """Through the store and its local cache."""
        for group in self.groups:
            self.again.read_chunks(group, self._out)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.5)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--url", help="a bucket and prefix in the place of the server")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = make(asked.gb, Path(place) / "store")
        far = uploaded(folder, asked.url) if asked.url else served(folder, asked.latency_ms / 1000)
        with far as url:
            reads = Reads(url, Path(place) / "kept")
            reads.kept()  # fills the cache
            found: dict[str, list[float]] = {"fsspec": [], "direct": [], "kept": []}
            for _ in range(asked.repeats):
                for name, speeds in found.items():
                    began = time.perf_counter()
                    getattr(reads, name)()
                    speeds.append(reads.bytes / 1e9 / (time.perf_counter() - began))
    record = {
        "gb": reads.bytes / 1e9,
        "latency_ms": None if asked.url else asked.latency_ms,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "gb_per_s": {name: statistics.median(speeds) for name, speeds in found.items()},
        "of_fsspec": {
            name: statistics.median(mine / theirs for mine, theirs in zip(found[name], found["fsspec"], strict=True))
            for name in ("direct", "kept")
        },
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
