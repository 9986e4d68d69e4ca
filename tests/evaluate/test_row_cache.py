"""Kept rows belong to the code that measured them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tcsae.errors import UsageError
from tcsae.evaluate import row_cache
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.metrics.registry import METRICS, metric
from tcsae.evaluate.one_pass import Measurement
from tcsae.evaluate.row_cache import MEASURING, measuring_code
from tcsae.plugins import load_plugins
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run

ROOT = Path(row_cache.__file__).parents[1]
METRIC = """
import tcsae

@tcsae.metric("first_feature", over="tokens", text="mean activation of the first feature", unit="1")
def first_feature(tokens):
    return tokens.z[:, 0]
"""
PANEL = """
import tcsae

@tcsae.panel("time")
def nothing(report, layer):
    return None
"""


def load(folder: Path, name: str, text: str) -> dict[str, str]:
    (folder / name).write_text(text)
    return load_plugins([folder / name])


def test_all_that_measures_is_covered():
    for part in MEASURING:
        assert (ROOT / part).exists()
    for name in METRICS:
        module = ROOT / (METRICS.get(name).written_as.__module__.removeprefix("tcsae.").replace(".", "/") + ".py")
        assert any(module.is_relative_to(ROOT / part) for part in MEASURING), name


def test_the_code_is_another_after_a_change_of_any_source_file(tmp_path, monkeypatch):
    for part in MEASURING:
        for file in [ROOT / part] if part.endswith(".py") else (ROOT / part).rglob("*.py"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    before = measuring_code({})
    monkeypatch.setattr(row_cache, "__file__", str(tmp_path / "evaluate" / "row_cache.py"))
    assert measuring_code({}) == before
    for changed in ("evaluate/metrics/run_lengths.py", "evaluate/protocol.py", "train/sae/activation.py"):
        file = tmp_path / changed
        file.write_text(file.read_text() + "# a comment\n")
        assert measuring_code({}) not in (before, "")
        before = measuring_code({})


def test_a_metric_of_a_plugin_counts_and_a_panel_does_not(tmp_path):
    alone = measuring_code({})
    one = measuring_code(load(tmp_path, "mine.py", METRIC))
    other = measuring_code(load(tmp_path, "mine.py", METRIC + "# changed\n"))
    assert len({alone, one, other}) == 3
    assert measuring_code({}) == alone, "another call does not know the plug-in"
    assert measuring_code(load(tmp_path, "shown.py", PANEL)) == alone
    assert measuring_code(load(tmp_path, "patch.py", "x = 1\n")) != alone, "it may do anything"


def test_a_metric_without_a_file_is_known_by_its_source_or_refused(monkeypatch):
    before = dict(METRICS._entries)
    alone = measuring_code({})
    try:
        metric("typed_in", over="tokens", text="a metric of a notebook's cell")(lambda tokens: tokens.z[:, 0])
        assert measuring_code({}) != alone
        scope: dict = {}
        exec("def unseen(tokens):\n    return tokens.z[:, 1]", scope)
        metric("unseen", over="tokens", text="its source is nowhere")(scope["unseen"])
        with pytest.raises(UsageError, match=r"source of the metric 'unseen' cannot be read.*as a plug-in"):
            measuring_code({})
    finally:
        METRICS._entries.clear()
        METRICS._entries.update(before)


def test_rows_that_other_code_measured_are_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
    model, text = tiny_model("llama", tmp_path / "model"), tiny_corpus(tmp_path / "text", documents=40, words=40)
    run = make_run(tmp_path / "runs", "tc", make_manifest(model, text, 1))
    plugin = tmp_path / "mine.py"
    plugin.write_text(METRIC)
    measured: list[list[str]] = []
    real = Measurement.run

    def note_and_run(self, *a):
        measured.append([candidate.row.name for candidate in self.candidates])
        real(self, *a)

    monkeypatch.setattr(Measurement, "run", note_and_run)

    def evaluate():
        measured.clear()
        small = {"batches": 2, "batch_rows": 4, "device": "cpu", "dtype": "float32", "references": ("mean",)}
        places = {"runs": (str(run),), "out": str(tmp_path / "reports"), "plugins": (str(plugin),)}
        (outcome,) = run_module.evaluate(EvaluateConfig(**places, **small, quick=True))
        return outcome.report

    first = evaluate()
    assert measured == [["mean", "tc"]]
    assert first.plugins == {"mine.py": hashlib.sha256(METRIC.encode()).hexdigest()}
    assert evaluate().record("tc", 1) == first.record("tc", 1)
    assert measured == []
    plugin.write_text(METRIC.replace("tokens.z[:, 0]", "2 * tokens.z[:, 0]"))
    again = evaluate()
    assert measured == [["tc"]], "the splice of the mean does not depend on metrics"
    values = [report.record("tc", 1).metrics["first_feature"].value for report in (first, again)]
    assert values[1] == pytest.approx(2 * values[0])
    monkeypatch.setattr(run_module, "measuring_code", lambda plugins, of_saes=True: "another version")
    evaluate()
    assert measured == [["mean", "tc"]]
