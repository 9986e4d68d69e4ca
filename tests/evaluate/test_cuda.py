"""Evaluation on a GPU that is not there: every path by its devices, and the CPU's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda
from tcsae.evaluate import run
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.results import EvaluationReport
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is at hand")


def test_a_whole_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])  # noqa: ARG005
    model, text = tiny_model("gemma2", tmp_path / "model"), tiny_corpus(tmp_path / "text", documents=60, words=40)
    manifest = make_manifest(model, text, 1)
    make_run(tmp_path / "runs", "tc", manifest, twin="twin")
    relu = random_sae(24, 32, Activation("relu"), 1)
    make_run(tmp_path / "runs", "twin", manifest, role="twin", twin="tc", sae=relu)

    def report(device: str) -> EvaluationReport:
        small = {"batches": 2, "batch_rows": 4, "dtype": "float32", "device": device, "out": str(tmp_path / device)}
        (outcome,) = run.evaluate(EvaluateConfig(runs_folder=str(tmp_path / "runs"), **small))
        assert not outcome.report.failures
        return outcome.report

    expected = report("cpu")
    with fake_cuda() as mode:
        found = report("cuda")
    assert mode.n_operations > 1000
    for record in expected.records:
        mine = found.record(record.name, record.layer)
        assert mine.metrics.keys() == record.metrics.keys()
        for name, metric in record.metrics.items():
            if metric.value is None:
                assert mine.metrics[name].value is None, (record.name, name)
            else:
                assert mine.metrics[name].value == pytest.approx(metric.value, rel=2e-3, abs=2e-4), (record.name, name)
