"""Options, paths and folders that nobody means."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout

from mutations import corpus, mutated, outcome
from tcsae.pipeline import main

from .children import Tally, child
from .stages import TRAIN, Scene


def inputs(scene: Scene) -> Iterator[Tally]:
    """Options and paths that nobody means."""
    base = scene.base
    fifo = base / "fifo"
    if not fifo.exists():
        os.mkfifo(fifo)
    (base / "deep.toml").write_text("a = " + "[" * 100_000)
    (base / "binary.toml").write_bytes(b"\xff\xfe\x00")
    huge, nasty = "9" * 25, ("x" * 500, "/dev/zero", str(fifo), "a\nb", "", "..", "/proc", "a/../b", "\udc80")
    train = ["train", "--store", str(base / "cache/l3.zarr"), "--out", str(base / "bad"), "--fresh", *TRAIN]
    evaluate = ["evaluate", "--run", str(base / "runs/tiny"), "--batches", "1", "--batch-size", "2", "--quick"]
    evaluate += ["--device", "cpu", "--out", str(base / "bad")]
    run = str(base / "runs" / "a")
    numbers = (huge, "-1", "nan", "inf", "1e400", "0x10", "", "0", str(1 << 63), str(1 << 64))
    cases = [
        *_each(train, "--seed --data-seed --steps --tokens --width --k --lr --window --l1", numbers),
        *_each(train, "--name --out --store --config --plugin", nasty),
        *_each(train, "--config", [str(base / "deep.toml"), str(base / "binary.toml")]),
        *_each(evaluate, "--seed --batches --batch-size --layer", numbers),
        *_each(evaluate, "--name --out --sae --run --model", nasty),
        *_each(["evaluate"], "--runs", nasty[:3]),
        *([command, value] for command in ("export", "prune", "inspect", "verify") for value in nasty),
        *_each(["export", run], "--out --format", [value for value in nasty if value]),
        *_each(["prune", run], "--out", [value for value in nasty if value]),
        *_each(["prune", run], "--seed --tokens --min-cosine", numbers),
    ]
    tally = Tally("bad options and paths", "done, or refused in one sentence")
    os.chdir(base)
    for case in cases[:: max(1, round(1 / min(1, scene.scale)))]:
        signal.alarm(0)

        def work(case: list[str] = case) -> int:
            signal.alarm(60)
            return main(["--quiet", *case])

        ended = child(work)
        misused = ended.status == 2 and "Usage: " in ended.said and "Traceback" not in ended.said
        words = " ".join(word if len(word) < 60 else f"{word[:9]}…" for word in case)
        tally.count(ended.in_one_sentence or misused, f"{words!r}: {ended.status} {ended.said[-300:]}")
    yield tally


def _each(command: list[str], names: str, values: Sequence[str]) -> list[list[str]]:
    """A command with every option set to every value."""
    return [[*command, option, value] for option in names.split() for value in values]


def fuzz(scene: Scene) -> Iterator[Tally]:
    """Folders of every format with something wrong in them: see tests/mutations.py."""
    tally = Tally("mutated SAE and run folders", "read, or refused in one sentence, within 1 GB and 10 s, no code run")
    source = scene.base / "corpus"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    folders, case = corpus(source), scene.base / "case"
    for number in range(scene.times(10_000)):
        dice = scene.dice("fuzz", number)
        what = mutated(dice.choice(folders), case, dice)
        began = time.perf_counter()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            try:
                wrong = None if outcome(case) in ("read", "refused") else "neither read nor refused"
            except Exception as failure:
                wrong = f"{type(failure).__name__}: {failure}"
        took = time.perf_counter() - began
        tally.count(wrong is None and took < 10, f"{number}, {what}: {wrong or f'took {took:.0f} s'}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tally.count(peak < 1 << 30, f"the process needed {peak:,} bytes")
    yield tally
