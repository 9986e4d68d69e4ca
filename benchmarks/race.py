"""The whole job and its stages against SAELens: whole processes, same model, rows, SAE and arithmetic, in turns.

    python benchmarks/race.py --peer-python other-env/bin/python
    python benchmarks/race.py --peer-python other-env/bin/python --turns 1 --tokens 32k --steps 50      # a first look

The model is the demo's in float32, the SAE a TopK one. Every stage is a process of its own on either side, from its
start to its end, imports and loading included: write the cache, train one SAE from it, train six (ours in one process,
SAELens' one after the other, since a process of its trains one), evaluate one on held-out rows (ours twice: when the
reference rows of this text have never been measured, and when they have), evaluate six. Then each side's training is
killed with SIGKILL in the middle and the same command given again. At the end both sides' SAEs are measured by one
evaluator, ours. Prints a JSON record and a table for the page of results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tcsae.cache.store import ActivationStore
from tcsae.console import parse_count
from tcsae.extract.assets import demo_model

CONTEXT, BATCH_ROWS = 128, 16  # of a batch of an evaluation; our extraction chooses its own
SIX = 6


@dataclass
class Stage:
    """What one stage took, turn by turn."""

    seconds: list[float] = field(default_factory=list)
    peak_gb: list[float] = field(default_factory=list)


@dataclass
class Race:
    """Both sides' processes and where they write."""

    args: argparse.Namespace
    folder: Path
    found: dict[str, dict[str, Stage]] = field(default_factory=dict)

    def run(self, stage: str, side: str, command: list[str], *, kill_after: float | None = None) -> float:
        """Seconds of one process; its log is kept beside. Killed with SIGKILL where a time is given."""
        log = self.folder / f"{stage}-{side}.log"
        start = time.perf_counter()
        with log.open("a") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
            if kill_after is not None:
                time.sleep(kill_after)
                os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if kill_after is None and status != 0:
            last = "\n".join(log.read_text().strip().splitlines()[-3:])
            raise SystemExit(f"{stage} of {side} ended with {os.waitstatus_to_exitcode(status)}, see {log}: {last}")
        if kill_after is None:
            found = self.found.setdefault(stage, {}).setdefault(side, Stage())
            found.seconds.append(seconds)
            found.peak_gb.append(usage.ru_maxrss / 1e6)
            print(f"{stage:28} {side:8} {seconds:7.1f} s  {usage.ru_maxrss / 1e6:5.2f} GB", file=sys.stderr, flush=True)
        return seconds

    def ours(self, stage: str, *words: str, kill_after: float | None = None) -> float:
        """One command of ours."""
        command = [sys.executable, "-m", "tcsae.pipeline", *words]
        return self.run(stage, "tcsae", command, kill_after=kill_after)

    def theirs(self, stage: str, order: dict[str, Any], kill_after: float | None = None) -> float:
        """One stage of SAELens' side."""
        script = str(Path(__file__).with_name("peers_race.py"))
        return self.run(stage, "SAELens", [self.args.peer_python, script, json.dumps(order)], kill_after=kill_after)


def main() -> None:
    """Run all stages, turn by turn."""
    args = parse()
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    race = Race(args, folder)
    common = prepare(race)
    for turn in range(args.turns):
        sides: list[Callable[[], None]] = [lambda: our_turn(race), lambda: their_turn(race, common)]
        for side in sides if turn % 2 == 0 else reversed(sides):
            side()
    record = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "stages": {stage: {side: vars(one) for side, one in sides.items()} for stage, sides in race.found.items()},
        "cache_bytes": {side: size_of(folder / f"cache-{side}") for side in ("tcsae", "SAELens")},
        "quality": quality(race),
    }
    print(json.dumps(record))
    print(table(record))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of an environment with sae-lens")
    parser.add_argument("--folder", type=Path, default=Path("race"), help="emptied first")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--tokens", type=parse_count, default=131_072)
    parser.add_argument("--peer-batch-rows", type=int, default=BATCH_ROWS, help="rows of a pass of SAELens'")
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def prepare(race: Race) -> dict[str, Any]:
    """The rows that both sides see: written by one extraction that is not timed, with the held-out ones."""
    args, folder = race.args, race.folder
    extract = our_extraction(args)
    subprocess.run([sys.executable, "-m", "tcsae.pipeline", *extract, "--out", f"{folder}/rows"], check=True)
    store = ActivationStore.open(folder / "rows" / f"l{args.layer}.zarr")
    rows = store.tokens(0, store.n_rows)
    (folder / "parquet").mkdir()
    as_dataset(rows).to_parquet(folder / "parquet" / "rows.parquet")
    as_dataset(held_out_rows(args)).to_parquet(folder / "eval.parquet")
    return {
        "model": str(demo_model()),
        "hook": f"model.layers.{args.layer}",
        "d_in": store.d_model,
        "context": CONTEXT,
        "batch_rows": args.peer_batch_rows,
        "rows": f"{folder}/parquet",
        "held_out": f"{folder}/eval.parquet",
        "rows_in_all": args.eval_rows,
        "tokens": rows.size,
        "width": args.width,
        "k": args.k,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "warmup": args.steps // 10,
        "n_checkpoints": 0,
        "buffer_gb": 0.1,
        "cache": f"{folder}/cache-SAELens",
    }


