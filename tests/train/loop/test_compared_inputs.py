"""What is compared with what, on the input side: shares and cosines against loops, in the log and in the record."""

from __future__ import annotations

import pytest
import torch
from stores import make_store
from tcsae.cache.views import TokenBatch
from tcsae.console import speaking
from tcsae.errors import UsageError
from tcsae.train import passes, run
from tcsae.train.loop.compared_inputs import compared_inputs, in_words
from tcsae.train.presets import build_config
from tcsae.train.run_folder.record import load_run

SMALL = {
    "data.batch_size": 120, "data.pool": 512, "sae.k": 4, "sae.width": 32, "run.steps": 4, "run.device": "cpu",
    "run.dtype": "float32", "temporal.weight": 0.1,
}  # fmt: skip


def by_loops(batch, x, mean, partner, lag):
    n, w, _ = x.shape
    if partner is None:
        pairs = [((i, t), (i, t + lag)) for i in range(n) for t in range(w - lag)]
    else:
        pairs = [((i, t), divmod(int(partner[i, t]), w)) for i in range(n) for t in range(w - 1) if partner[i, t] >= 0]

    def near(a, b):
        same = batch.rows_N[a[0]] == batch.rows_N[b[0]]
        return bool(same) and abs(int(batch.positions_NW[a]) - int(batch.positions_NW[b])) == 1

    def cosine(a, b):
        u, v = x[a] - mean, x[b] - mean
        return float(u @ v / u.norm() / v.norm())

    real = [((i, t), (i, t + 1)) for i in range(n) for t in range(w - 1) if near((i, t), (i, t + 1))]
    return {
        "pairs": len(pairs),
        "neighbours": sum(near(*pair) for pair in pairs) / len(pairs),
        "cosine": sum(cosine(*pair) for pair in pairs) / len(pairs),
        "neighbours_cosine": sum(cosine(*pair) for pair in real) / len(real) if real else None,
    }


@pytest.mark.parametrize("kind", ["next", "lag", "given", "pairs"])
def test_facts_equal_their_loops(kind):
    generator = torch.Generator().manual_seed(0)
    n, w = 6, 2 if kind == "pairs" else 4
    x, mean = torch.randn(n, w, 5, generator=generator), torch.randn(5, generator=generator)
    positions = torch.tensor([0, 4, 9, 3, 7, 12])[:, None] + torch.arange(w)
    if kind == "pairs":
        positions[:, 1] += torch.tensor([0, 3, 0, 1, 5, 2])
    batch = TokenBatch(x.bfloat16(), torch.zeros(n), torch.tensor([0, 0, 0, 1, 1, 1]), positions)
    partner = torch.randint(-1, n * w, (n, w - 1), generator=generator) if kind == "given" else None
    lag = 2 if kind == "lag" else 1
    found = compared_inputs(batch, x, mean, partner, lag)
    assert found == pytest.approx(by_loops(batch, x, mean, partner, lag), rel=1e-4)
    if kind in ("next", "lag"):
        assert found["neighbours"] == (1.0 if kind == "next" else 0.0)
    assert f"{found['neighbours']:.1%}" in in_words(kind, found)


def test_a_batch_without_pairs_is_said():
    x = torch.randn(2, 3, 4)
    batch = TokenBatch(x, torch.zeros(2), torch.arange(2), torch.arange(3).expand(2, 3))
    facts = compared_inputs(batch, x, torch.zeros(4), torch.full((2, 2), -1), 1)
    assert (facts["pairs"], facts["cosine"]) == (0, None)
    assert in_words("other_document", facts) == "partner other_document: the first batch has no pairs"


def test_every_partner_is_checked_on_the_inputs_and_kept(tmp_path, capsys):
    store = make_store(tmp_path / "cache", rows=96, context=64, d_model=8, documents=24)
    about = {"data.store": str(store), "run.out": str(tmp_path / "runs")}
    partners = ("next", "same_document", "other_document", "shuffled", "l2", "earlier")
    with speaking(True):
        done = run.train(build_config(None, None, SMALL | about), sweep={"temporal.partner": partners})
    said = capsys.readouterr().err
    assert "batches hold 8 windows of one row and document side by side (data.siblings)" in said
    records = {record.config["temporal"]["partner"]: record for record in map(load_run, done.runs) if record.pairs}
    assert set(records) == set(partners)
    facts = {name: record.pairs for name, record in records.items()}
    assert facts["next"]["neighbours"] == facts["l2"]["neighbours"] == 1.0
    assert facts["other_document"]["neighbours"] == facts["shuffled"]["neighbours"] == 0.0
    assert facts["same_document"]["neighbours"] < 0.1
    assert facts["next"]["cosine"] == facts["next"]["neighbours_cosine"] == facts["shuffled"]["neighbours_cosine"]
    for name in partners:
        assert f"partner {name}: {facts[name]['neighbours']:.1%} of the first batch's" in said
    twins = [load_run(path) for path in done.runs if load_run(path).config["temporal"]["form"] == "none"]
    assert [twin.pairs for twin in twins] == [{}] * len(twins)
    assert {
        record.config["data"]["siblings"] for record in records.values() if record.config["data"]["view"] == "windows"
    } == {8}


def test_facts_of_a_stopped_run_are_those_of_its_beginning(tmp_path, monkeypatch):
    store = make_store(tmp_path / "cache", rows=96, context=64, d_model=8, documents=24)
    changes = SMALL | {"data.store": str(store), "run.out": str(tmp_path / "runs"), "run.checkpoint_every": 2}
    config = build_config(None, None, changes | {"temporal.partner": "shuffled", "run.baseline": False})
    with monkeypatch.context() as patch:
        patch.setattr(passes, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.train(config)
    (path,) = (tmp_path / "runs").iterdir()
    begun = load_run(path)
    assert begun.pairs["neighbours"] == 0.0
    assert load_run(run.train(config).runs[0]).pairs == begun.pairs


def test_rows_that_hold_one_window_are_refused(tmp_path):
    store = make_store(tmp_path / "cache", rows=16, context=16, d_model=8)
    changes = SMALL | {"data.store": str(store), "run.out": str(tmp_path), "data.window": 9}
    config = build_config(None, None, changes | {"temporal.partner": "shuffled"})
    with pytest.raises(
        UsageError, match=r"shuffled takes tokens of several windows of a row, and rows of 16 positions"
    ):
        run.train(config)
