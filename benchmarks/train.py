"""Tokens per second of a training step: our sparse and dense steps, with and without the temporal term, and the peers.

    python benchmarks/train.py --l0 50 400                     only our own steps
    python benchmarks/train.py --l0 50 400 --peers             also sae-lens and dictionary-learning, if installed
    python benchmarks/train.py --store cache/l12.zarr --peers  on real activations
    python benchmarks/train.py --quick                         a quick check that it runs

For every L0 one SAE is trained to that L0 by adjusting λ1. Then all contenders train on the same batches in turns of
ten timed steps, so that other work on the machine affects all of them alike. Every turn begins with the trained
weights, and the learning rate is so small that L0 does not change. Freed memory is kept in the process, as in our
trainer, for the peers too. Ratios are medians over turns of a contender's time divided by ours in the same turn; tokens
per second are those of the best turn. Prints one JSON record.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from limits import floor, most_of_the_time
from peers_train import PEERS, Step, compiled, installed
from tcsae.system.allocator import keeping_freed_memory
from tcsae.train.config import (
    DataConfig,
    LossConfig,
    OptimiserConfig,
    RunConfig,
    SAEConfig,
    TemporalConfig,
    TrainConfig,
)
from tcsae.train.loop import member as member_module
from tcsae.train.loop import stack as stack_module
from tcsae.train.loop.member import Member
from tcsae.train.loop.stack import Stack
from tcsae.train.loss.objective import TemporalTerm
from tcsae.train.plan import MemberPlan
from tcsae.train.step.autograd import autograd_step
from torch import Tensor

OURS = ("sparse", "sparse + temporal", "dense", "dense + temporal")
WARM_LR, LR, TURN, UNTIMED = 3e-3, 1e-6, 10, 2


def synthetic_batches(args: argparse.Namespace, n_batches: int) -> list[Tensor]:
    """Windows of sums of sparse directions, of which a token shares two thirds with its neighbours; E‖x‖² = d_model."""
    generator = torch.Generator().manual_seed(0)
    n_true, n_windows = 2 * args.width, args.tokens // args.window
    directions = torch.randn(n_true, args.d_model, generator=generator)
    mean = torch.randn(args.d_model, generator=generator) * directions.norm() / n_true**0.5 / 4
    batches = []
    for _ in range(n_batches):
        x = torch.zeros(n_windows, args.window, args.d_model)
        for shared in (1, 1, 0):
            for _ in range(8):
                which = torch.randint(n_true, (n_windows, 1 if shared else args.window), generator=generator)
                size = torch.empty(which.shape).exponential_(generator=generator)
                x += directions[which] * size.unsqueeze(-1)
        batches.append(x + mean)
    scale = (args.d_model / torch.stack(batches).square().sum(-1).mean()).sqrt()
    return [batch.mul_(scale).to(args.device) for batch in batches]


def stored_batches(args: argparse.Namespace, n_batches: int) -> list[Tensor]:
    """Activations of a store, as the trainer sees them."""
    from tcsae.cache.store import ActivationStore
    from tcsae.cache.stream import TokenStream
    from tcsae.cache.views import Windows

    store = ActivationStore.open(args.store)
    facts = store.statistics()
    args.d_model = store.d_model
    view, limit = Windows(args.window), facts.norm_limit
    stream = TokenStream(store, [view], tokens_per_batch=args.tokens, seed=0, norm_limit=limit)
    batches = [
        stream.next_batches()[0].x_NWD.to(args.device, torch.float32) * facts.rms_scale for _ in range(n_batches)
    ]
    stream.close()
    return batches


def new_member(args: argparse.Namespace, mean_D: Tensor, temporal: bool) -> Member:
    """A member of a run, created as the trainer does."""
    counted = {} if args.activation == "relu" else {"k": args.k}
    config = TrainConfig(
        data=DataConfig(window=args.window, batch_size=args.tokens),
        sae=SAEConfig(activation=args.activation, width=args.width, **counted),
        loss=LossConfig(l1=1.0, l1_warmup=0.0),
        temporal=TemporalConfig(weight=0.1) if temporal else TemporalConfig(form="none"),
        optimiser=OptimiserConfig(name="adam", lr=WARM_LR, warmup=0, decay_share=0.4),
        run=RunConfig(steps=args.warm_steps),
    )
    plan = MemberPlan("benchmark", config, "tc", None, args.d_model)
    return Member(plan, mean_D, torch.device(args.device), args.dtype)


def reach(member: Member, target: float, batches: Iterator[Tensor]) -> float:
    """Train with λ1 adjusted so that L0 becomes ``target``.

    Returns the final λ1; by then the learning rate has fallen to zero, and L0 no longer changes.
    """
    stack, l1 = Stack([member]), 1.0
    for _ in range(member.config.run.steps):
        member.objective = replace(member.objective, sparsity_weight=l1)
        x = next(batches)
        fired = int(stack.train_step(x)[0].result.fired_F.sum()) / (x.shape[0] * x.shape[1])
        l1 *= min(1.1, max(0.9, (fired / target) ** 0.03))
    return l1


def ours(name: str, trained: Member, l1: float, groups: Sequence[float] = ()) -> Step:
    """One of OURS, continuing from the trained member; with nested ``groups`` if given."""
    member = copy.deepcopy(trained)
    constant = member.config.optimiser.model_copy(update={"lr": LR, "decay_share": 0.0})
    member.config = member.config.model_copy(update={"optimiser": constant, "run": RunConfig(steps=10**9)})
    member.optimiser = member_module._new_optimiser(
        member.sae, member.config
    )  # a copied optimiser would refer to the old weights
    n_features = member.sae.n_features
    term = TemporalTerm("pairwise", 0.1, n_features=n_features) if "temporal" in name else TemporalTerm()
    nested = tuple((round(fraction * n_features), 1 / len(groups)) for fraction in groups)
    member.objective = replace(member.objective, sparsity_weight=l1, temporal=term, groups=nested)
    stack, by_hand = Stack([member]), stack_module.sparse_step

    def step(x_NWD: Tensor) -> Callable[[], float]:
        stack_module.sparse_step = by_hand if name.startswith("sparse") else autograd_step
        try:
            result = stack.train_step(x_NWD)[0].result
        finally:
            stack_module.sparse_step = by_hand
        return lambda: int(result.fired_F.sum()) / (x_NWD.shape[0] * x_NWD.shape[1])

    return step


@keeping_freed_memory()
def compete(contenders: dict[str, Callable[[], Step]], batches: list[Tensor], n_steps: int) -> dict[str, Any]:
    """Turns of TURN steps each; returns the seconds per step of each turn and the L0 at its end."""
    seconds, l0 = ({name: [] for name in contenders} for _ in range(2))
    for turn in range(max(1, n_steps // TURN)):
        for name, contender in contenders.items():
            step = contender()
            _run(step, batches, turn * TURN - UNTIMED, UNTIMED)
            begun = time.perf_counter()
            ask = _run(step, batches, turn * TURN, TURN)
            seconds[name].append((time.perf_counter() - begun) / TURN)
            l0[name].append(ask())
    n_tokens = batches[0].shape[0] * batches[0].shape[1]
    base = seconds[OURS[0]]
    return {
        name: {
            "tokens_per_second": round(n_tokens / min(times)),
            "ms_per_step": {"best": round(1e3 * min(times), 1), "median": round(1e3 * statistics.median(times), 1)},
            "time_by_ours": round(statistics.median(t / b for t, b in zip(times, base, strict=True)), 2),
            "steps": len(times) * TURN,
            "l0": round(statistics.mean(l0[name]), 1),
        }
        for name, times in seconds.items()
    }


def _run(step: Step, batches: list[Tensor], first: int, n_steps: int) -> Callable[[], float]:
    """Train on batches ``first`` …, wait for the device, and return the last step's function for L0."""
    for at in range(first, first + n_steps):
        ask = step(batches[at % len(batches)])
    if batches[0].is_cuda:
        torch.cuda.synchronize()
    return ask


