"""What other ways to use time cost: a training step of nested groups, of a crosscoder and of Temporal Feature Analysis.

    python benchmarks/rivals.py --out rivals.json
    python benchmarks/rivals.py --only groups txc --store cache/l12.zarr
    python benchmarks/rivals.py --quick                         a quick check that it runs

Three comparisons, each of two steps that take turns on the same batches; a ratio is the median over turns of the two
times in the same turn, and the turns' order alternates:

    groups  a TopK and a BatchTopK SAE with groups 0.2 and 1, by the same without groups (goal: at most 1.25)
    txc     a crosscoder of W = 5, by a TopK SAE of the same width and k; then divided by the ratio of the
            floating-point operations of the two (goal: at most 1.2). Its k is of a window, and k · W of a window.
    tfa     a step of Temporal Feature Analysis written with torch's own modules (nn.MultiheadAttention, nn.Linear), by
            ours (goal: at least 1). Both have the same weights, and their losses must agree.

Operations are those of the step by hand: one dense product for the encoder, and four products on active entries. They
are counted, not measured, and say nothing of the passes over all weights that follow the gradients: ``ms_of_gradients``
is the time without these. Prints one JSON record.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tcsae.system.allocator import keeping_freed_memory
from tcsae.train.config import TrainConfig
from tcsae.train.loop.member import Member
from tcsae.train.loop.memory_plan import alone
from tcsae.train.loop.single import Single
from tcsae.train.loop.stack import Stack
from tcsae.train.plan import plan_members
from tcsae.train.presets import RIVALS, build_config
from tcsae.train.sae.protocol import RowTokens
from tcsae.train.sae.tfa import TemporalFeatureAnalysis
from torch import Tensor, nn
from torch.nn import functional

Step = Callable[[Tensor], float]
WINDOW, UNTIMED = 5, 1


def activations(args: argparse.Namespace, tokens: int, length: int) -> list[Tensor]:
    """Batches [N, length, D] of about ``tokens`` tokens, on which neighbours resemble each other; E‖x‖² = D."""
    generator = torch.Generator().manual_seed(0)
    n = max(1, tokens // length)
    if args.store:
        return _stored(args, n, length)
    batches = []
    for _ in range(args.batches):
        lasting = torch.randn(n, 1, args.d_model, generator=generator)
        batches.append(((lasting + torch.randn(n, length, args.d_model, generator=generator)) / 2**0.5).to(args.device))
    return batches


def _stored(args: argparse.Namespace, n: int, length: int) -> list[Tensor]:
    from tcsae.cache.store import ActivationStore
    from tcsae.cache.stream import TokenStream
    from tcsae.cache.views import Windows

    store = ActivationStore.open(args.store)
    facts = store.statistics()
    args.d_model = store.d_model
    options = {"tokens_per_batch": n * length, "seed": 0, "norm_limit": facts.norm_limit}
    with TokenStream(store, [Windows(length)], **options) as stream:
        read = [stream.next_batches()[0].x_NWD for _ in range(args.batches)]
    return [x.to(args.device, torch.float32) * facts.rms_scale for x in read]


class OurStep:
    """A member's step, made as ``pipeline train`` makes it; :attr:`gradients` says how long those took so far, without
    the passes over all weights that follow (projection, clipping, optimiser, unit rows).
    """

    def __init__(self, args: argparse.Namespace, changes: dict[str, Any]):
        common = {"run.steps": 10**6, "sae.width": args.width, "sae.k": args.k, "temporal.form": "none",
                  "optimiser.lr": 1e-6, "optimiser.warmup": 0, "optimiser.decay_share": 0.0}  # fmt: skip
        config: TrainConfig = build_config(None, None, common | changes)
        (plan,) = plan_members(config, {}, layer=0, d_model=args.d_model, n_tokens=10**9)
        self.member = Member(plan, torch.zeros(args.d_model), torch.device(args.device), args.dtype)
        found = alone(plan, args.device)
        self._stepper = Single(self.member, found) if found else Stack([self.member])
        self.gradients = 0.0
        name = "_step" if found else "_gradients"
        inner = getattr(self._stepper, name)

        def timed(*words: Any, **named: Any) -> Any:
            begun = _now(args)
            result = inner(*words, **named)
            self.gradients += _now(args) - begun
            return result

        setattr(self._stepper, name, timed)

    def __call__(self, x_NWD: Tensor) -> float:
        """The loss."""
        rows = RowTokens.whole(x_NWD) if self.member.sae.sees == "row" else None
        return float(self._stepper.train_step(x_NWD, rows=rows)[0].result.total)


class TorchTFA(nn.Module):
    """Temporal Feature Analysis from torch's own modules, with the weights of ours."""

    def __init__(self, sae: TemporalFeatureAnalysis):
        super().__init__()
        self.k, self.scale, width = sae.k, sae.scale, sae.n_features
        self.attention = nn.MultiheadAttention(width, sae.heads, batch_first=True)
        self.W_dec, self.b_dec = nn.Parameter(sae.W_dec.detach().clone()), nn.Parameter(sae.b_dec.detach().clone())
        with torch.no_grad():
            mine = (sae.queries, sae.keys, sae.values)
            self.attention.in_proj_weight.copy_(torch.cat([layer.weight for layer in mine]))
            self.attention.in_proj_bias.copy_(torch.cat([layer.bias for layer in mine]))
            self.attention.out_proj.load_state_dict(sae.output.state_dict())

    def forward(self, x_NTD: Tensor) -> Tensor:
        """The reconstruction."""
        centred, encoder = x_NTD - self.b_dec, self.W_dec.T
        codes = torch.relu(self.scale * centred @ encoder)
        before = functional.pad(codes[:, :-1], (0, 0, 1, 0))
        mask = nn.Transformer.generate_square_subsequent_mask(codes.shape[1], device=codes.device)
        mixed, _ = self.attention(codes, before, before, attn_mask=mask, is_causal=True, need_weights=False)
        direction = torch.relu(mixed)
        explained = direction @ self.W_dec
        times = (explained * centred).sum(-1, keepdim=True) / (explained.norm(dim=-1, keepdim=True) + 1e-6).square()
        novel = torch.relu(self.scale * (centred - times * explained) @ encoder)
        kept = novel.topk(self.k or novel.shape[-1], dim=-1, sorted=False)
        novel = torch.zeros_like(novel).scatter(-1, kept.indices, kept.values)
        return (direction * times + novel) @ self.W_dec + self.b_dec


