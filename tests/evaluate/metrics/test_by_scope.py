"""An SAE whose temporal term sees part of the dictionary is measured by part, and so is its twin."""

import pytest
import torch
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.metrics.active_entries import ActiveEntries
from tcsae.evaluate.metrics.all import families
from tcsae.evaluate.metrics.by_scope import ByScope
from tcsae.evaluate.metrics.temporal import TemporalStatistics
from tcsae.train.run_folder.record import load_run
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae
from worlds import batch_of, value

INSIDE = 3


def test_each_part_is_measured_as_if_the_other_were_not_there():
    sae = random_sae(4, 8, Activation("relu")).requires_grad_(False)
    x = torch.randn(6, 12, 4, generator=torch.Generator().manual_seed(0))
    z = sae.encode(x).detach()
    batch = batch_of(z, x_BTD=x)
    part = ByScope(sae, families(), context=12, seed=0, inside=INSIDE)
    part.update(batch, ActiveEntries.from_dense(z, batch.valid_BT), x)
    found = part.result()
    assert (found.sums.keys() | found.metrics.keys()) <= part.definitions.keys()
    kept_x = x[batch.valid_BT].double()
    for name, z_part, rows in (
        ("high", z[..., :INSIDE], sae.W_dec[:INSIDE]),
        ("low", z[..., INSIDE:], sae.W_dec[INSIDE:]),
    ):
        kept_z = z_part[batch.valid_BT].double()
        assert value(found.sums[f"l0_{name}"]) == pytest.approx(float((kept_z > 0).sum(1).double().mean()))
        rebuilt = kept_z @ rows.double() + sae.b_dec.double()
        explained = 1 - (kept_x - rebuilt).square().sum() / (kept_x - kept_x.mean(0)).square().sum()
        assert value(found.sums[f"explained_variance_{name}"]) == pytest.approx(float(explained), rel=1e-5)
        alone = TemporalStatistics(random_sae(4, z_part.shape[-1], Activation("relu")), context=12, seed=0)
        alone.update(batch, ActiveEntries.from_dense(z_part, batch.valid_BT), x)
        whole = alone.result()
        for key in ("temporal_variation", "smoothness", "run_length"):
            assert value(found.sums[f"{key}_{name}"]) == pytest.approx(value(whole.sums[key])), key
        key = "lag1_autocorrelation"
        assert found.metrics[f"{key}_{name}"].value == pytest.approx(whole.metrics[key].value)
    assert found.notes == ["metrics ending in _high are of its first 3 features, in _low of the other 5"]


def test_a_twin_is_split_where_its_tc_sae_is_and_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
    model, text = tiny_model("llama", tmp_path / "model"), tiny_corpus(tmp_path / "text", documents=40, words=40)
    manifest = make_manifest(model, text, 1)
    names = {"tc": {"twin": "twin"}, "twin": {"role": "twin", "twin": "tc", "seed": 1}, "alone": {"seed": 2}}
    paths = [make_run(tmp_path / "runs", name, manifest, **settings) for name, settings in names.items()]
    record = load_run(paths[0])
    record.model_copy(update={"config": record.config | {"temporal": {"scope": 0.25}}}).save(paths[0])
    small = {"batches": 2, "batch_rows": 4, "device": "cpu", "dtype": "float32", "references": ("mean",), "quick": True}
    config = EvaluateConfig(runs=tuple(map(str, paths)), out=str(tmp_path / "reports"), **small)
    (outcome,) = run_module.evaluate(config)
    report = outcome.report
    for name in ("tc", "twin"):
        metrics = report.record(name, 1).metrics
        assert metrics["l0_high"].value + metrics["l0_low"].value == pytest.approx(metrics["l0"].value)
        assert "its first 8 features" in report.record(name, 1).notes[-1]
    assert not any(key.endswith("_high") for key in report.record("alone", 1).metrics)
    (pair,) = report.paired
    assert {"temporal_variation_high", "temporal_variation_low", "eta_squared_high"} <= pair.metrics.keys()
    assert {metric.definition for metric in pair.metrics.values()} <= report.definitions.keys()
