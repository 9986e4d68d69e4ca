"""Coders that see windows and rows go through the same splice, metrics and report as those that see tokens."""

from __future__ import annotations

import numpy as np
import published
import pytest
import torch
from stores import make_store
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.metrics.active_entries import ActiveEntries
from tcsae.evaluate.metrics.windows import WindowMetrics
from tcsae.evaluate.protocol import TokenBatch
from tcsae.pipeline import main
from tcsae.train.config import SAEConfig
from tcsae.train.loss.partners import neighbours_in_rows
from tcsae.train.run_folder.record import load_run
from tcsae.train.sae.protocol import RowTokens
from tcsae.train.sae.temporal_sae import TemporalSAE
from tcsae.train.sae.tfa import TemporalFeatureAnalysis
from tcsae.train.sae.txc import TemporalCrosscoder
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run

D, F = 24, 32


def coder(architecture, **more):
    config = SAEConfig(architecture=architecture, width=F, k=4, b_dec="zero", **more)
    sae = {"txc": TemporalCrosscoder, "tfa": TemporalFeatureAnalysis, "sae": TemporalSAE}[architecture].build(config, D)
    sae.initialise(config, 0)
    return {"sae": sae.eval(), "sae_config": config.model_dump(mode="json")}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
        folder = tmp_path_factory.mktemp("rivals")
        model, text = tiny_model("llama", folder / "model"), tiny_corpus(folder / "text", documents=60, words=40)
        manifest = make_manifest(model, text, 1)
        for name, given in {
            "topk": coder("sae"),
            "txc": coder("txc", window=3, k_of="window"),
            "txc1": coder("txc", window=1),
            "tfa": coder("tfa", decoder="free", heads=2),
        }.items():
            make_run(folder / "runs", name, manifest, **given)
        small = {"batches": 3, "batch_rows": 4, "device": "cpu", "dtype": "float32"}
        (outcome,) = run_module.evaluate(
            EvaluateConfig(runs_folder=str(folder / "runs"), out=str(folder / "reports"), **small)
        )
        assert outcome.page is not None
        yield outcome


def records(outcome):
    return {record.name: record for record in outcome.report.records}


def value(outcome, name, metric):
    return records(outcome)[name].metrics[metric].value


def test_all_stand_in_one_table_with_their_untrained_twins(report):
    assert not report.report.failures
    there = records(report)
    assert {"topk", "txc", "txc1", "tfa", "untrained:topk", "untrained:txc", "untrained:tfa"} <= set(there)
    for name in ("topk", "txc", "tfa"):
        for metric in ("ce", "explained_variance", "l0", "temporal_variation", "prefix_shift", "forward_flops"):
            assert there[name].metrics[metric].value is not None
        # Nothing was trained, so that the twin, of the same seed, says the same.
        for metric in ("l0", "temporal_variation", "ce"):
            assert value(report, f"untrained:{name}", metric) == pytest.approx(value(report, name, metric), rel=1e-4)
        assert there[f"untrained:{name}"].kind == "reference"


def test_windows_of_one_are_a_plain_sae_and_l0_is_that_of_a_tokens_code(report):
    assert value(report, "txc", "l0") == pytest.approx(4, abs=0.3)
    assert value(report, "txc1", "l0") == pytest.approx(value(report, "topk", "l0"))
    assert value(report, "txc1", "explained_variance") == pytest.approx(value(report, "topk", "explained_variance"))
    assert value(report, "txc1", "explained_variance_window") == pytest.approx(
        value(report, "txc1", "explained_variance"), abs=0.05
    )  # fmt: skip
    assert value(report, "txc1", "incomplete_windows") == 0
    # Rows of 16 with BOS and one document: the first two tokens of 15.
    assert value(report, "txc", "incomplete_windows") == pytest.approx(2 / 15, abs=0.02)
    assert "incomplete_windows" not in records(report)["topk"].metrics


def test_both_parts_of_the_code_are_reported(report):
    tfa = records(report)["tfa"]
    assert value(report, "tfa", "l0_novel") == pytest.approx(4, abs=0.1)
    assert value(report, "tfa", "l0_predicted") > 4
    assert value(report, "tfa", "l0") >= value(report, "tfa", "l0_predicted")
    assert any("_predicted and _novel" in note for note in tfa.notes)
    assert "l0_novel" not in records(report)["txc"].metrics


def test_costs_stand_beside_quality(report):
    per_token = 2 * 2 * D * F
    assert value(report, "topk", "forward_flops") == per_token
    assert value(report, "txc", "forward_flops") == 3 * per_token
    attention = 4 * 2 * F * F + 2 * 8.5 * 2 * F
    assert value(report, "tfa", "forward_flops") == 2 * per_token + attention
    assert value(report, "tfa", "parameters") == F * D + D + 4 * F * F + 4 * F
    settings = records(report)["topk"].sae.settings
    assert settings["cost.parameters"] == 2 * F * D + F + D
    assert "FLOPs per token" in report.page.read_text()