def torch_tfa(args: argparse.Namespace, sae: TemporalFeatureAnalysis, member: Member) -> Step:
    """One training step of it: loss, gradient, clipping, fused AdamW."""
    model, chosen = TorchTFA(sae).to(args.device).train(), member.config.optimiser
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=chosen.lr, betas=chosen.betas, weight_decay=chosen.weight_decay, fused=True
    )

    def step(x_NTD: Tensor) -> float:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(x_NTD.device.type, args.dtype, enabled=args.dtype != torch.float32):
            x_hat = model(x_NTD)
        loss = (x_NTD - x_hat.float()).square().sum(-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), chosen.clip)
        optimiser.step()
        return float(loss)

    return step


@keeping_freed_memory()
def turns(args: argparse.Namespace, one: Step, other: Step, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Seconds per step of both, in turns, and the median of one's by the other's of the same turn."""
    seconds: dict[str, list[float]] = {"one": [], "other": []}
    gradients: dict[str, list[float]] = {"one": [], "other": []}
    contenders = {"one": one, "other": other}
    endless = itertools.cycle(batches)
    for turn in range(args.turns):
        mine = [next(endless) for _ in range(args.steps + UNTIMED)]
        for name in ("one", "other") if turn % 2 == 0 else ("other", "one"):
            for x in mine[:UNTIMED]:
                contenders[name](x)
            step = contenders[name]
            begun, before = _now(args), getattr(step, "gradients", 0.0)
            for x in mine[UNTIMED:]:
                step(x)
            seconds[name].append((_now(args) - begun) / args.steps)
            gradients[name].append((getattr(step, "gradients", 0.0) - before) / args.steps)
    ratios = sorted(a / b for a, b in zip(seconds["one"], seconds["other"], strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "ms_per_step": {name: round(1e3 * statistics.median(times), 2) for name, times in seconds.items()},
        "ms_of_gradients": {name: round(1e3 * statistics.median(times), 2) for name, times in gradients.items()},
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "turns": args.turns,
        "steps_per_turn": args.steps,
    }


def _now(args: argparse.Namespace) -> float:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def operations(tokens: int, d_model: int, width: int, active: int) -> float:
    """Of a step by hand on so many codes: the encoder's product, and four on the active entries of every code."""
    return tokens * (2.0 * d_model * width + 4 * 2.0 * active * d_model)


def of_groups(args: argparse.Namespace) -> dict[str, Any]:
    """Nested groups 0.2 and 1, by none."""
    found, batches = {}, activations(args, args.tokens, WINDOW)
    for kind in ("topk", "batchtopk"):
        nested = OurStep(args, {"sae.activation": kind, "sae.groups": (0.2, 1.0)})
        plain = OurStep(args, {"sae.activation": kind})
        measured = turns(args, nested, plain, batches)
        found[kind] = measured | {"goal": "at most 1.25", "met": measured["ratio"] <= 1.25}
    return found


def of_txc(args: argparse.Namespace) -> dict[str, Any]:
    """A crosscoder of 5 positions, by a TopK SAE on the same tokens."""
    found, batches = {}, activations(args, args.tokens, WINDOW)
    n_tokens, n_windows = batches[0].shape[0] * batches[0].shape[1], len(batches[0])
    base = operations(n_tokens, args.d_model, args.width, args.k)
    for k_of in ("window", "token"):
        txc, plain = OurStep(args, RIVALS["TXC"] | {"sae.k_of": k_of}), OurStep(args, {})
        active = args.k * (WINDOW if k_of == "token" else 1)
        implied = operations(n_windows, WINDOW * args.d_model, txc.member.sae.n_features, active) / base
        measured = turns(args, txc, plain, batches)
        by_implied = round(measured["ratio"] / implied, 3)
        of_txc_ms, of_plain_ms = measured["ms_of_gradients"].values()
        found[f"k of a {k_of}"] = measured | {
            "operations": round(implied, 3),
            "ratio_by_operations": by_implied,
            "gradients_by_operations": round(of_txc_ms / of_plain_ms / implied, 3),
            "goal": "at most 1.2",
            "met": by_implied <= 1.2,
        }
    return found


def of_tfa(args: argparse.Namespace) -> dict[str, Any]:
    """Torch's own modules, by ours."""
    batches = activations(args, args.tfa_tokens, args.context)
    changes = {name: value for name, value in RIVALS["TFA"].items() if not name.startswith("optimiser.")}
    mine = OurStep(args, changes | {"sae.width": args.tfa_width, "optimiser.decay_decoder": True})
    member = mine.member
    assert isinstance(member.sae, TemporalFeatureAnalysis)
    theirs = torch_tfa(args, member.sae, member)
    losses = theirs(batches[0]), mine(batches[0])
    if abs(losses[0] - losses[1]) > (1e-3 if args.dtype == torch.float32 else 3e-2) * losses[0]:
        raise SystemExit(f"the two steps do not compute the same: losses {losses[0]} and {losses[1]}")
    measured = turns(args, theirs, mine, batches)
    return measured | {"losses": losses, "goal": "at least 1", "met": measured["ratio"] >= 1}


COMPARISONS = {"groups": of_groups, "txc": of_txc, "tfa": of_tfa}


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """The machine and versions to which the figures belong."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["benchmarks/rivals.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--width", type=int, default=4608, help="features (groups, txc)")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch (groups, txc)")
    parser.add_argument("--tfa-width", type=int, default=2048, help="features (tfa)")
    parser.add_argument("--tfa-tokens", type=int, default=1024, help="of a batch (tfa)")
    parser.add_argument("--context", type=int, default=128, help="tokens of a row (tfa)")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a turn")
    parser.add_argument("--batches", type=int, default=8, help="batches held in memory")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the products")
    parser.add_argument("--store", default="", help="an activation store instead of synthetic activations")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny SAEs")
    parser.add_argument("--out", default="", help="file for the record")
    args = parser.parse_args()
    if args.quick:
        args.d_model, args.width, args.k, args.tokens, args.turns, args.steps, args.batches = 16, 256, 8, 320, 3, 2, 2
        args.tfa_width, args.tfa_tokens, args.context = 64, 64, 16
    torch.set_num_threads(args.threads)
    args.dtype = getattr(torch, args.dtype)
    settings = {name: str(value) for name, value in vars(args).items()}
    record = {
        "machine": machine(args),
        "settings": settings,
        "results": {of: COMPARISONS[of](args) for of in args.only},
    }
    print(json.dumps(record, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
