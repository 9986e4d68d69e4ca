"""A study of runs that were evaluated in a language model: its effects are the report's own paired differences."""

from __future__ import annotations

import pytest
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.run import evaluate
from tcsae.study.analysis import analyse
from tcsae.study.file import StudyFile
from tcsae.study.members import StudyMember
from tcsae.study.page import render_page
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run

METRICS = {"kl": "lower", "kl_score_mean": "higher", "eta_squared": "lower", "temporal_variation": "lower"}
METRICS |= {"same_token": "higher", "position_specific_share": "lower"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pair of one seed, its report, and the study's analysis of both."""
    folder = tmp_path_factory.mktemp("real")
    model, text = tiny_model("llama", folder / "model"), tiny_corpus(folder / "text", documents=120, words=40)
    manifest = make_manifest(model, text, 1)
    runs = [
        make_run(folder / "runs", "l1-tc", manifest, twin="l1-twin"),
        make_run(folder / "runs", "l1-twin", manifest, role="twin", twin="l1-tc", seed=1),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
        (outcome,) = evaluate(
            EvaluateConfig(
                runs=tuple(map(str, runs)), out=str(folder / "reports"), batches=10, batch_rows=4, device="cpu",
                dtype="float32", quick=True, references=("mean", "untrained_twins"),
            )
        )  # fmt: skip
    study = StudyFile.model_validate(
        {
            "name": "real",
            "question": "Is one better?",
            "scales": {
                "small": {
                    "tokens": 1000, "steps": 10, "rows": 40, "seeds": [0],
                    "texts": [{"model": str(model), "dataset": str(text), "layers": [1]}],
                }
            },
            "variants": [{"name": "tc"}, {"name": "twin"}],
            "comparisons": [{"name": "the term", "treatment": "tc", "baseline": "twin"}],
            "outcomes": [
                {"metric": name, "better": better, "kind": "utility"} for name, better in METRICS.items()
            ],
        }
    )  # fmt: skip
    members = [
        StudyMember("tiny", "l1", run.name.removeprefix("l1-"), 0, run.name, "untrained:topk", outcome.folder, run)
        for run in runs
    ]
    return outcome.report, analyse(study, members)


@pytest.mark.parametrize("name", METRICS)
def test_effects_are_the_reports_paired_differences(world, name):
    report, analysis = world
    (pair,) = report.paired
    found = next(one.effect for one in analysis.comparisons[0].outcomes if one.metric == name)
    if name not in pair.metrics:  # a count without an interval, and so without a pair
        values = [report.record(side, 1).metrics[name].value for side in ("l1-tc", "l1-twin")]
        assert found.value == pytest.approx(values[0] - values[1])
        assert found.text_low is None
        return
    expected = pair.metrics[name]
    assert found.value == pytest.approx(expected.value)
    width = expected.high - expected.low
    assert found.text_low == pytest.approx(expected.low, abs=0.15 * width)
    assert found.text_high == pytest.approx(expected.high, abs=0.15 * width)


def test_one_architecture_has_one_twin_which_cancels(world):
    _, analysis = world
    for one in analysis.comparisons[0].outcomes:
        assert one.untrained.value == pytest.approx(one.effect.value)


def test_its_page_names_model_and_text(world):
    report, analysis = world
    page = render_page(analysis)
    assert f"{report.n_tokens:,} held-out tokens" in page
    assert "untrained:topk" in page
    assert {curve.series for curve in analysis.curves} >= {"loss", "temporal_share"}
