"""From text to report through the three commands, as a user types them."""

import json
import math

import jsonschema
import pytest
from tcsae.evaluate.results import json_schema, read_results
from tcsae.pipeline import main
from tiny import KINDS, tiny_corpus


def say(capsys, *words: object) -> dict:
    """Run a command with --json and return what it said."""
    capsys.readouterr()
    assert main([*map(str, words), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", KINDS)
def test_extract_train_evaluate(kind, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if kind != "gemma2":  # drawing takes longer than everything else; once is enough
        monkeypatch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
    model, text = request.getfixturevalue(f"tiny_{kind}"), tiny_corpus(tmp_path / "text", documents=80, words=50)
    say(
        capsys,
        "extract",
        "--model",
        model,
        "--dataset",
        text,
        "--layers",
        1,
        3,
        "--tokens",
        1500,
        "--context",
        16,
        "--held-out",
        0.5,
    )
    for layer in (1, 3):
        say(
            capsys,
            "train",
            "--store",
            f"cache/l{layer}.zarr",
            "--steps",
            4,
            "--batch-size",
            64,
            "--width",
            48,
            "--k",
            4,
        )
    facts = say(capsys, "evaluate", "--batches", 4, "--batch-size", 8)
    (facts,) = facts["reports"]
    assert facts["failures"] == []
    report = read_results(facts["folder"])
    jsonschema.validate(json.loads((tmp_path / facts["folder"] / "results.json").read_text()), json_schema())
    saes = [record for record in report.records if record.kind == "sae"]
    assert sorted((record.layer, record.role) for record in saes) == [(1, "tc"), (1, "twin"), (3, "tc"), (3, "twin")]
    assert len(report.paired) == 2
    assert all(record.metrics["kl"].value > 0 for record in saes)
    assert not report.notes, "the shared prefix works for every architecture here"
    uniform = report.record("zero_all", 1).metrics["ce"].value == pytest.approx(
        math.log(report.model.vocab_size), abs=1e-4
    )
    assert uniform == (kind in ("gemma2", "gemma3", "llama")), "uniform exactly where nothing has a bias"
    assert (tmp_path / facts["page"]).stat().st_size > 10_000


def test_nothing_to_evaluate_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate"]) == 2
    assert "there is no finished run under runs/" in capsys.readouterr().err
