"""What the program wrote before its folders were redrawn opens, verifies, trains and evaluates as it did."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tcsae import ActivationStore, TemporalSAE
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.results import read_results
from tcsae.evaluate.run import evaluate
from tcsae.pipeline import main
from tcsae.train.run_folder.record import find_runs, load_run

FIXTURES = Path(__file__).parent / "fixtures/before"
RUNS = sorted(path.name for path in (FIXTURES / "runs").iterdir())
SAME = ("l0", "explained_variance", "ce", "ce_score_mean", "kl", "temporal_variation")


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A copy to work on, where the runs find their model and text; they name their store as cache/l1.zarr."""
    folder = shutil.copytree(FIXTURES, tmp_path / "before")
    for record in folder.glob("*/*/train.json"):
        record.write_text(record.read_text().replace("/tmp/tcsae-before", str(folder)))
    monkeypatch.chdir(folder)
    return folder


def test_the_store_is_sound_and_its_model_still_produces_it(before, capsys):
    assert ActivationStore.open("cache/l1.zarr").n_rows == 50
    assert main(["verify", "cache/l1.zarr", "--model", "model", "--sample", "50"]) == 0
    assert "rows recomputed" in capsys.readouterr().out


def test_the_store_trains(before):
    small = ["--batch-size", "60", "--steps", "2", "--width", "32", "--k", "4", "--device", "cpu", "--dtype", "float32"]
    assert main(["--quiet", "train", "--store", "cache/l1.zarr", "--out", "new", *small]) == 0
    assert [load_run(path).store_rows for path in find_runs("new")] == [50, 50]


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_computes_what_it_did(before, name):
    sae = TemporalSAE.load(f"runs/{name}")
    weights, expected = load_file(f"runs/{name}/sae_weights.safetensors"), load_file("outputs.safetensors")
    for key in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(sae, key), weights[key])
    out = sae(ActivationStore.open("cache/l1.zarr").rows(0, 1).float()[0])
    torch.testing.assert_close(out.features, expected[f"{name}.features"])
    torch.testing.assert_close(out.reconstruction, expected[f"{name}.reconstruction"])


def test_finished_runs_are_kept(before, capsys):
    record = (before / "runs/l1-relu0.5-none-s0/train.json").read_bytes()
    same = ["--width", "32", "--batch-size", "60", "--steps", "12", "--log-every", "4", "--activation", "relu"]
    asked = ["train", "--store", "cache/l1.zarr", *same, "--l1", "0.5", "--device", "cpu", "--dtype", "float32"]
    assert main(asked) == 0
    assert "already trained" in capsys.readouterr().out
    assert (before / "runs/l1-relu0.5-none-s0/train.json").read_bytes() == record


@pytest.mark.parametrize("fresh", [True, False], ids=["measured anew", "rows kept where they may be"])
def test_finished_runs_evaluate_as_before(before, monkeypatch, fresh):
    monkeypatch.setattr("tcsae.evaluate.report.page.write_figures", lambda *_: [])
    report = read_results("reports/report")
    # Not quick, as then: a first look no longer splices references into all rows.
    small = {"batches": 3, "batch_rows": 8, "only": ("fidelity", "temporal"), "references": ("zero", "mean")}
    small["name"] = "report"
    runs = tuple(f"runs/{name}" for name in RUNS)
    (outcome,) = evaluate(EvaluateConfig(runs=runs, fresh=fresh, device="cpu", dtype="float32", **small))
    assert not outcome.report.failures
    assert {record.name for record in outcome.report.records} == {*RUNS, "zero", "mean"}
    for old in report.records:
        new = outcome.report.record(old.name, old.layer)
        assert new is not None
        for key in SAME:
            was, now = old.metrics.get(key), new.metrics.get(key)
            if was is None or was.value is None:
                assert now is None or now.value is None
            else:
                assert now.value == pytest.approx(was.value, rel=1e-4, abs=1e-6), key


def test_an_unfinished_run_is_refused_in_one_sentence_and_doing_as_it_says_helps(before, capsys):
    same = ["--width", "32", "--batch-size", "60", "--steps", "12", "--log-every", "4", "--activation", "topk"]
    alone = ["--k", "4", "--out", "unfinished", "--no-baseline", "--device", "cpu", "--dtype", "float32"]
    asked = ["--quiet", "train", "--store", "cache/l1.zarr", *same, *alone]
    assert main(asked) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "put windows in another order: finish it with that version, or begin anew with --fresh" in said
    assert find_runs("unfinished") == []
    assert main([*asked, "--fresh"]) == 0
    (run,) = find_runs("unfinished")
    assert load_run(run).steps == 12
