"""Several processes: each its own device, and whatever would not come out as with one process is said."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from stores import make_store
from tcsae.train import passes, run
from tcsae.train.loop.distributed import World, seen_by_share
from tcsae.train.presets import build_config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"sae.activation": "relu", "temporal.form": "cosine"}, []),
        ({"temporal.partner": "l2"}, []),
        ({"sae.activation": "batchtopk"}, ["batchtopk's choice of the largest codes"]),
        ({"temporal.form": "normalised"}, ["the normalised form"]),
        ({"temporal.form": "contrastive"}, ["the contrastive form"]),
        ({"temporal.partner": "shuffled"}, ["the draw of shuffled partners"]),
        ({"temporal.form": "none", "temporal.partner": "other_document"}, []),
    ],
)  # fmt: skip
def test_what_is_no_mean_over_windows_is_named(changes, said):
    assert seen_by_share([build_config(None, None, changes)]) == said


@pytest.mark.parametrize(
    ("activation", "size", "warned"), [("batchtopk", 2, True), ("batchtopk", 1, False), ("relu", 2, False)]
)
def test_a_run_of_several_processes_says_what_will_differ(tmp_path, monkeypatch, capsys, activation, size, warned):
    class Alone(World):
        def wait(self):
            pass

        def agrees(self, facts):
            return True

    @contextmanager
    def joined(_device):
        yield Alone(0, size)

    store = make_store(tmp_path, rows=16, context=16, d_model=8)
    changes = {"data.store": str(store), "run.out": str(tmp_path / "runs"), "sae.activation": activation, "sae.k": 4}
    monkeypatch.setattr(run, "joined", joined)
    monkeypatch.setattr(passes, "_train_pass", lambda *_: {})
    run.train(build_config(None, None, changes | {"data.batch_size": 60, "run.steps": 2, "sae.width": 16}))
    sentence = "batchtopk's choice of the largest codes sees one process's share of a batch at a time: with 2 processes"
    assert (sentence in capsys.readouterr().err) == warned
