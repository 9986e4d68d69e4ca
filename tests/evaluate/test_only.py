"""--only: what is not asked for is not measured, and is absent rather than zero."""

from __future__ import annotations

import pytest
from tcsae.errors import UsageError
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import PARTS, EvaluateConfig, evaluate_config
from tcsae.evaluate.metrics.fidelity import OUTLIERS
from tcsae.evaluate.metrics.fidelity import definitions as fidelity_definitions
from tcsae.evaluate.model.splice import SplicedModel
from tcsae.evaluate.protocol import Findings
from tcsae.evaluate.report.terminal import print_outcomes
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

SMALL = {"batches": 3, "batch_rows": 4, "device": "cpu", "dtype": "float32"}
SPARSITY = {name + suffix for name in ("l0", "l1") for suffix in ("", OUTLIERS)}
COST = {"parameters", "forward_flops", "training_time", "training_memory"}
SIGNS = {
    "fidelity": {"ce", "kl", "explained_variance", "ce_score_mean", "kl_noise_floor"},
    "features": {"alive", "near_duplicate_share", "decoder_norm"},
    "temporal": {"temporal_variation", "adjacent_cosine", "run_length", "same_token_activation"},
    "position": {"eta_squared", "position_specific_share"},
}
CURVES = {"features": {"density"}, "temporal": {"lag_autocorrelation"}, "position": {"position_profile"}}


@pytest.fixture(scope="module", autouse=True)
def _no_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pair whose term sees half of the dictionary."""
    folder = tmp_path_factory.mktemp("only")
    model, text = tiny_model("llama", folder / "model"), tiny_corpus(folder / "text", documents=60, words=40)
    manifest = make_manifest(model, text, 1)
    make_run(folder / "runs", "tc", manifest, twin="twin")
    other = random_sae(manifest.d_model, 32, Activation("topk", k=3), 1)
    make_run(folder / "runs", "twin", manifest, role="twin", twin="tc", seed=1, sae=other)
    return folder


def evaluate(place, out, **more):
    return run_module.evaluate(EvaluateConfig(runs_folder=str(place / "runs"), out=str(out), **(SMALL | more)))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    return evaluate(place, tmp_path_factory.mktemp("whole"))[0].report


@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone_has_its_numbers_and_no_others(place, whole, tmp_path, part, monkeypatch, capsys):
    if part != "fidelity":
        refused = lambda *_: pytest.fail("nothing was to be spliced")  # noqa: E731
        monkeypatch.setattr(SplicedModel, "spliced", refused)
        monkeypatch.setattr(SplicedModel, "verify", lambda *_: [])
    monkeypatch.setattr(run_module, "probes", _no_probes)
    (outcome,) = evaluate(place, tmp_path, only=(part,))
    report = outcome.report
    assert f"only what was asked for is measured: {part}, and L0 and L1" in report.notes
    record = report.record("tc", 1)
    assert SIGNS[part] | SPARSITY <= record.metrics.keys()
    for other in set(PARTS) - {part}:
        assert not SIGNS[other] & record.metrics.keys(), other
        assert not CURVES.get(other, set()) & record.curves.keys()
    assert not [name for name in record.metrics if name.startswith(("probe_", "boundary", "prefix_shift"))]
    same = whole.record("tc", 1).metrics
    for name, metric in record.metrics.items():
        assert metric == same[name], name
    if part == "fidelity":
        assert record.metrics.keys() <= set(fidelity_definitions()) | COST
    assert bool(record.saebench_compat) == (part == "fidelity")
    assert bool(report.features) == (part == "features")
    names = {one.name for one in report.records if one.kind == "reference"}
    assert ("mean" in names) == ("zero_sae" in names) == (part == "fidelity")
    (pair,) = report.paired
    assert SIGNS[part] & pair.metrics.keys()
    assert "L0 differs" in pair.warning
    page = outcome.page.read_text()
    assert "only what was asked for is measured" in page
    print_outcomes([outcome], as_json=False)
    print_outcomes([outcome], as_json=True)
    assert "tc" in capsys.readouterr().out


def _no_probes(context, chosen):
    assert not [name for name, family in chosen.items() if family.probe is not None]
    return Findings()


def test_several_parts_and_rows_are_kept_apart(place, whole, tmp_path):
    (outcome,) = evaluate(place, tmp_path, only=("position", "temporal"), quick=True)
    record = outcome.report.record("twin", 1)
    assert SIGNS["position"] | SIGNS["temporal"] <= record.metrics.keys()
    assert not (SIGNS["fidelity"] | SIGNS["features"]) & record.metrics.keys()
    (outcome,) = evaluate(place, tmp_path, quick=True)
    assert SIGNS["fidelity"] <= outcome.report.record("twin", 1).metrics.keys()


def test_parts_are_named_as_they_are():
    assert evaluate_config(only="temporal").only == ("temporal",)
    with pytest.raises(UsageError, match=r"--only time is neither a part of an evaluation \(fidelity, features"):
        evaluate_config(only=["time"])
