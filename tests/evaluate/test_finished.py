"""A finished report that is asked for again is shown: nothing heavy is imported, nothing is measured or drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tcsae.evaluate import finished
from tcsae.evaluate import run as run_module
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.finished import ASKED, shown_again
from tcsae.pipeline import main
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run

OPTIONS = ["--batches", "2", "--batch-size", "4", "--device", "cpu", "--dtype", "float32", "--quick"]
CONFIG = {"batches": 2, "batch_rows": 4, "device": "cpu", "dtype": "float32", "quick": True}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
    model, text = tiny_model("llama", tmp_path / "model"), tiny_corpus(tmp_path / "text", documents=40, words=40)
    make_run(tmp_path / "runs", "tc", make_manifest(model, text, 1))
    monkeypatch.chdir(tmp_path)
    (outcome,) = run_module.evaluate(EvaluateConfig(**CONFIG, references=("mean",)))
    assert outcome.folder.is_dir()
    return tmp_path


def asked(**more) -> list | None:
    return shown_again(EvaluateConfig(**CONFIG | {"references": ("mean",)} | more))


def test_it_is_shown_as_it_is_without_torch(place, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "evaluate", lambda config: pytest.fail("it is finished"))
    assert main(["evaluate", *OPTIONS, "--references", "mean"]) == 0
    captured = capsys.readouterr()
    assert "the report is shown as it is" in captured.err
    assert any(line.split()[:1] == ["mean"] for line in captured.out.splitlines())
    script = (
        "import sys\nfrom tcsae.pipeline import main\n"
        f"status = main({['evaluate', *OPTIONS, '--references', 'mean', '--json']})\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'sklearn', 'datasets'} & sys.modules.keys()\n"
        "raise SystemExit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    (facts,) = json.loads(done.stdout)["reports"]
    assert [record["name"] for record in facts["records"]] == ["mean", "tc"]


def test_another_question_is_no_answer(place):
    assert asked() is not None
    for other in ({"seed": 1}, {"batches": 3}, {"only": ("temporal",)}, {"references": ()}, {"fresh": True}):
        assert asked(**other) is None, other


CHANGED = (
    "model/config.json",
    "text",
    "runs/tc/sae_weights.safetensors",
    "runs/tc/train.json",
    "reports/model/results.json",
)


@pytest.mark.parametrize("where", CHANGED)
def test_a_file_that_changed_is_not_trusted(place, where):
    path = place / where
    if path.is_dir():
        path = sorted(path.rglob("*.txt"))[0]
    assert asked() is not None
    about = path.stat()
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)  # the same bytes in another file
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert asked() is None


def test_a_new_run_or_a_missing_page_or_other_code_or_versions_count(place, monkeypatch):
    page = place / "reports" / "model" / "index.html"
    page.rename(place / "away")
    assert asked() is None
    (place / "away").rename(page)
    assert asked() is not None
    with monkeypatch.context() as patch:
        patch.setattr(finished, "_code", lambda: "other")
        assert asked() is None
    with monkeypatch.context() as patch:
        patch.setattr(finished, "version", lambda package: "0")
        assert asked() is None
    (place / "runs" / "new").mkdir()
    (place / "runs" / "new" / "train.json").write_text("{}")
    assert asked() is None


def test_what_is_damaged_is_evaluated_again(place):
    kept = place / "reports" / "model" / ASKED
    whole = kept.read_text()
    for content in ("{", "[]", json.dumps({"question": 1}), whole.replace('"folder"', '"f"')):
        kept.write_text(content)
        assert asked() is None
    kept.write_text(whole)
    assert asked() is not None


def test_a_text_or_a_model_on_the_hub_may_change_without_a_trace(place):
    before = finished.Asked.of(EvaluateConfig(**CONFIG))
    before.reads(None)
    before.reads([place / "model"])
    assert before.inputs is None
