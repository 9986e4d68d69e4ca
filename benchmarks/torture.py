"""Everything that can happen to files, again and again: kills, power cuts, flipped bits, full disks, bad input.

    python benchmarks/torture.py                                # the figures of docs/RELIABILITY.md, an hour
    python benchmarks/torture.py --only kills flips --scale 0.1 # minutes
    python benchmarks/torture.py --markdown                     # the table as it stands in that document

Each section says how often it tried and how often what is promised was kept: the same command goes on and ends with
the same bytes, damage is named, and every failure is one sentence. Stores have ``kill9.py``. Full disks and the block
device need root and are left out without it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from mutations import corpus, mutated, outcome
from power import Disk, PowerCut
from stores import make_store
from tcsae.evaluate.results import read_results
from tcsae.evaluate.table_row import MeasuredRow
from tcsae.pipeline import main
from tcsae.train.formats.locate import read_sae
from tcsae.train.run_folder.record import load_run

WEIGHTS = "sae_weights.safetensors"
TRAIN = [
    *("--steps", "9", "--batch-size", "60", "--k", "4", "--width", "16", "--log-every", "2", "--checkpoint-every", "3"),
    *("--device", "cpu", "--dtype", "float32", "--no-baseline", "--name", "a"),
]


@dataclass
class Tally:
    """What one section promises, and how often it was kept."""

    name: str
    promise: str
    tried: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)

    def count(self, kept: bool, what: str) -> None:
        """One more try."""
        self.tried += 1
        self.survived += kept
        if not kept:
            self.failures.append(what)
            print(f"  {self.name}: {what}", file=sys.stderr, flush=True)


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a child ended: its status (negative: killed by that signal) and what it said."""

    status: int
    said: str

    @property
    def in_one_sentence(self) -> bool:
        """Whether it ended well, with one line of error, or with a report that names what it could not measure."""
        errors = [line for line in self.said.splitlines() if line.startswith(("error: ", "  failed "))]
        return self.status == 0 or (self.status in (1, 2) and len(errors) == 1 and "Traceback" not in self.said)


def child(work: Callable[[], int], *, memory: int | None = None) -> Ended:
    """Run in a process of its own: forked, so that torch need not be imported again."""
    with tempfile.TemporaryFile("w+", errors="replace") as words:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(words.fileno(), 1)
                os.dup2(words.fileno(), 2)
                torch.set_num_threads(1)
                if memory:
                    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
                status = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, code = os.waitpid(pid, 0)
        words.seek(0)
        return Ended(os.waitstatus_to_exitcode(code), words.read())