def as_dataset(tokens_RT: np.ndarray) -> Dataset:
    return Dataset.from_dict({"tokens": tokens_RT.astype(np.int64).tolist()})


def our_extraction(args: argparse.Namespace) -> list[str]:
    words = ["extract", "--model", "demo", "--dataset", "demo", "--layers", str(args.layer), "--dtype", "float32"]
    words += ["--tokens", str(args.tokens), "--context", str(CONTEXT)]
    return [*words, "--held-out", "0.15"]


def held_out_rows(args: argparse.Namespace) -> np.ndarray:
    """The rows that our evaluation measures, int32 [R, T]."""
    from tcsae.evaluate.model.heldout_text import HeldOutText
    from tcsae.extract.config import ModelSource, TextSource
    from tcsae.extract.model.load import load_language_model
    from tcsae.extract.text.open import open_documents
    from tcsae.extract.text.rows import row_blocks

    lm = load_language_model(ModelSource(id="demo", device="cpu", dtype="float32"))
    source = TextSource(dataset="demo", held_out=0.15, context=CONTEXT)
    blocks = row_blocks(source, lm, held_out=True, documents=open_documents(source), rows_per_block=BATCH_ROWS)
    return HeldOutText.gather((block for block, _ in blocks), args.eval_rows).tokens_RT


