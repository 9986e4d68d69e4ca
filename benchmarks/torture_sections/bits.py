"""Flipped bits: named on reading, or without effect."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import torch
from tcsae.errors import TcsaeError
from tcsae.evaluate.config import REFERENCES_FOLDER
from tcsae.evaluate.model.kept_states import KeptStates
from tcsae.evaluate.results import read_results
from tcsae.evaluate.table_row import MeasuredRow
from tcsae.train.formats.locate import read_sae
from tcsae.train.run_folder.record import load_run

from .children import Tally, child
from .stages import WEIGHTS, Scene, goes_on, stages
from .stops import until_killed


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
    yield _flipped_states(scene, next((report.parent / REFERENCES_FOLDER).rglob("*.safetensors")))
    yield _flipped_checkpoints(scene)


def _flipped_states(scene: Scene, kept: Path) -> Tally:
    tally = Tally("flipped bit · kept state of the model", "computed again, with a warning, or without effect")
    start, name = kept.stem.split("-", 1)

    def read(folder: Path) -> torch.Tensor | None:
        found = KeptStates(folder).get(slice(int(start), None), [name], torch.device("cpu"))
        return None if found is None else found[name]

    expected = read(kept.parent)
    assert expected is not None
    for number in range(scene.times(200)):
        case = _flipped_copy(kept.parent, scene.base / "flip", kept.name, scene.dice("states", number))
        with redirect_stderr(io.StringIO()) as said:
            found = read(case)
        named = found is None and "cannot be used" in said.getvalue()
        tally.count(named or (found is not None and torch.equal(found, expected)), f"try {number} is believed")
    return tally


def _flipped_checkpoints(scene: Scene) -> Tally:
    tally = Tally("flipped bit · checkpoint", "named, the one before goes on, the end is the same")
    stage = stages(scene.base)[0]
    expected, calls = scene.whole(stage)
    stopped = scene.base / "stopped"
    shutil.rmtree(stopped, ignore_errors=True)
    stopped.mkdir()

    child(partial(until_killed, stage, stopped, round(calls * 0.6)))
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
    try:
        return read() == expected
    except TcsaeError as named:
        return "\n" not in str(named)
