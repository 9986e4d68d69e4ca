"""Evaluation on a GPU that is not there: every path by its devices, and the CPU's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import ON_A_GPU_IF_ASKED, fake_cuda
from tcsae.evaluate import run
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.features.cards import EFFECTS
from tcsae.evaluate.results import EvaluationReport, FeatureCard
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

pytestmark = ON_A_GPU_IF_ASKED


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 2, a text, and a run with its twin."""
    folder = tmp_path_factory.mktemp("evaluate")
    manifest = make_manifest(
        tiny_model("gemma2", folder / "model"), tiny_corpus(folder / "text", documents=60, words=40), 1
    )
    for name, role, twin, seed in (("tc", "tc", "twin", 1), ("twin", "twin", "tc", 2)):
        sae = random_sae(24, 16, Activation("relu"), seed)
        make_run(folder / "runs", name, manifest, sae=sae, role=role, twin=twin, seed=seed)
    return folder


def evaluated(place: Path, out: Path, device: str) -> EvaluationReport:
    (outcome,) = run.evaluate(
        EvaluateConfig(
            runs_folder=str(place / "runs"), out=str(out / device), batches=2, batch_rows=4, dtype="float32",
            device=device,
        )
    )  # fmt: skip
    assert not outcome.report.failures
    return outcome.report


def test_a_report_from_the_gpu(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
    expected = evaluated(place, tmp_path, "cpu")
    with fake_cuda() as mode:
        found = evaluated(place, tmp_path, "cuda")
    assert mode.n_operations > 500
    assert found.features
    for record in expected.records:
        mine = found.record(record.name, record.layer)
        assert mine.metrics.keys() == record.metrics.keys()
        for name, metric in record.metrics.items():
            if metric.value is None:
                assert mine.metrics[name].value is None, (record.name, name)
            else:
                assert mine.metrics[name].value == pytest.approx(metric.value, rel=2e-3, abs=2e-4), (record.name, name)
    for name, cards in expected.features.items():
        for mine, card in zip(found.features[name], cards, strict=True):
            check_card(mine, card)


def check_card(found: FeatureCard, expected: FeatureCard) -> None:
    """The browser shows the same feature with the same numbers, passages and effects."""
    assert (found.feature, found.why) == (expected.feature, expected.why)
    assert known(found.numbers) == pytest.approx(known(expected.numbers), rel=2e-3, abs=2e-4)
    for mine, passage in zip(found.passages, expected.passages, strict=True):
        assert (mine.tokens, mine.document, mine.peak) == (passage.tokens, passage.document, passage.peak)
        activations = [known(dict(enumerate(each.activations))) for each in (mine, passage)]
        assert activations[0] == pytest.approx(activations[1], rel=2e-3, abs=2e-4)
    for side in ("raises", "lowers"):
        effects = [[each.effect for each in getattr(card, side)] for card in (found, expected)]
        assert len(effects[1]) == EFFECTS
        assert effects[0] == pytest.approx(effects[1], rel=2e-3, abs=2e-4)


def known(numbers: Mapping[Any, float | None]) -> dict[Any, float]:
    return {name: value for name, value in numbers.items() if value is not None}