def our_turn(race: Race) -> None:
    """All stages of ours, from nothing."""
    args, folder = race.args, race.folder
    for old in ("cache-tcsae", "runs", "reports"):  # nothing is known at the beginning of a turn
        shutil.rmtree(folder / old, ignore_errors=True)
    race.ours("cache", *our_extraction(args), "--out", f"{folder}/cache-tcsae")
    train = ["train", "--store", f"{folder}/cache-tcsae/l{args.layer}.zarr", "--activation", "topk"]
    train += ["--k", str(args.k), "--width", str(args.width), "--steps", str(args.steps), "--lr", str(args.lr)]
    train += ["--batch-size", str(args.batch_size), "--temporal", "none", "--device", "cpu", "--dtype", "float32"]
    race.ours("train one", *train, "--name", "one", "--out", f"{folder}/runs/one")
    sweep = ["--sweep", f"seed={','.join(map(str, range(SIX)))}"]
    race.ours("train six", *train, *sweep, "--out", f"{folder}/runs/six")
    measure = ["evaluate", "--quick", "--batches", str(args.eval_rows // BATCH_ROWS), "--batch-size", str(BATCH_ROWS)]
    measure += ["--device", "cpu", "--dtype", "float32"]
    one = ["--runs", f"{folder}/runs/one", "--out", f"{folder}/reports/one"]
    race.ours("evaluate one, first", *measure, *one, "--name", "first")
    shutil.rmtree(folder / "reports" / "one" / "first")  # the SAE is measured again, its text is known
    race.ours("evaluate one, again", *measure, *one, "--name", "again")
    race.ours("evaluate six", *measure, "--runs", f"{folder}/runs/six", "--out", f"{folder}/reports/six")
    whole = statistics.median(race.found["train one"]["tcsae"].seconds)
    words = (
        *train,
        "--name",
        "killed",
        "--out",
        f"{folder}/runs/killed",
        "--checkpoint-every",
        str(max(1, args.steps // 4)),
    )
    killed = race.ours("train, killed", *words, kill_after=0.7 * whole)
    add(race, "train, killed and resumed", "tcsae", killed + race.ours("train, resumed", *words))


def their_turn(race: Race, common: dict[str, Any]) -> None:
    """All stages of SAELens', from nothing."""
    folder = race.folder
    for old in ("cache-SAELens", "theirs"):
        shutil.rmtree(folder / old, ignore_errors=True)
    race.theirs("cache", {**common, "stage": "cache", "out": common["cache"]})

    def order(name: str, seed: int, checkpoints: int = 0) -> dict[str, Any]:
        places = {"out": f"{folder}/theirs/{name}", "checkpoints": f"{folder}/theirs/{name}-checkpoints"}
        return {**common, **places, "stage": "train", "seed": seed, "n_checkpoints": checkpoints}

    race.theirs("train one", order("one", 0))
    took = [race.theirs("train one of six", order(f"six-{seed}", seed)) for seed in range(SIX)]
    add(race, "train six", "SAELens", sum(took))
    evaluation = {**common, "stage": "evaluate"}
    for name in ("evaluate one, first", "evaluate one, again"):
        race.theirs(name, {**evaluation, "saes": [f"{folder}/theirs/one"]})
    race.theirs("evaluate six", {**evaluation, "saes": [f"{folder}/theirs/six-{seed}" for seed in range(SIX)]})
    whole = statistics.median(race.found["train one"]["SAELens"].seconds)
    killed = race.theirs("train, killed", order("killed", 0, 4), kill_after=0.7 * whole)
    resumed = race.theirs("train, resumed", order("killed", 0, 4))
    add(race, "train, killed and resumed", "SAELens", killed + resumed)


def add(race: Race, stage: str, side: str, seconds: float) -> None:
    race.found.setdefault(stage, {}).setdefault(side, Stage()).seconds.append(seconds)


def quality(race: Race) -> dict[str, Any]:
    """Both sides' six SAEs on the same held-out rows by one evaluator: means over seeds."""
    from tcsae.evaluate.config import EvaluateConfig
    from tcsae.evaluate.run import evaluate

    args, folder = race.args, race.folder
    runs = sorted(str(path.parent) for path in (folder / "runs" / "six").glob("*/train.json"))
    theirs = [f"{folder}/theirs/six-{seed}" for seed in range(SIX)]
    config = EvaluateConfig(
        runs=tuple(runs), saes=tuple(theirs), layers=(args.layer,), batches=args.eval_rows // BATCH_ROWS,
        batch_rows=BATCH_ROWS, references=("mean", "zero"), out=f"{folder}/quality", device="cpu", quick=True,
    )  # fmt: skip
    report = evaluate(config)[0].report
    found = {}
    for side, ours in (("tcsae", True), ("SAELens", False)):
        records = [one for one in report.records if one.sae and (one.sae.source == "saelens") is not ours]
        names = ("explained_variance", "ce_score_mean", "l0")
        values = {name: [one.metrics[name].value for one in records if name in one.metrics] for name in names}
        found[side] = {name: statistics.mean(each) for name, each in values.items() if each}
    return found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


JOBS = {
    "whole job, one SAE": ("cache", "train one", "evaluate one, first"),
    "whole job, six SAEs": ("cache", "train six", "evaluate six"),
}


def table(record: dict[str, Any]) -> str:
    """Medians over turns, and SAELens' time over ours."""
    lines = ["| stage | tcsae, s | SAELens, s | ratio | tcsae, GB | SAELens, GB |", "|" + "---|" * 6]
    stages = record["stages"]

    def median(stage: str, side: str, what: str = "seconds") -> float | None:
        values = stages.get(stage, {}).get(side, {}).get(what)
        return statistics.median(values) if values else None

    for stage in stages:
        a, b = (median(stage, side) for side in ("tcsae", "SAELens"))
        if a is None or b is None:
            continue
        memory = [median(stage, side, "peak_gb") for side in ("tcsae", "SAELens")]
        cells = [f"{a:.1f}", f"{b:.1f}", f"**{b / a:.2f}**", *("" if gb is None else f"{gb:.2f}" for gb in memory)]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    for job, parts in JOBS.items():
        a, b = (sum(median(part, side) or float("nan") for part in parts) for side in ("tcsae", "SAELens"))
        lines.append(f"| {job} | {a:.1f} | {b:.1f} | **{b / a:.2f}** | | |")
    sizes = record["cache_bytes"]
    lines.append(f"\ncache on disk: tcsae {sizes['tcsae'] / 1e6:.0f} MB, SAELens {sizes['SAELens'] / 1e6:.0f} MB")
    for side, values in record["quality"].items():
        lines.append(f"{side}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
