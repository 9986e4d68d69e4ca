"""Every example of docs/EXTENDING.md is a plug-in that does what the text beside it says, on tiny runs."""

import json
import re
from pathlib import Path

import pytest
from tcsae.evaluate.results import read_results
from tcsae.pipeline import main
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

PAGE = Path(__file__).parents[1] / "docs" / "EXTENDING.md"


def example(heading: str, folder: Path) -> Path:
    """The Python block under a heading, written to a file."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert section, f"docs/EXTENDING.md has no section '{heading}'"
    (code,) = re.findall(r"^```python\n(.*?)^```", section[1], flags=re.MULTILINE | re.DOTALL)
    assert 10 <= len(code.splitlines()) <= 30
    file = folder / f"{heading.replace(' ', '_').lower()}.py"
    file.write_text(code)
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pair of runs on a tiny model, with text enough for intervals."""
    folder = tmp_path_factory.mktemp("extending")
    model, text = tiny_model("llama", folder / "model"), tiny_corpus(folder / "text", documents=80, words=40)
    manifest = make_manifest(model, text, 1)
    make_run(folder / "runs", "tc", manifest, twin="twin")
    twin = random_sae(manifest.d_model, 32, Activation("topk", k=3), 1)
    make_run(folder / "runs", "twin", manifest, role="twin", twin="tc", sae=twin)
    return folder


def evaluate(place: Path, plugin: Path, capsys, *more: str) -> Path:
    """Evaluate both runs with a plug-in; the report's folder."""
    capsys.readouterr()
    words = [
        "evaluate",
        "--runs",
        str(place / "runs"),
        "--plugin",
        str(plugin),
        "--out",
        str(plugin.parent / "reports"),
    ]
    small = ["--batches", "8", "--batch-size", "4", "--device", "cpu", "--json", *more]
    assert main([*words, *small]) == 0
    return Path(json.loads(capsys.readouterr().out)["reports"][0]["folder"])


def test_a_metric(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
    plugin = example("A metric", tmp_path)
    folder = evaluate(place, plugin, capsys, "--quick")
    report, page = read_results(folder), (folder / "index.html").read_text()
    for name in ("tc", "twin", "untrained"):
        metric = report.record(name, 1).metrics["same_strongest"]
        assert 0 <= metric.low <= metric.value <= metric.high <= 1
        assert metric.n > 100
    (pair,) = report.paired
    difference = pair.metrics["same_strongest"]
    values = [report.record(name, 1).metrics["same_strongest"].value for name in ("tc", "twin")]
    assert difference.value == pytest.approx(values[0] - values[1])
    assert difference.low <= difference.value <= difference.high
    definition = report.definitions["same_strongest"]
    assert (definition.unit, definition.better, definition.group) == ("share", "higher", "time")
    assert list(report.plugins) == ["a_metric.py"]
    main_table = re.search(r'<section id="table">.*?</section>', page, re.DOTALL)[0]
    assert "same strongest feature" in main_table
    assert definition.text in page
    assert f"a_metric.py (SHA-256 {report.plugins['a_metric.py'][:12]}…)" in page


def test_a_report_panel(place, tmp_path, capsys):
    plugin = example("A report panel", tmp_path)
    folder = evaluate(place, plugin, capsys, "--quick")
    page = (folder / "index.html").read_text()
    section = re.search(r'<section id="position">.*?</section>', page, re.DOTALL)[0]
    assert "The same token elsewhere, layer 1" in section
    assert 'id="figure-token-or-position-1"' in section
    assert {"token-or-position-1.png", "token-or-position-1.svg"} <= {
        one.name for one in (folder / "figures").iterdir()
    }
