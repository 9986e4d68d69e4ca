"""The commands that are tortured, what each must have written in the end, and where all of it happens."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from power import Disk
from stores import make_store
from tcsae.evaluate.results import read_results
from tcsae.pipeline import main
from tcsae.train.formats.locate import read_sae
from tcsae.train.run_folder.record import load_run

from .children import child

WEIGHTS = "sae_weights.safetensors"
TRAIN = [
    *("--steps", "9", "--batch-size", "60", "--k", "4", "--width", "16", "--log-every", "2", "--checkpoint-every", "3"),
    *("--device", "cpu", "--dtype", "float32", "--no-baseline", "--name", "a"),
]


@dataclass
class Stage:
    """A command that writes, and what it must have written in the end."""

    name: str
    command: Callable[[Path], list[str]]
    result: Callable[[Path], object]

    def run(self, out: Path) -> int:
        """Into a folder."""
        return main(["--quiet", *self.command(out)])


def stages(base: Path) -> list[Stage]:
    """All but extraction, whose stores have kill9.py."""
    run = str(base / "runs" / "a")
    return [
        Stage(
            "train",
            lambda out: ["train", "--store", str(base / "cache/l3.zarr"), "--out", str(out), *TRAIN],
            lambda out: (out / "a" / WEIGHTS).read_bytes(),
        ),
        Stage(
            "evaluate",
            lambda out: [
                *("evaluate", "--run", str(base / "runs/tiny"), "--batches", "2", "--batch-size", "4", "--quick"),
                *("--device", "cpu", "--dtype", "float32", "--out", str(out), "--name", "r"),
            ],
            lambda out: _settled(out / "r"),
        ),
        Stage(
            "prune",
            lambda out: ["prune", run, "--out", str(out / "p"), "--min-cosine", "0.2", "--device", "cpu"],
            lambda out: (load_run(out / "p").finished, (out / "p" / WEIGHTS).read_bytes()),
        ),
        Stage(
            "export",
            lambda out: ["export", run, "--out", str(out / "e"), "--format", "dictionary-learning"],
            lambda out: (sorted(f.name for f in (out / "e").iterdir()), str(read_sae(out / "e")[1].state_dict())),
        ),
    ]


def _settled(folder: Path) -> str:
    """A report without what differs from one evaluation to the next."""
    (folder / "index.html").stat()
    return read_results(folder).model_copy(
        update={"created": "", "seconds": 0.0, "peak_memory_bytes": None, "checksum": None}
    ).model_dump_json()  # fmt: skip


def prepare(base: Path) -> None:
    """A store, a trained run, and a run in a tiny model with its text."""

    def work() -> int:
        from tiny import tiny_corpus, tiny_model
        from tiny_runs import make_manifest, make_run

        make_store(base / "cache", rows=64, context=16, d_model=8, documents=12)
        model, text = tiny_model("gemma2", base / "model"), tiny_corpus(base / "text", documents=60, words=40)
        make_run(base / "runs", "tiny", make_manifest(model, text, 1))
        return stages(base)[0].run(base / "runs")

    ended = child(work)
    if ended.status:
        raise SystemExit(f"nothing to torture: {ended.said}")


@dataclass
class Scene:
    """What every section needs."""

    base: Path
    scale: float
    seed: int

    def times(self, full: int) -> int:
        """How often, at this scale."""
        return max(1, round(full * self.scale))

    def dice(self, *what: object) -> random.Random:
        """Of one try."""
        return random.Random(repr((self.seed, *what)))

    def whole(self, stage: Stage) -> tuple[object, int]:
        """What a stage that nothing happens to writes, and the calls it makes."""
        out = self.base / "whole" / stage.name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        calls = self.base / "calls"

        def work() -> int:
            disk = Disk(out, pytest.MonkeyPatch())
            status = stage.run(out)
            calls.write_text(str(disk.calls))
            return status

        ended = child(work)
        if ended.status:
            raise SystemExit(f"{stage.name} fails by itself: {ended.said}")
        return stage.result(out), int(calls.read_text())


def goes_on(stage: Stage, out: Path, expected: object) -> str | None:
    """Run it once more; what is wrong with the end, None if nothing is. A finished one may refuse to be run again."""
    ended = child(lambda: stage.run(out))
    try:
        same = stage.result(out) == expected
    except Exception as failure:
        return f"does not go on: {ended.said[-300:]} {failure}"
    if not same:
        return f"ends with something else: {ended.said[-300:]}"
    if ended.status and "exists already" not in ended.said:
        return f"does not go on: {ended.said[-300:]}"
    left = [str(file) for file in out.rglob("*.partial")]
    return f"leaves {left[0]}" if left and stage.name == "train" else None
