"""inspect and verify from the command line: what they print, as text and as JSON, and how they end."""

import json
from types import SimpleNamespace

import pytest
import torch
from clusters import cluster_elsewhere
from mutations import corpus
from stores import make_manifest, make_store
from synthetic import synthetic_report
from tcsae import commands
from tcsae.cache import cluster
from tcsae.cache.statistics import STATISTICS
from tcsae.cache.store import ActivationStore
from tcsae.evaluate.results import write_results
from tcsae.pipeline import main
from tcsae.study.state import StageState, StudyState
from tiny import tiny_corpus


def ask(capsys, *args):
    """Exit status, standard output, standard error of ``pipeline args``."""
    status = main([str(a) for a in args])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_inspect_a_store(tmp_path, capsys):
    path = make_store(tmp_path, rows=45)
    status, out, _ = ask(capsys, "inspect", path, "--json")
    facts = json.loads(out)
    assert status == 0
    assert (facts["rows"], facts["tokens"], facts["layer"], facts["finished"]) == (45, 720, 3, True)
    assert facts["fingerprint"] == ActivationStore.open(path).fingerprint()
    assert facts["special_mean_norm"] > 10 * facts["median_norm"]
    assert set(facts["norm_by_position"]) == {"0", "1", "2", "4", "8", "15"}
    picture = tmp_path / "norms.png"
    status, out, _ = ask(capsys, "inspect", path, "--picture", picture)
    assert status == 0
    assert "special mean norm" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets that Dask's event loop closes late
def test_inspect_computes_on_a_cluster_elsewhere(tmp_path, capsys, monkeypatch):
    here, there = (make_store(tmp_path / name, rows=45) for name in ("here", "there"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with cluster_elsewhere(folder=tmp_path / "elsewhere") as (address, process):
        status, out, _ = ask(capsys, "inspect", "there/l3.zarr", "--scheduler", address, "--json")
        assert status == 0
        process.kill()
        process.wait()
        monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
        (there / STATISTICS).unlink()
        status, _, said = ask(capsys, "inspect", there, "--scheduler", address)
        assert status == 1
        assert (
            f"no Dask scheduler answers at {address}: start one with `dask scheduler`, or leave --scheduler out" in said
        )
    monkeypatch.undo()
    facts, expected = json.loads(out), json.loads(ask(capsys, "inspect", here, "--json")[1])
    assert {**facts, "path": ""} == {**expected, "path": ""}
    assert facts["median_norm"] > 0


def test_inspect_an_unfinished_store_without_statistics(tmp_path, capsys):
    path = make_store(tmp_path, rows=45, finish=False)
    status, out, _ = ask(capsys, "inspect", path, "--json", "--no-statistics")
    facts = json.loads(out)
    assert status == 0
    assert facts["finished"] is False
    assert "median_norm" not in facts


def test_inspect_runs_and_reports(tmp_path, capsys):
    report = tmp_path / "report"
    corpus(tmp_path)
    status, out, _ = ask(capsys, "inspect", tmp_path / "run", "--json")
    assert (status, json.loads(out)["metric_l0"], json.loads(out)["layer"]) == (0, 3.0, 3)
    write_results(synthetic_report(layers=(5,), features=2), report)
    status, out, _ = ask(capsys, "inspect", report, "--json")
    assert (status, json.loads(out)["name"]) == (0, "synthetic")
    for file in (tmp_path / "run/train.json", report / "results.json"):
        file.write_text(file.read_text(encoding="utf-8").replace('"seed": 0', '"seed": 1'), encoding="utf-8")
        status, _, err = ask(capsys, "inspect", file.parent)
        assert status == 1
        assert "is damaged or was changed" in err


def test_inspect_nothing(tmp_path, capsys):
    status, _, err = ask(capsys, "inspect", tmp_path / "nothing")
    assert status == 1
    assert "no store at" in err


def test_verify_sound_and_not(tmp_path, capsys):
    path = make_store(tmp_path, rows=45)
    status, out, _ = ask(capsys, "verify", path, "--json")
    assert status == 0
    assert json.loads(out) | {"bytes": 0} == {"rows": 45, "files": 12, "bytes": 0, "findings": 0, "problems": []}
    (path / "flags/c.1.0").unlink()
    status, out, err = ask(capsys, "verify", path)
    assert status == 1
    assert "NOT sound" in out
    assert "flags/c.1.0 is missing" in err


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, tiny_llama):
    """A store of the tiny Llama."""
    folder = tmp_path_factory.mktemp("extracted")
    text = tiny_corpus(folder / "text", documents=40)
    options = ["--tokens", "1k", "--context", "16", "--batch-size", "4", "--out", folder / "cache", "--device", "cpu"]
    arguments = ["--quiet", "extract", "--layers", "2", "--model", tiny_llama, "--dataset", text, *options]
    assert main([str(a) for a in arguments]) == 0
    return folder / "cache" / "l2.zarr"


def test_verify_against_the_model(extracted, tiny_llama, tiny_gpt2, capsys):
    capsys.readouterr()
    status, out, _ = ask(capsys, "verify", extracted, "--model", tiny_llama, "--sample", "10", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["rows_recomputed"] >= 10
    assert facts["rows_identical"] == facts["rows_recomputed"]
    assert facts["worst_relative_difference"] == 0
    status, _, err = ask(capsys, "verify", extracted, "--model", tiny_gpt2)
    assert status == 1
    assert "was made with another model than" in err


@pytest.mark.parametrize(("said", "used"), [(None, "c" * 40), ("main", "main")])
def test_verify_runs_the_recorded_revision_of_the_recorded_model(monkeypatch, capsys, said, used):
    manifest = make_manifest(planned_rows=20)
    model = manifest.model.model_copy(update={"revision": "c" * 40, "dtype": "float32"})
    gpu = manifest.execution.model_copy(update={"device": "cuda", "device_name": "NVIDIA H100"})
    manifest = manifest.model_copy(update={"model": model, "execution": gpu})
    monkeypatch.setattr("tcsae.cache.format.manifest.read_manifest", lambda _: manifest)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = []
    loaded = SimpleNamespace(identity=model)
    monkeypatch.setattr(
        "tcsae.extract.model.load.load_language_model", lambda source, **_: asked.append(source) or loaded
    )
    commands._recompute("l3.zarr", model.id, None, said)
    commands._recompute("l3.zarr", "elsewhere/copy", None, None)
    here, copy = asked
    assert (here.revision, here.device, copy.revision) == (used, "cpu", None)
    assert "was computed on NVIDIA H100, which this machine lacks" in capsys.readouterr().err


def test_inspect_a_study(tmp_path, capsys):
    stages = {"extract": StageState(done=True, seconds=3.2), "train": StageState(failure="there is no room.")}
    StudyState(
        name="topics", scale="full", fingerprint="f", file="topics.toml", created="2026-01-01", stages=stages
    ).save(tmp_path)
    (tmp_path / "analysis.json").write_text("{}")
    status, out, _ = ask(capsys, "inspect", tmp_path, "--json")
    facts = json.loads(out)
    assert (status, facts["study"], facts["stages_done"], facts["seconds"]) == (0, "topics", "1 of 2 begun", 3)
    assert facts["failed_train"] == "there is no room."
    assert facts["analysis"] == str(tmp_path / "analysis.json")
    assert "page" not in facts
