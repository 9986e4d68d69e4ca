"""Everything about a training step that depends on the GPU, in one command.

    python benchmarks/gpu.py --out gpu.json               d = 2304, 16k and 65k features, 2048 to 16384 tokens a step
    python benchmarks/gpu.py --with-tests --out gpu.json  the tests of the CUDA paths on this GPU first
    python benchmarks/gpu.py --quick --device cpu         a quick check that it runs

Every size runs ``benchmarks/train.py`` in a process of its own, so that a size that runs out of memory does not end the
others: with bfloat16 products, relu at L0 = 64 against the installed peers and a dense step through torch.compile, and
topk with k = 64. Then torch's profiler records a few of our own steps and the kernels that take the most time. Prints
the record of all sizes, and one line per contender: tokens per second, its time divided by ours, and the share of the
floor (the dense step's five products and Adam's memory traffic, at the best speed that this device shows for each).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tcsae.errors import UsageError
from tcsae.system.device import resolve_device

SIZES = ((16384, 16384), (65536, 8192), (16384, 2048), (65536, 2048))  # those that say most come first
QUICK = ((256, 256),)
TESTS = tuple(f"tests/{part}/test_cuda.py" for part in ("extract", "train", "evaluate"))
ACTIVATIONS = ("relu", "topk")


def agreement(device: str) -> dict[str, float]:
    """The largest difference of the step by hand from autograd in float64, relative to the largest gradient.

    Sparse and dense codes, ReLU and TopK, in float32: what Triton's kernels compute where there is a GPU.
    """
    import torch
    from tcsae.train.loss.objective import Objective, TemporalTerm
    from tcsae.train.sae.activation import Activation
    from tcsae.train.sae.temporal_sae import TemporalSAE
    from tcsae.train.step.autograd import autograd_step
    from tcsae.train.step.by_hand import sparse_step

    torch.manual_seed(0)
    x = torch.randn(64, 5, 96, dtype=torch.float64)
    found = {}
    for activation in (Activation("relu"), Activation("topk", k=16)):
        objective = Objective(sparsity_weight=0.1, temporal=TemporalTerm(form="pairwise", weight=0.1, n_features=1024))
        exact = TemporalSAE(96, 1024, activation).double().train()
        for weight in exact.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        autograd_step(exact, x, objective)
        for name, above in (("entries", 1.0), ("matrices", -1.0)):
            mine = TemporalSAE(96, 1024, activation).train()
            mine.load_state_dict(exact.state_dict())
            mine = mine.to(device)
            sparse_step(mine, x.float().to(device), objective, dense_above=above)
            pairs = zip(mine.parameters(), exact.parameters(), strict=True)
            grads = [(one.grad, other.grad) for one, other in pairs]
            worst = [float((a.double().cpu() - b).abs().max() / b.abs().max()) for a, b in grads if a is not None]
            found[f"{activation.kind}, {name}"] = max(worst)
    return found


def tested(seconds: float) -> dict[str, Any]:
    """What pytest says of whole runs on this GPU, held to the CPU's; without a GPU they run on the simulated one."""
    command = [sys.executable, "-m", "pytest", "-n", "4", "--tb=line", *TESTS]
    where = {"cwd": Path(__file__).parents[1], "env": os.environ | {"TCSAE_TEST_GPU": "1"}}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, **where)
    except subprocess.TimeoutExpired:
        return {"passed": False, "output": [f"stopped after {seconds:.0f} s"]}
    output = (done.stdout + done.stderr).strip().splitlines()
    return {"passed": done.returncode == 0, "output": output[-40:]}


def measured(args: argparse.Namespace, activation: str, width: int, tokens: int, seconds: float) -> dict[str, Any]:
    """The record of one size, or the last output of its process if it failed or took longer than ``seconds``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [
            sys.executable, str(Path(__file__).with_name("train.py")), "--device", args.device, "--dtype", args.dtype,
            "--activation", activation, "--d-model", str(args.d_model), "--width", str(width), "--tokens", str(tokens),
            "--k", str(args.k), "--l0", str(args.k), "--steps", str(args.steps), "--warm-steps", str(args.warm_steps),
            "--batches", "8", "--compiled", "--profile", "--peers", "--out", str(out),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": "stopped: the time was up"}
        if done.returncode != 0 or not out.exists():
            return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1]}
        return json.loads(out.read_text())


def lines(record: dict[str, Any], size: str) -> list[str]:
    """The results as lines for people."""
    if "failed" in record:
        return [f"{size}: {record['failed']}"]
    most = record["floor"]["tokens_per_second"]
    found = []
    for result in record["results"]:
        for name, one in result["contenders"].items():
            speed = f"{one['tokens_per_second']:>10,} tokens/s, {one['time_by_ours']:5.2f} of our time"
            found.append(
                f"{size}, {name:<20} {speed}, {one['tokens_per_second'] / most:.2f} of the floor, L0 {one['l0']}"
            )
        found += [f"    {share:5.1%}  {kernel}" for kernel, share in result["profile"].items()]
    return found


def main() -> None:
    args = parse()
    ends = time.monotonic() + 60 * args.minutes
    try:
        resolve_device(args.device)
    except UsageError as error:
        sys.exit(str(error))
    records: dict[str, Any] = {}
    if args.with_tests:
        records["tests"] = tested(60 * args.minutes / 2)
        print("\n".join(records["tests"]["output"]), file=sys.stderr, flush=True)
    records["agreement with float64"] = agreement(args.device)
    for name, worst in records["agreement with float64"].items():
        print(f"{name}: gradients within {worst:.1e} of float64", file=sys.stderr, flush=True)
    for width, tokens in QUICK if args.quick else SIZES:
        for activation in ACTIVATIONS:
            size = f"{activation}, {width} features, {tokens} tokens"
            left = ends - time.monotonic()
            out_of_time = {"failed": "left out: the time was up"}
            records[size] = measured(args, activation, width, tokens, left) if left > 20 else out_of_time
            print("\n".join(lines(records[size], size)), file=sys.stderr, flush=True)
            if args.out:  # after every size, so that a run that is interrupted keeps its results
                Path(args.out).write_text(json.dumps(records, indent=2) + "\n")
    print(json.dumps(records, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the products")
    parser.add_argument("--d-model", type=int, default=2304)
    parser.add_argument("--k", type=int, default=64, help="active features: k of topk, L0 of relu")
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each contender")
    parser.add_argument("--warm-steps", type=int, default=400, help="at most so many to reach the L0")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which it ends with what it has")
    parser.add_argument(
        "--with-tests", action="store_true", help="first the tests of the CUDA paths, in at most half of the minutes"
    )
    parser.add_argument("--out", default="", help="file for the record")
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny SAE")
    args = parser.parse_args()
    if args.quick:
        args.d_model, args.k, args.steps, args.warm_steps, args.dtype = 32, 8, 20, 100, "float32"
    return args


if __name__ == "__main__":
    main()
