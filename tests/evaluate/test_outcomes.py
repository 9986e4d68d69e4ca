"""Outcomes that are not in the loss, through a whole evaluation of a text with labels."""

from __future__ import annotations

import pytest
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.metrics.probing.sparse_probes import TARGETS
from tcsae.evaluate.results import read_results
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outcomes")
    model = tiny_model("gemma2", folder / "model")
    for seed, label in enumerate(("law", "music", "sports")):
        tiny_corpus(folder / "text" / label, documents=24, words=60, seed=seed)
    manifest = make_manifest(model, folder / "text", 1)
    make_run(folder / "runs", "tc", manifest, twin="twin")
    sae = random_sae(24, 32, Activation("topk", k=3), 1)
    make_run(folder / "runs", "twin", manifest, role="twin", twin="tc", seed=1, sae=sae)
    return folder


@pytest.fixture(scope="module")
def report(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
        small = {"batches": 10, "batch_rows": 8, "device": "cpu", "dtype": "float32"}
        references = ("identity_bf16", "mean", "untrained", "untrained_twins")
        config = EvaluateConfig(
            runs_folder=str(place / "runs"), out=str(place / "reports"), references=references, **small
        )
        (outcome,) = run_module.evaluate(config)
    return outcome.report


def test_saes_and_untrained_rows_have_every_outcome_and_the_report_the_labels(place, report):
    assert report.text.labels == ["law", "music", "sports"]
    keys = [f"probe_{name}_{what}" for name in TARGETS for what in ("k1", "k5", "k20", "permuted")]
    keys += [f"probe_activation_{name}" for name in TARGETS]
    keys += ["boundary", "boundary_control", "boundary_activation"]
    for name in ("tc", "twin", "untrained", "untrained:topk"):
        found = report.record(name, 1).metrics
        for key in keys:
            assert 0 <= found[key].value <= 1, (name, key)
            assert found[key].low <= found[key].value <= found[key].high, (name, key)
        assert "prefix_shift" in found
    assert read_results(place / "reports" / "model") == report
    page = (place / "reports" / "model" / "index.html").read_text()
    assert "position, k = 20" in page
    assert "seam found" in page


def test_the_ceiling_is_measured_once_and_shown_in_every_row(report):
    key = "probe_activation_topic_token"
    values = {report.record(name, 1).metrics[key].value for name in ("identity_bf16", "tc", "twin", "untrained")}
    assert len(values) == 1
    assert key not in report.record("mean", 1).metrics


def test_the_pair_is_compared_in_what_the_codes_decide(report):
    (pair,) = report.paired
    found = pair.metrics["probe_position_k5"]
    values = [report.record(name, 1).metrics["probe_position_k5"].value for name in ("tc", "twin")]
    assert found.value == pytest.approx(values[0] - values[1])
    assert "boundary" in pair.metrics
    assert not any("activation" in name for name in pair.metrics if name.startswith(("probe", "boundary")))
