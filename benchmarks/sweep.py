"""A sweep of 8 SAEs on one stream against the same 8 trained one after the other: time, and bytes read from the store.

    python benchmarks/sweep.py                            both shapes, about a quarter of an hour on two cores
    python benchmarks/sweep.py --only small --turns 5     only the shape whose cost is the number of calls
    python benchmarks/sweep.py --quick                    a quick check that it runs

Four values of λ2 (one of them 0) times two seeds, through the trainer itself with everything that a run includes:
opening the store, shuffling windows, metrics, writing weights and record. In turns: the sweep, the eight separate runs,
and only the steps of the eight members on batches held in memory (their summed compute). Ratios are medians over turns,
of two times from the same turn. Bytes are those that the process read by system calls while it trained. Prints one JSON
record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tcsae.cache.store import ActivationStore
from tcsae.system.allocator import keeping_freed_memory
from tcsae.train.config import TrainConfig
from tcsae.train.loop.batches import open_stream
from tcsae.train.loop.inputs import Inputs
from tcsae.train.loop.member import Member
from tcsae.train.loop.memory_plan import stacks
from tcsae.train.loop.stack import Stack
from tcsae.train.plan import MemberPlan, plan_members, tokens_per_step
from tcsae.train.presets import build_config
from tcsae.train.run import train

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from stores import make_store

GRID = {"temporal.weight": ("0", "0.03", "0.1", "0.3"), "run.seed": ("0", "1")}
CONTEXT = 128
SHAPES = {  # d_model, features, k, tokens per batch, steps
    "large": (576, 4608, 64, 2048, 100),
    "small": (64, 256, 16, 64, 500),
}
QUICK = {"large": (32, 256, 8, 256, 4), "small": (16, 64, 4, 64, 6)}


class Contest:
    """One shape: a store of random activations, and the three contenders."""

    def __init__(self, shape: tuple[int, ...], folder: Path, args: argparse.Namespace):
        self.d_model, width, k, batch, self.steps = shape
        rows = -(-self.steps * batch // (CONTEXT - 1)) + 8
        self.store = make_store(
            folder / "cache", rows=rows, context=CONTEXT, d_model=self.d_model, chunk_rows=16, shard_rows=64
        )
        self.bytes = rows * CONTEXT * self.d_model * 2
        run = {
            "steps": self.steps, "log_every": self.steps, "checkpoint_every": 10 * self.steps, "baseline": False,
            "device": args.device, "dtype": args.dtype, "out": str(folder / "runs"),
        }  # fmt: skip
        sae = {"activation": args.activation, "k": k, "width": width}
        changes = {"data.store": str(self.store), "data.batch_size": batch}
        changes |= {f"sae.{key}": value for key, value in sae.items()} | {
            f"run.{key}": value for key, value in run.items()
        }
        self.config, self.device = build_config(None, None, changes), torch.device(args.device)
        self.dtype = getattr(torch, args.dtype)
        opened = ActivationStore.open(self.store)
        statistics_ = opened.statistics()
        self.inputs = Inputs.of(self.config.data, statistics_)
        known = {"layer": opened.layer, "d_model": opened.d_model, "n_tokens": statistics_.n_tokens}
        self.plans: list[MemberPlan] = plan_members(self.config, GRID, **known)
        stream = open_stream(opened, [self.config.data], self.inputs)
        drawn = (stream.next_batches()[0].x_NWD for _ in range(min(self.steps, 32)))
        self.batches = [self.inputs.prepare(x_NWD, self.device) for x_NWD in drawn]
        stream.close()

    def sweep(self) -> None:
        """Train all members on one stream."""
        _train(self.config, sweep=GRID)

    def runs(self) -> None:
        """Train the same members separately."""
        for plan in self.plans:
            _train(_alone(plan.config))

    @keeping_freed_memory()
    def compute(self) -> None:
        """Run only the steps of each member."""
        for plan in self.plans:
            alone = Stack([Member(plan, self.inputs.mean_D, self.device, self.dtype)])
            for step in range(self.steps):
                alone.train_step(self.batches[step % len(self.batches)])
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measured(self, contender: Callable[[], None]) -> dict[str, float]:
        """Seconds, processor seconds and bytes read of one repetition."""
        shutil.rmtree(self.config.run.out, ignore_errors=True)
        read, processor, begun = _bytes_read(), time.process_time(), time.perf_counter()
        contender()
        seconds, processor = time.perf_counter() - begun, time.process_time() - processor
        return {"seconds": seconds, "processor_seconds": processor, "bytes": _bytes_read() - read}

    def result(self, turns: int) -> dict[str, Any]:
        """The result of all turns."""
        contenders = {"sweep": self.sweep, "runs": self.runs, "compute": self.compute}
        self.measured(self.sweep)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _ in range(turns):
            for name, contender in contenders.items():
                found[name].append(self.measured(contender))

        def ratio(other: str, key: str) -> float:
            each = zip(found["sweep"], found[other], strict=True)
            return round(statistics.median(one[key] / max(two[key], 1e-9) for one, two in each), 3)

        medians = {
            name: {key: statistics.median(turn[key] for turn in each) for key in each[0]}
            for name, each in found.items()
        }
        return {
            "shape": {"d_model": self.d_model, "features": self.config.sae.width, "k": self.config.sae.k},
            "steps": self.steps,
            "tokens_per_step": tokens_per_step(self.config),
            "stacks": [len(part) for part in stacks(self.plans, self.device.type)],
            "sweep_by_runs": {key: ratio("runs", key) for key in ("seconds", "processor_seconds", "bytes")},
            "sweep_by_compute": {key: ratio("compute", key) for key in ("seconds", "processor_seconds")},
            "bytes_by_store": {name: round(medians[name]["bytes"] / self.bytes, 2) for name in ("sweep", "runs")},
            "medians": {name: {key: round(value, 3) for key, value in each.items()} for name, each in medians.items()},
        }


_train = keeping_freed_memory()(train)  # as the command does


def _alone(config: TrainConfig) -> TrainConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"out": config.run.out + "/alone"})})


def _bytes_read() -> int:
    """Bytes read by system calls of this process, including those served from the page cache."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(SHAPES), default=None, help="one shape")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--activation", choices=("relu", "topk", "batchtopk", "jumprelu"), default="topk")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the products")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny SAEs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    record: dict[str, Any] = {
        "machine": facts | {"date": time.strftime("%Y-%m-%d")},
        "settings": vars(args),
        "results": {},
    }
    for name in [args.only] if args.only else SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            contest = Contest((QUICK if args.quick else SHAPES)[name], Path(folder), args)
            record["results"][name] = contest.result(1 if args.quick else args.turns)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
