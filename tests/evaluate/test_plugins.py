"""Plug-ins of an evaluation: what happens when they fail, are missing or are not what a run was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tcsae.evaluate.results import read_results
from tcsae.pipeline import main
from tcsae.train.run_folder.record import load_run
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run

TERM = """
import tcsae
from tcsae.train.loss.registry import temporal_term

@temporal_term("second_difference")
def second_difference(z_NWF, pairs):
    return (z_NWF[:, 2:] - 2 * z_NWF[:, 1:-1] + z_NWF[:, :-2]).square().sum(-1).mean()
"""
ACTIVATION = """
from tcsae.train.sae.activation import ActivationFunction
from tcsae.train.sae.registry import activation

@activation("absolute")
class Absolute(ActivationFunction):
    pass
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    model, text = tiny_model("llama", folder / "model"), tiny_corpus(folder / "text", documents=40, words=40)
    make_run(folder / "runs", "plain", make_manifest(model, text, 1))
    return folder


pytestmark = pytest.mark.usefixtures("no_figures")


def evaluate(place: Path, out: Path, capsys, *words: object, expect: int = 0):
    capsys.readouterr()
    small = ["--batches", "2", "--batch-size", "4", "--device", "cpu", "--quick", "--json", "--out", str(out)]
    assert main(["evaluate", *map(str, words), *small]) == expect
    said = capsys.readouterr()
    return (read_results(json.loads(said.out)["reports"][0]["folder"]) if said.out else None), said.err


def trained_with(place: Path, name: str, plugins: dict[str, str], **sae: str) -> Path:
    """A run whose record says that it was trained with these plug-ins."""
    manifest = make_manifest(place / "model", place / "text", 1)
    run = make_run(place / "others", name, manifest)
    record = load_run(run)
    config = record.config | {"sae": record.config["sae"] | sae}
    record.model_copy(update={"plugins": plugins, "config": config}).save(run)
    return run


def test_a_plugin_that_does_not_run_is_one_sentence(place, tmp_path, capsys):
    plugin = tmp_path / "broken.py"
    plugin.write_text("import tcsae\n\nraise ValueError('no')\n")
    _, said = evaluate(place, tmp_path, capsys, "--runs", place / "runs", "--plugin", plugin, expect=2)
    assert "broken.py does not run: ValueError in line 3: no" in said
    _, said = evaluate(place, tmp_path, capsys, "--plugin", tmp_path / "gone.py", expect=2)
    assert "there is no plug-in " in said


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "@tcsae.metric('bad', over='pairs', text='a metric with an error')\n"
            "def bad(first, second):\n    return first.z @ second.z\n",
            "the metric 'bad' of the plug-in mine.py fails: RuntimeError in line 4:",
        ),
        (
            "@tcsae.panel('time')\ndef bad(report, layer):\n    return report.nothing\n",
            "the report panel 'bad' of the plug-in mine.py fails: AttributeError in line 4:",
        ),
    ],
    ids=["metric", "panel"],
)
def test_a_plugin_that_fails_at_work_is_named_with_its_line(place, tmp_path, capsys, source, words):
    plugin = tmp_path / "mine.py"
    plugin.write_text("import tcsae\n" + source)
    _, said = evaluate(place, tmp_path, capsys, "--runs", place / "runs", "--plugin", plugin, expect=2)
    assert words in said
    assert "Traceback" not in said


def test_a_plugin_may_use_the_modules_that_register_metrics_and_panels(place, tmp_path, capsys):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import tcsae\nfrom tcsae.evaluate.metrics.position import eta_squared\n"
        "from tcsae.evaluate.report.panels.time import time_plane\n"
        "tcsae.panel('time', name='again')(lambda report, layer: None)\n"
    )
    report, _ = evaluate(place, tmp_path, capsys, "--runs", place / "runs", "--plugin", plugin)
    assert "eta_squared" in report.record("plain", 1).metrics


def test_a_run_that_was_trained_with_a_plugin_asks_for_it(place, tmp_path, capsys):
    run = trained_with(place, "asks", {"term.py": "0123456789abcdef"})
    report, _ = evaluate(place, tmp_path, capsys, "--run", place / "runs" / "plain", run, expect=1)
    (failure,) = report.failures
    assert failure.path == str(run)
    assert "was trained with the plug-in term.py (SHA-256 0123456789ab…)" in failure.message
    assert failure.message.endswith("add --plugin term.py")


def test_a_changed_term_is_noted_and_the_run_is_evaluated(place, tmp_path, capsys):
    plugin = tmp_path / "term.py"
    plugin.write_text(TERM)
    run = trained_with(place, "changed", {"term.py": "0123456789abcdef"})
    changed = "the plug-in term.py has changed since training (SHA-256 0123456789ab… then"
    for words in (changed, "nothing has changed since this was evaluated"):  # measured, and shown again
        report, said = evaluate(place, tmp_path, capsys, "--run", run, "--plugin", plugin)
        assert words in said
        (note,) = [note for note in report.record("changed", 1).notes if "term.py" in note]
        assert note.endswith("the weights are those of the training")
        page = (tmp_path / "model" / "index.html").read_text()
        assert "has changed since training" in page
    record = load_run(run)
    same = {"term.py": report.plugins["term.py"]}
    record.model_copy(update={"plugins": same}).save(run)
    report, _ = evaluate(place, tmp_path, capsys, "--run", run, "--plugin", plugin)
    assert not any("term.py" in note for note in report.record("changed", 1).notes)


def test_a_changed_architecture_is_a_failure(place, tmp_path, capsys):
    plugin = tmp_path / "maker.py"
    plugin.write_text(ACTIVATION)
    run = trained_with(place, "other", {"maker.py": "0123456789abcdef"}, activation="absolute")
    words = ["--run", place / "runs" / "plain", run, "--plugin", plugin]
    report, _ = evaluate(place, tmp_path, capsys, *words, expect=1)
    (failure,) = report.failures
    assert "maker.py has changed since training" in failure.message
    assert "says what this SAE computes: evaluate with the file as it was" in failure.message