def peak_memory(args: argparse.Namespace, l0: float) -> dict[str, float]:
    """MiB that a few steps of each of ours add to its process (or allocate on the GPU); one process for each.

    The C library is told to return freed memory to the system at once; what it keeps otherwise varies by more than the
    temporal term uses.
    """
    thrifty = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for name in OURS:
        keys = ("d_model", "width", "tokens", "window", "k", "threads", "activation", "device")
        same = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in keys]
        command = [sys.executable, __file__, *same, "--dtype", str(args.dtype).removeprefix("torch.")]
        command += ["--memory-of", name, "--l0", str(l0)]
        found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True, env=thrifty).stdout)
    return found


def memory_of(args: argparse.Namespace) -> float:
    """The memory of one contender; the density of its codes is set through the bias instead of by training."""
    batch = synthetic_batches(args, 1)
    member = new_member(args, batch[0].mean((0, 1)), temporal=False)
    with torch.no_grad():
        pre = member.sae.pre_activations(batch[0][:50])
        member.sae.b_enc -= pre.flatten().sort(descending=True).values[int(args.l0[0] / args.width * pre.numel())]
        del pre
    Path("/proc/self/clear_refs").write_text("5")  # reset the recorded peak
    before = _status("VmRSS")
    step = ours(args.memory_of, member, 1.0)
    for _ in range(4):
        step(batch[0])
    if batch[0].is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return round((_status("VmHWM") - before) / 2**10, 1)


