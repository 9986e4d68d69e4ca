"""The cache against the limits of the machine and against other software, in one run on the same data.

    python benchmarks/cache.py                  # 2.4 GB of Gemma-2-2b-shaped activations, a few minutes
    python benchmarks/cache.py --gb 0.3 --repeats 2

Reading: whole chunks in order and at random through ``ActivationStore.read_chunks`` (every hash compared) and windows
through ``TokenStream``, against raw ``preadv`` of the same bytes into a page-aligned buffer, allocated before, with the
same number of threads; and the latency of a single row. Writing: the store against raw write + fsync of the same bytes.
Other software: reading with zarr-python, appending blocks of rows with zarr-python, and a float32 Arrow cache as
SAELens uses. The files are in the page cache when they are read. ``mixing`` is the probability that neighbours in a
batch come from one row, divided by that of a perfect shuffle. Prints one JSON record: medians, and ratios as medians
over turns (since the machine's own speed changes). GB always means GB of bfloat16 values, even for a format that stores
float32.
"""

from __future__ import annotations

import argparse
import json
import mmap
import operator
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tcsae.cache.format.layout import RowBlock, plan_layout
from tcsae.cache.format.shard_reader import read_pool
from tcsae.cache.store import ActivationStore
from tcsae.cache.stream import TokenStream
from tcsae.cache.views import Windows
from tcsae.cache.writer import StoreSetWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
CONTEXT, BLOCK_ROWS, GROUP = 128, 64, 8  # positions; rows per append of zarr-python; chunks per read


def seconds(work: Callable[[], object]) -> float:
    """Time that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def turns(repeats: int, **ways: Callable[[], float]) -> dict[str, list[float]]:
    """The results of each candidate, ``repeats`` times, in turns, so that all see the same state of the machine."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
    return found


def aligned(n: int) -> np.ndarray:
    """Page-aligned bytes; every page has been touched."""
    buffer = np.frombuffer(mmap.mmap(-1, n), np.uint8)
    buffer[:: mmap.PAGESIZE] = 1
    return buffer