class Killed(Disk):
    """A disk whose process dies where the other one's power is cut."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "is_cut" and value:
            os.kill(os.getpid(), signal.SIGKILL)


# --- the stages -------------------------------------------------------------------------------------------------------


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


# --- the sections -----------------------------------------------------------------------------------------------------


def kills(scene: Scene) -> Iterator[Tally]:
    """Kill -9 before a random call that makes something durable or renames it."""
    for stage in stages(scene.base):
        tally = Tally(f"kill -9 · {stage.name}", "the same command ends with the same bytes")
        expected, calls = scene.whole(stage)
        for number in range(scene.times(100 if stage.name == "train" else 25)):
            out = scene.base / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            deaths = []
            for again in range(scene.dice(stage.name, number).randint(1, 3)):
                at = scene.dice(stage.name, number, again).randint(1, calls)
                deaths.append(at)

                child(partial(_until_killed, stage, out, at))
            wrong = goes_on(stage, out, expected)
            tally.count(wrong is None, f"killed at {deaths} of {calls}: {wrong}")
        yield tally


def _until_killed(stage: Stage, out: Path, at: int) -> int:
    Killed(out, pytest.MonkeyPatch(), cut_at=at)
    return stage.run(out)


def power(scene: Scene) -> Iterator[Tally]:
    """The power is cut before every call; what was not fsynced is gone, short or zero."""
    for stage in stages(scene.base):
        tally = Tally(f"power cut · {stage.name}", "what was finished is there, the same command ends the same")
        expected, calls = scene.whole(stage)
        tries = scene.times(6 if stage.name == "train" else 1)
        for at in range(1, calls + 1) if scene.scale >= 1 else range(1, calls + 1, max(1, round(1 / scene.scale))):
            for number in range(tries):
                out, after = scene.base / "out", scene.base / "after"
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()

                ended = child(partial(_until_the_cut, stage, out, after, at, scene.seed * 1000 + number))
                if ended.status:
                    tally.count(False, f"cut {at}: {ended.said[-300:]}")
                    continue
                shutil.rmtree(out)
                after.rename(out)
                wrong = goes_on(stage, out, expected)
                tally.count(wrong is None, f"cut {at} of {calls}, dice {number}: {wrong}")
        yield tally


def _until_the_cut(stage: Stage, out: Path, after: Path, at: int, seed: int) -> int:
    disk = Disk(out, pytest.MonkeyPatch(), cut_at=at, seed=seed)
    try:
        stage.run(out)
    except PowerCut:
        disk.survivors(after)
        return 0
    return 1


def flips(scene: Scene) -> Iterator[Tally]:
    """One bit, anywhere in one file, then the file is read as the commands do."""
    base = scene.base
    whole = base / "runs" / "a"
    expected = str(read_sae(whole)[1].state_dict()), load_run(whole)
    for name in (WEIGHTS, "cfg.json", "train.json"):
        tally = Tally(f"flipped bit · {name}", "named on reading, or without effect")
        for number in range(scene.times(200)):
            case = _flipped_copy(whole, base / "flip", name, scene.dice(name, number))

            def read(case: Path = case) -> object:
                return str(read_sae(case)[1].state_dict()), load_run(case)

            tally.count(_noticed(read, expected), f"try {number} is read as if nothing were wrong")
        yield tally
    report = scene.base / "whole" / "evaluate" / "r"
    if not report.exists():
        scene.whole(stages(base)[1])
    tally = Tally("flipped bit · results.json", "named on reading, or without effect")
    content = read_results(report)
    for number in range(scene.times(200)):
        case = _flipped_copy(report, base / "flip", "results.json", scene.dice("results", number))
        tally.count(_noticed(lambda case=case: read_results(case), content), f"try {number} is believed")
    yield tally
    row = next((report / "rows").rglob("*.npz"))
    tally = Tally("flipped bit · kept row of a report", "measured again, with a warning, or without effect")
    kept = repr(MeasuredRow.load(row))
    for number in range(scene.times(200)):
        case = _flipped_copy(row.parent, base / "flip", row.name, scene.dice("row", number))
        with redirect_stderr(io.StringIO()) as said:
            found = MeasuredRow.load(case / row.name)
        named = found is None and "measured again" in said.getvalue()
        tally.count(named or repr(found) == kept, f"try {number} is believed")
    yield tally
    yield _flipped_checkpoints(scene)


def _flipped_checkpoints(scene: Scene) -> Tally:
    tally = Tally("flipped bit · checkpoint", "named, the one before goes on, the end is the same")
    stage = stages(scene.base)[0]
    expected, calls = scene.whole(stage)
    stopped = scene.base / "stopped"
    shutil.rmtree(stopped, ignore_errors=True)
    stopped.mkdir()

    child(partial(_until_killed, stage, stopped, round(calls * 0.6)))
    files = sorted((stopped / "a/checkpoint").iterdir())
    for number in range(scene.times(60)):
        out = scene.base / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(stopped, out)
        dice = scene.dice("checkpoint", number)
        _flip(out / "a/checkpoint" / dice.choice(files).name, dice)
        wrong = goes_on(stage, out, expected)
        tally.count(wrong is None, f"try {number}: {wrong}")
    return tally


def _flip(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def _flipped_copy(folder: Path, case: Path, name: str, dice: random.Random) -> Path:
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy(file, case)
    _flip(case / name, dice)
    return case


def _noticed(read: Callable[[], object], expected: object) -> bool:
    from tcsae.errors import TcsaeError

    try:
        return read() == expected
    except TcsaeError as named:
        return "\n" not in str(named)


def full(scene: Scene) -> Iterator[Tally]:
    """A file system that ends after so many bytes; then there is room, and the same command is given again."""
    if os.geteuid():
        return
    for stage in stages(scene.base):
        tally = Tally(f"disk full · {stage.name}", "one sentence, nothing half written, the same command goes on")
        expected, _ = scene.whole(stage)
        size = sum(file.stat().st_size for file in (scene.base / "whole" / stage.name).rglob("*") if file.is_file())
        points = scene.times(40)
        for number in range(points):
            # Pages of 4 KiB, and for each folder and file a little of the kernel's own.
            room = 4096 * max(1, round((number + 0.5) / points * size * 1.5 / 4096))
            with mounted(["-t", "tmpfs", "-o", f"size={room}", "tmpfs"], scene.base / "disk") as disk:
                out = disk / "out"
                first = child(lambda out=out, stage=stage: stage.run(out))
                halves = [file.name for file in out.rglob("*.partial")] if out.exists() else []
                subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
                wrong = None if first.in_one_sentence else f"said {first.said[-300:]}"
                wrong = wrong or (f"left {halves[0]}" if halves else None) or goes_on(stage, out, expected)
                tally.count(wrong is None, f"room for {room} of {size} bytes: {wrong}")
        yield tally


@contextmanager
def mounted(what: list[str], at: Path) -> Iterator[Path]:
    """A file system for the block."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", *what, str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def device(scene: Scene) -> Iterator[Tally]:
    """ext4 (and xfs, where there is one) on a loop device; the power is cut by looking at a copy of its blocks."""
    if os.geteuid() or shutil.which("losetup") is None:
        return
    stage = stages(scene.base)[0]
    for kind in ("ext4", "xfs"):
        if shutil.which(f"mkfs.{kind}") is None:
            continue
        tally = Tally(f"power cut · train on {kind}", "what was finished is there, the same command ends the same")
        expected, _ = scene.whole(stage)
        for number in range(scene.times(40)):
            wrong = _cut_device(scene, kind, stage, expected, scene.dice(kind, number))
            tally.count(wrong is None, f"try {number}: {wrong}")
        yield tally