def _status(field: str) -> int:
    """A memory value of this process in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """The machine and versions to which the figures belong."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        **installed(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["benchmarks/train.py", *sys.argv[1:]]),
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(memory_of(args))
        return
    batches = (stored_batches if args.store else synthetic_batches)(args, args.batches)
    record: dict[str, Any] = {
        "machine": machine(args),
        "settings": {k: str(v) for k, v in vars(args).items()},
        "results": [],
    }
    if args.device.startswith("cuda") or args.profile:
        record["floor"] = floor(args.tokens, args.d_model, args.width, args.device, args.dtype)
    for target in args.l0 if args.activation == "relu" else [args.k]:
        trained = new_member(args, torch.stack(batches).mean((0, 1, 2)), temporal=False)
        endless = (batches[i % len(batches)] for i in range(10**9))
        l1 = reach(trained, target, endless)
        l1 = l1 if args.activation == "relu" else 0.0
        contenders = {name: partial(ours, name, trained, l1) for name in OURS}
        if args.groups:
            contenders["sparse + groups"] = partial(ours, "sparse + groups", trained, l1, args.groups)
        others = {name: PEERS[name] for name in installed()} if args.peers else {}
        others |= {"dense, torch.compile": compiled} if args.compiled else {}
        n_tokens = args.tokens // args.window * args.window
        for name, other in others.items() if args.activation == "relu" else ():
            contenders[name] = partial(other, trained.sae, l1, LR, n_tokens, args.dtype)
        measured = {"contenders": compete(contenders, batches, args.steps), "peak_mib": peak_memory(args, target)}
        if args.profile:
            measured["profile"] = most_of_the_time(contenders["sparse"](), batches)
        record["results"].append({"target_l0": target, "l1": round(l1, 3), **measured})
    print(json.dumps(record, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--width", type=int, default=4608, help="features")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--activation", choices=("relu", "topk", "batchtopk"), default="relu")
    parser.add_argument("--l0", type=float, nargs="+", default=[50, 400], help="relu: the L0s to train to")
    parser.add_argument("--k", type=int, default=64, help="topk and batchtopk")
    parser.add_argument("--groups", type=float, nargs="+", default=[], help="with nested groups too, such as 0.2 1")
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each contender")
    parser.add_argument("--warm-steps", type=int, default=500, help="training that reaches the L0")
    parser.add_argument("--batches", type=int, default=24, help="batches held in memory")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the products")
    parser.add_argument("--store", default="", help="an activation store instead of synthetic activations")
    parser.add_argument("--peers", action="store_true", help="with the peers that are installed")
    parser.add_argument("--compiled", action="store_true", help="with a dense step through torch.compile (relu)")
    parser.add_argument(
        "--profile", action="store_true", help="with the kernels that take the most of our time, and the floor"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny SAE")
    parser.add_argument("--out", default="", help="file for the record")
    parser.add_argument("--memory-of", default="", choices=("", *OURS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.d_model, args.width, args.tokens, args.l0, args.k = 32, 256, 256, [20.0], 8
        args.steps, args.warm_steps, args.batches = 20, 400, 4
    args.dtype = getattr(torch, args.dtype)
    return args


if __name__ == "__main__":
    main()