@torch.no_grad()
def test_of_windows_only_complete_ones_count_for_the_whole():
    sae = coder("txc", window=3)["sae"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, D, generator=generator)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 0] = valid[1, 3] = False
    documents, units = torch.zeros(2, 6, dtype=torch.int64), torch.tensor([[0] * 6, [1] * 6])
    out = sae.token_coder().on_rows(x, RowTokens.of(valid, documents))
    metrics = WindowMetrics(torch.zeros(D))
    batch = TokenBatch(x, documents, documents, units, valid, valid, torch.arange(2), documents, documents)
    metrics.update(batch, ActiveEntries.from_dense(out.features, valid, out.parts), out.reconstruction)
    found = metrics.result().sums
    error = spread = 0.0
    whole = [(0, 3), (0, 4), (0, 5), (1, 2)]  # (1, 5) sees the token that does not count
    for row, t in whole:
        window = x[row, t - 2 : t + 1]
        error += float((window - sae(window).reconstruction).square().sum())
        spread += float(window.square().sum())
    sums = found["explained_variance_window"]
    assert 1 - float(sums.numerator_U.sum() / sums.denominator_U.sum()) == pytest.approx(1 - error / spread, rel=1e-5)
    assert (sums.offset, sums.scale) == (1, -1)
    assert np.array_equal(found["incomplete_windows"].numerator_U, [2, 4])
    assert np.array_equal(found["incomplete_windows"].denominator_U, [5, 5])


def test_neighbours_in_rows_share_a_document_and_no_token_that_is_left_out_lies_between():
    valid = torch.tensor([[True, True, True, False, True, True, True]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1]])
    assert neighbours_in_rows(valid, documents, 1).tolist() == [[1, 2, -1, -1, 5, -1]]
    assert neighbours_in_rows(valid, documents, 2).tolist() == [[2, -1, -1, -1, -1, -1]]


def test_the_record_says_what_a_training_took(tmp_path):
    store = make_store(tmp_path, rows=64)
    small = ["--steps", "3", "--batch-size", "60", "--width", "16", "--k", "3", "--out", str(tmp_path / "runs")]
    both = ["--sweep", "architecture=sae,txc", "--temporal", "none"]
    assert main(["--quiet", "train", "--store", str(store), *small, *both]) == 0
    for path in (tmp_path / "runs").iterdir():
        cost = load_run(path).cost
        assert cost["seconds"] > 0
        assert cost["members"] == 2
        assert cost["peak_memory_bytes"] > 1e6


def test_pruning_is_for_plain_saes(tmp_path, capsys):
    model, text = tiny_model("llama", tmp_path / "model"), tiny_corpus(tmp_path / "text", documents=5, words=20)
    path = make_run(tmp_path / "runs", "txc", make_manifest(model, text, 1), **coder("txc", window=3))
    assert main(["--quiet", "prune", str(path)]) == 1
    assert "which is no TemporalSAE" in capsys.readouterr().err


@torch.no_grad()
def test_saes_of_every_published_kind_stand_in_one_evaluation(tmp_path):
    model, text = tiny_model("llama", tmp_path / "model"), tiny_corpus(tmp_path / "text", documents=30, words=220)
    paths = {kind: write(tmp_path / kind, D, F) for kind, write in published.PUBLISHED.items()}
    small = {"batches": 2, "batch_rows": 4, "device": "cpu", "dtype": "float32", "quick": True}
    (outcome,) = run_module.evaluate(
        EvaluateConfig(
            saes=tuple(map(str, paths.values())), layers=(1,), model=str(model), dataset=str(text),
            out=str(tmp_path / "reports"), references=("mean",), **small,
        )
    )  # fmt: skip
    assert not outcome.report.failures
    found = {record.sae.source: record for record in outcome.report.records if record.sae is not None}
    assert set(found) == set(published.PUBLISHED)
    assert {(record.layer, record.kind) for record in found.values()} == {(1, "sae")}
    for record in found.values():
        for metric in ("ce", "explained_variance", "l0", "temporal_variation"):
            assert record.metrics[metric].value is not None, (record.name, metric)
    assert found["sparsify"].metrics["l0"].value == pytest.approx(3, abs=0.5)
    assert found["temporal-crosscoder"].metrics["incomplete_windows"].value > 0
    assert found["temporal-feature-analysis"].metrics["l0_novel"].value == pytest.approx(3, abs=0.5)
    page = outcome.page.read_text()
    assert all(record.name in page for record in found.values())