def activations(rows: int, d_model: int) -> np.ndarray:
    """bfloat16 bits of normally distributed values; a few different rows, repeated."""
    x = torch.randn(min(rows, 64), CONTEXT, d_model, generator=torch.Generator().manual_seed(0))
    bits = (x * 3 + 1).bfloat16().view(torch.uint16).numpy()
    return np.concatenate([bits] * -(-rows // len(bits)))[:rows]


class Data:
    """The rows that all candidates store."""

    def __init__(self, gb: float, d_model: int):
        self.layout = plan_layout(d_model, CONTEXT)
        shards = max(1, round(gb * 1e9 / self.layout.shard_bytes))
        self.rows = shards * self.layout.shard_rows
        self.shard = activations(self.layout.shard_rows, d_model)  # every shard holds the same
        zeros = np.zeros((self.layout.shard_rows, CONTEXT), np.int32)
        flags = np.zeros(zeros.shape, np.uint8)
        flags[:, 0] = 1
        self.block = RowBlock(zeros, zeros, flags)
        self.bytes = self.rows * self.layout.bytes_per_row


def write_store(data: Data, folder: Path, layers: int = 1) -> float:
    """GB/s of our writer, fsync included."""
    from stores import make_manifest

    about = {n: make_manifest(layer=n, layout=data.layout, planned_rows=data.rows) for n in range(layers)}
    paths = {n: folder / f"l{n}.zarr" for n in range(layers)}

    def work() -> None:
        with StoreSetWriter.open(paths, about, fresh=True) as writer:
            for shard in range(data.rows // data.layout.shard_rows):
                for low in range(0, data.layout.shard_rows, 16):
                    part = data.shard[low : low + 16]
                    writer.append(data.block.slice(low, low + len(part)), dict.fromkeys(paths, part))
                writer.commit({"shard": shard})
            writer.finish()

    return layers * data.bytes / seconds(work) / 1e9


def write_raw(data: Data, folder: Path, layers: int = 1) -> float:
    """GB/s of write + fsync of the same bytes into files of the size of a shard, 16 rows per call."""

    def work() -> None:
        for shard in range(layers * data.rows // data.layout.shard_rows):
            fd = os.open(folder / f"raw{shard}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for low in range(0, data.layout.shard_rows, 16):
                os.write(fd, memoryview(data.shard[low : low + 16]).cast("B"))
            os.fsync(fd)
            os.close(fd)

    return layers * data.bytes / seconds(work) / 1e9


def append_zarr(data: Data, folder: Path, rows: int) -> float:
    """GB/s of zarr-python appending blocks of rows to a store with our layout, with fsync at the end."""
    import zarr

    source = json.loads((folder / "l0.zarr/activations/zarr.json").read_text())
    target = folder / "appended.zarr"
    target.mkdir(exist_ok=True)
    (target / "zarr.json").write_text(json.dumps(source | {"shape": [rows, *source["shape"][1:]]}))
    array = zarr.open_array(str(target), mode="r+")

    def work() -> None:
        for low in range(0, rows, BLOCK_ROWS):
            array[low : low + BLOCK_ROWS] = data.shard[:BLOCK_ROWS]
        os.sync()

    return rows * data.layout.bytes_per_row / seconds(work) / 1e9


class Reads:
    """Several ways to read all chunks of one store in a given order."""

    def __init__(self, data: Data, path: Path, threads: int):
        self.data, self.store = data, ActivationStore.open(path)
        self.order = np.random.default_rng(0).permutation(self.store.n_chunks).tolist()
        size = data.layout.chunk_bytes
        memory = aligned(GROUP * size)
        self.raw = [memory[n * size : (n + 1) * size] for n in range(GROUP)]
        self.out = torch.from_numpy(aligned(GROUP * size).view(np.uint16)).view(torch.bfloat16)
        self.out = self.out.view(GROUP * data.layout.chunk_rows, CONTEXT, data.layout.d_model)
        self.pool = ThreadPoolExecutor(threads)
        shards = self.store.layout.shards_for(self.store.n_rows)
        self.files = [os.open(path / f"activations/c.{n}.0.0", os.O_RDONLY) for n in range(shards)]

    def groups(self, random: bool) -> list[list[int]]:
        """The chunks, ``GROUP`` per call."""
        order = self.order if random else sorted(self.order)
        return [order[at : at + GROUP] for at in range(0, len(order), GROUP)]

    def ours(self, random: bool) -> float:
        """GB/s of read_chunks into a buffer that is used again."""

        def work() -> None:
            for group in self.groups(random):
                self.store.read_chunks(group, self.out)

        return self.data.bytes / seconds(work) / 1e9

    def pread(self, random: bool) -> float:
        """GB/s of preadv of the same chunks with the same number of threads, without checks."""
        layout = self.data.layout

        def one(chunk: int, buffer: np.ndarray) -> None:
            shard, within = divmod(chunk, layout.shard_chunks)
            os.preadv(self.files[shard], [buffer], within * (layout.chunk_bytes + 4))

        def work() -> None:
            for group in self.groups(random):
                list(self.pool.map(one, group, self.raw))

        return self.data.bytes / seconds(work) / 1e9

    def windows(self) -> float:
        """GB/s of windows of 5 in batches of 2048 tokens.

        An epoch of eight pools is measured, after one that touches the buffers for the first time.
        """
        pool = self.store.n_tokens // 8
        with TokenStream(self.store, [Windows(5)], tokens_per_batch=2048, pool_tokens=pool, seed=0) as stream:
            while stream.epoch == 0:
                stream.next_batches()
            batches, began = 0, time.perf_counter()
            while stream.epoch == 1:
                stream.next_batches()
                batches += 1
            tokens = batches * (2048 // 5 * 5)
            return tokens * self.data.layout.d_model * 2 / (time.perf_counter() - began) / 1e9

    def mixing(self) -> float:
        """Probability that neighbouring windows of a batch share a row, divided by that of a perfect shuffle."""
        with TokenStream(self.store, [Windows(5)], tokens_per_batch=2048, seed=0) as stream:
            same = pairs = 0
            while stream.epoch == 0:
                rows_N = stream.next_batches()[0].rows_N
                same, pairs = same + int((rows_N[1:] == rows_N[:-1]).sum()), pairs + len(rows_N) - 1
        per_row = (CONTEXT - 1) // 5
        return same / pairs / ((per_row - 1) / (per_row * self.store.n_rows - 1))

    def zarr(self, random: bool) -> float:
        """GB/s of zarr-python, one chunk at a time."""
        import zarr

        array = zarr.open_array(str(Path(self.store.path) / "activations"), mode="r")
        rows = self.data.layout.chunk_rows
        chunks = self.order if random else sorted(self.order)
        taken = seconds(lambda: [array[c * rows : (c + 1) * rows] for c in chunks])
        return self.data.bytes / taken / 1e9

    def point(self, n: int = 200) -> tuple[float, float]:
        """Median and 99th percentile of the milliseconds to read one random row; the hash of its chunk is compared."""
        rows = np.random.default_rng(1).integers(0, self.store.n_rows, n).tolist()
        times = sorted(seconds(lambda row=row: self.store.rows(row, row + 1)) * 1e3 for row in rows)
        return times[n // 2], times[int(n * 0.99)]


def arrow(data: Data, folder: Path, rows: int) -> Callable[[], float]:
    """GB/s of a float32 Arrow dataset of rows, read as torch batches as in SAELens; counted as GB of bfloat16."""
    import datasets

    shape = (CONTEXT, data.layout.d_model)
    floats = (data.shard[:rows].astype(np.uint32) << 16).view(np.float32)
    features = datasets.Features({"acts": datasets.Array2D(shape, "float32")})
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({"acts": floats}, features=features)
    made.save_to_disk(str(folder / "arrow"))
    stored = datasets.load_from_disk(str(folder / "arrow")).with_format("torch")

    def read() -> float:
        taken = seconds(lambda: [stored[low : low + 8]["acts"] for low in range(0, rows, 8)])
        return rows * data.layout.bytes_per_row / taken / 1e9

    return read


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Measure everything, in GB/s or milliseconds."""
    data = Data(options.gb, options.d_model)
    found = turns(
        options.repeats,
        write_store=lambda: write_store(data, folder),
        write_raw=lambda: write_raw(data, folder),
        zarr_python_append=lambda: append_zarr(data, folder, min(data.rows, data.layout.shard_rows)),
    )
    for file in folder.glob("raw*"):
        file.unlink()
    reads = Reads(data, folder / "l0.zarr", read_pool()._max_workers)
    reads.ours(random=False)  # into the page cache
    found |= turns(  # separately, since other candidates change caches and free memory for the next one
        options.repeats,
        sequential_pread=lambda: reads.pread(random=False),
        sequential=lambda: reads.ours(random=False),
        random_pread=lambda: reads.pread(random=True),
        random=lambda: reads.ours(random=True),
    )
    found |= turns(
        options.repeats,
        beside_others=lambda: reads.ours(random=False),
        windows=reads.windows,
        zarr_python=lambda: reads.zarr(random=False),
        arrow=arrow(data, folder, min(data.layout.shard_rows, 128)),
    )
    row_ms, row_p99_ms = reads.point()
    return found | {"mixing": [reads.mixing()], "row_ms": [row_ms], "row_p99_ms": [row_p99_ms]}


def main() -> None:
    """Measure, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.4)
    parser.add_argument("--d-model", type=int, default=2304)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to put the stores; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options, Path(folder))
    pairs = {
        "sequential / pread (goal 0.8)": ("sequential", "sequential_pread"),
        "random / pread (goal 0.8)": ("random", "random_pread"),
        "windows / pread": ("windows", "random_pread"),
        "write / raw write + fsync (goal 0.8)": ("write_store", "write_raw"),
        "read / zarr-python (goal 3)": ("beside_others", "zarr_python"),
        "read / Arrow cache (goal 10)": ("beside_others", "arrow"),
        "write / zarr-python appending (goal 5)": ("write_store", "zarr_python_append"),
    }
    ratios = {
        name: statistics.median(map(operator.truediv, found[one], found[other])) for name, (one, other) in pairs.items()
    }
    medians = {name: statistics.median(values) for name, values in found.items()}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gb": options.gb}
    machine |= {name: version(name) for name in ("torch", "numpy", "zarr", "crc32c", "datasets")}
    rounded = ({name: round(value, 3) for name, value in part.items()} for part in (ratios, medians))
    print(json.dumps({"ratios": next(rounded), "measured": next(rounded), "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