def _cut_device(scene: Scene, kind: str, stage: Stage, expected: object, dice: random.Random) -> str | None:
    image, copy = scene.base / "image", scene.base / "copy"
    with image.open("wb") as file:
        file.truncate((64 if kind == "ext4" else 320) << 20)
    subprocess.run([f"mkfs.{kind}", "-q", *(["-f"] if kind == "xfs" else ["-F"]), str(image)], check=True)
    with mounted(["-o", "loop", str(image)], scene.base / "disk") as disk:
        pid = os.fork()
        if pid == 0:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            torch.set_num_threads(1)
            os._exit(stage.run(disk / "out"))
        after_the_end = dice.random() < 0.3
        if not after_the_end:
            time.sleep(dice.random() * 0.8)
            os.kill(pid, signal.SIGSTOP)
        else:
            os.waitpid(pid, 0)
        subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
        if not after_the_end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    with mounted(["-o", "loop", str(copy)], scene.base / "disk") as disk:
        out = disk / "out"
        finished = (out / "a/train.json").exists() and load_run(out / "a").finished
        if after_the_end and not finished:
            return "a run that was finished is not finished any more"
        out.mkdir(exist_ok=True)
        return goes_on(stage, out, expected)


def writers(scene: Scene) -> Iterator[Tally]:
    """The same command twice at the same time."""
    for stage in stages(scene.base):
        tally = Tally(f"two at once · {stage.name}", "one sentence or the same end, never a mixture")
        expected, _ = scene.whole(stage)
        for number in range(scene.times(10)):
            out = scene.base / "out"
            shutil.rmtree(out, ignore_errors=True)
            pids = []
            for at in range(2):
                pid = os.fork()
                if pid == 0:
                    words = (scene.base / f"said{at}").open("w")
                    os.dup2(words.fileno(), 1)
                    os.dup2(words.fileno(), 2)
                    torch.set_num_threads(1)
                    time.sleep(at * scene.dice("writers", number).random() * 0.2)
                    try:
                        status = stage.run(out)
                    except BaseException:
                        traceback.print_exc()
                        status = 70
                    sys.stderr.flush()
                    os._exit(status)
                pids.append(pid)
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            said = [(scene.base / f"said{at}").read_text() for at in range(2)]
            good = all(Ended(*pair).in_one_sentence for pair in zip(statuses, said, strict=True)) and 0 in statuses
            wrong = None if good else f"{statuses}: {said}"
            wrong = wrong or goes_on(stage, out, expected)
            tally.count(wrong is None, f"try {number}: {wrong}")
        yield tally


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


SECTIONS = {each.__name__: each for each in (kills, power, device, flips, full, writers, inputs, fuzz)}


def markdown(tallies: list[Tally]) -> str:
    """The table of docs/RELIABILITY.md."""
    rows = [f"| {each.name} | {each.tried:,} | {each.survived:,} | {each.promise} |" for each in tallies]
    return "\n".join(["| what happened | tried | survived | what is promised |", "|---|---|---|---|", *rows])


def run() -> None:
    """Parse, torture, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--scale", type=float, default=1.0, help="of how often everything is tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="print the document's table and not JSON")
    options = parser.parse_args()
    tallies = []
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder).resolve(), options.scale, options.seed)
        prepare(scene.base)
        for name in options.only:
            for tally in SECTIONS[name](scene):
                print(f"{tally.name}: {tally.survived} of {tally.tried}", file=sys.stderr, flush=True)
                tallies.append(tally)
    if options.markdown:
        print(markdown(tallies))
    else:
        print(json.dumps({each.name: {"tried": each.tried, "survived": each.survived} for each in tallies}))
    if any(tally.failures for tally in tallies):
        raise SystemExit(1)


if __name__ == "__main__":
    run()
