"""A study of a tiny model that takes seconds, and a stand-in for what judges it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel
from tcsae.study.file import StudyFile
from tcsae.study.members import StudyMember

FILE = """
name = "tiny"
question = "Does it run?"
scale = "small"

[train]
"data.batch_size" = 60
"data.pool" = 256
"sae.k" = 4
"sae.width" = 32
"run.dtype" = "float32"
"run.log_every" = 5
"run.checkpoint_every" = 5

[[variants]]
name = "none"
train = {{ "temporal.form" = "none" }}

[[variants]]
name = "next"
train = {{ "temporal.weight" = 0.1 }}

[[variants]]
name = "shuffled"
train = {{ "temporal.weight" = 0.1, "temporal.partner" = "shuffled" }}

[[comparisons]]
name = "next"
treatment = "next"
baseline = "none"
controls = ["shuffled"]

[[outcomes]]
metric = "explained_variance"
better = "higher"
kind = "fidelity"
margin = 0.01

[scales.small]
tokens = 1600
steps = 20
rows = 8
seeds = [0, 1]

[[scales.small.texts]]
model = "{model}"
dataset = "{text}"
layers = [1, 2]
options = {{ context = 16, held_out = 0.3, batch_size = 8, shard_bytes = 16000, dtype = "float32" }}

[scales.one]
tokens = 1600
steps = 12
rows = 4
seeds = [0]
variants = ["none", "next"]

[[scales.one.texts]]
model = "{model}"
dataset = "{text}"
layers = [1]
options = {{ context = 16, held_out = 0.3, dtype = "float32" }}
"""


def write_study(path: Path, model: Path, text: Path, **changes: str) -> Path:
    """The file, with some of its words changed: ``write_study(…, **{"0.1": "0.2"})``."""
    written = FILE.format(model=model, text=text)
    for old, new in changes.items():
        assert old in written
        written = written.replace(old, new)
    path.write_text(written)
    return path


class Analysis(BaseModel):
    """What the stand-in finds: who took part."""

    name: str
    rows: list[str]
    failures: dict[str, str]
    untrained: list[str | None] = []


def analyse(study: StudyFile, members: Sequence[StudyMember]) -> Analysis:
    """Every member with its value."""
    return Analysis(
        name=study.name,
        rows=[f"{each.model} {each.place} {each.variant} {each.seed}" for each in members if each.failure is None],
        failures={each.row: each.failure for each in members if each.failure is not None},
        untrained=[each.untrained for each in members],
    )


def write_page(analysis: Analysis, folder: Path) -> Path:
    """Its name."""
    page = folder / "index.html"
    page.write_text(analysis.name)
    return page


def write_document(analyses: Sequence[Analysis], path: Path) -> Path:
    """Their names."""
    path.write_text(" ".join(each.name for each in analyses))
    return path


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Put these in the place of what judges a study."""
    for name, functions in {
        "analysis": {"analyse": analyse, "Analysis": Analysis},
        "page": {"write_page": write_page},
        "document": {"write_document": write_document},
    }.items():
        module = ModuleType(f"tcsae.study.{name}")
        module.__dict__.update(functions)
        patch.setitem(sys.modules, module.__name__, module)
    patch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
