"""A study of a tiny model that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

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

[[outcomes]]
metric = "same_token"
better = "higher"
kind = "utility"

[rule]
resamples = 200

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


def without_figures(patch: pytest.MonkeyPatch) -> None:
    """Their files take longer than everything else here and have tests of their own."""
    for place in ("evaluate.report.page", "study.page", "study.document"):
        patch.setattr(f"tcsae.{place}.write_figures", lambda panels, folder: [])
