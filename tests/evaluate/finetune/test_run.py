"""Fine-tuning from a finished run to a report, stopped and resumed, and everything it refuses."""

import json
import shutil
import signal

import numpy as np
import pytest
import tcsae
import torch
from stores import make_store
from tcsae.errors import RunError, UsageError
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.finetune import run as finetune_module
from tcsae.evaluate.finetune.config import FinetuneConfig
from tcsae.evaluate.finetune.run import finetune_run
from tcsae.evaluate.run import evaluate
from tcsae.on_disk import entries
from tcsae.pipeline import main
from tcsae.train.run_folder.metrics_log import read_metrics
from tcsae.train.run_folder.record import find_runs, load_run
from tcsae.train.sae.protocol import SparseAutoencoder
from tiny import tiny_model

SMALL = {"tokens": 360, "batch_size": 60, "lr": 1e-3, "device": "cpu", "dtype": "float32", "log_every": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_gemma2, corpus):
    """Stores of two sites of layer 1 of a tiny Gemma 2, with TC-SAE and twin, and others trained on them."""
    folder = tmp_path_factory.mktemp("finetune")
    what = ["--model", str(tiny_gemma2), "--dataset", str(corpus), "--context", "16", "--tokens", "2k"]
    what += ["--held-out", "0.3", "--device", "cpu", "--dtype", "float32", "--out", str(folder / "cache")]
    assert main(["extract", "--layers", "1", "--site", "resid_post", "mlp_out", *what]) == 0
    small = ["--steps", "40", "--batch-size", "60", "--width", "32", "--device", "cpu", "--dtype", "float32"]
    store, runs = ["--store", f"{folder}/cache/l1.zarr"], ["--out", str(folder / "runs")]
    assert main(["train", *store, *small, "--k", "4", "--lr", "1e-2", *runs, "--name", "tc"]) == 0
    others = {
        "mlp": ["--store", f"{folder}/cache/l1.mlp_out.zarr", "--k", "4"],
        "txc": [*store, "--architecture", "txc", "--k", "4"],
        "batch": [*store, "--activation", "batchtopk", "--k", "4"],
        "steered": [*store, "--activation", "relu", "--target-l0", "4"],
        "by-feature": [*store, "--k", "4", "--temporal-per-feature", "density"],
    }
    for name, options in others.items():
        given = [*options, *small, "--no-baseline", "--out", str(folder / "others"), "--name", name]
        given += ["--temporal", "none"] if name == "txc" else []
        assert main(["train", *given]) == 0
    return folder


def weights(folder):
    return SparseAutoencoder.load(folder).state_dict()


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_is_trained_on_recorded_and_compared_with_itself(place, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(place / "runs", runs)
    done = tcsae.finetune(runs / "tc", **SMALL)
    assert (done.folder, done.steps, done.skipped) == (str(runs / "tc-finetuned"), 6, False)
    record, before = load_run(done.folder), load_run(runs / "tc")
    record.check_files(runs / "tc-finetuned")
    assert record.finished
    assert record.tokens == read_metrics(runs / "tc-finetuned")[-1]["tokens"] > 200
    assert (record.role, record.twin, record.input_scale) == ("tc", None, before.input_scale)
    assert record.config["temporal"] == before.config["temporal"]
    assert (record.origin["path"], len(record.origin["weights"])) == (str(runs / "tc"), 64)
    told = record.finetuned
    assert (told["from"], told["kl_share"], told["balance"], told["model_dtype"]) == ("tc", 0.5, "step", "float32")
    assert (told["steps_before"], told["tokens_before"]) == (before.steps, before.tokens)
    assert told["kl_before"] == pytest.approx(read_metrics(runs / "tc-finetuned")[0]["kl"])
    assert not (runs / "tc-finetuned" / "checkpoint").exists()
    new = SparseAutoencoder.load(done.folder)
    assert (new.metadata["finetuned_from"], new.metadata["tcsae_run"]) == ("tc", "tc-finetuned")
    assert not same(weights(runs / "tc"), new.state_dict())
    assert [path.name for path in find_runs(runs)] == ["tc", "tc-finetuned", "tc-twin"]

    small = {"batches": 3, "batch_rows": 4, "device": "cpu", "dtype": "float32", "quick": True}
    (outcome,) = evaluate(EvaluateConfig(runs_folder=str(runs), out=str(tmp_path / "reports"), **small))
    report = outcome.report
    found = report.record("tc-finetuned", 1)
    assert (found.role, found.pair, found.sae.settings["finetuned_from"]) == ("finetuned", "tc", "tc")
    assert {(pair.kind, pair.first, pair.second) for pair in report.paired} == {
        ("twin", "tc", "tc-twin"),
        ("finetuned", "tc-finetuned", "tc"),
    }
    page = (outcome.folder / "index.html").read_text()
    assert 'id="finetuned"' in page
    assert "the fine-tuned SAE is" in page


def test_kl_falls_and_without_its_share_less(place, tmp_path):
    """Many small steps, so that noise does not decide; held-out text is the study's business, not this test's."""
    last = {}
    for share in (0.0, 0.9):
        options = SMALL | {"tokens": 60 * 60, "lr": 3e-3}
        out = tmp_path / str(share)
        finetune_run(FinetuneConfig(str(place / "runs/tc"), out=str(out), kl_share=share, **options))
        entries_ = read_metrics(out)
        last[share] = sum(one["kl"] for one in entries_[-20:]) / 20
        assert entries_[-1]["kl_share"] == pytest.approx(share, abs=0.1)
    first = load_run(tmp_path / "0.9").finetuned["kl_before"]
    assert last[0.9] < 0.9 * first
    assert last[0.9] < last[0.0]


def test_stopped_and_resumed_is_as_if_it_had_never_been(place, tmp_path, monkeypatch):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run = str(place / "others/batch")
    finetune_run(FinetuneConfig(run, out=whole, **SMALL))
    real = finetune_module._Finetuning._train_batch

    def stop_at_four(self, log, bar):
        if self.step == 4:
            raise KeyboardInterrupt
        real(self, log, bar)

    often = SMALL | {"checkpoint_every": 3}
    monkeypatch.setattr(finetune_module._Finetuning, "_train_batch", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        finetune_run(FinetuneConfig(run, out=parts, **often))
    monkeypatch.undo()
    assert not load_run(parts).finished
    (entry,) = entries([tmp_path / "parts"])
    assert "3 of 6 steps: the same `pipeline finetune` goes on" in entry.state
    assert entry.needs[-1] == place / "others/batch"
    with pytest.raises(RunError, match=r"kl_share was 0\.5 and is now 0\.2"):
        finetune_run(FinetuneConfig(run, out=parts, kl_share=0.2, **often))
    with pytest.raises(RunError, match=r"optimiser\.lr was 0\.001 and is now 0\.002"):
        finetune_run(FinetuneConfig(run, out=parts, **often | {"lr": 2e-3}))
    finetune_run(FinetuneConfig(run, out=parts, **often))
    assert same(weights(whole), weights(parts))
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    assert len(weights(whole)["threshold"].unique()) == 1, "one threshold, as batchtopk is kept"
    assert not torch.equal(weights(whole)["threshold"], weights(run)["threshold"])


def test_ctrl_c_writes_a_checkpoint(place, tmp_path, monkeypatch):
    real = finetune_module._Finetuning._train_batch

    def press(self, log, bar):
        real(self, log, bar)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(finetune_module._Finetuning, "_train_batch", press)
    with pytest.raises(KeyboardInterrupt, match="Checkpoint written at step 2; the same command goes on"):
        finetune_run(FinetuneConfig(str(place / "runs/tc"), out=str(tmp_path / "new"), **SMALL))
    assert list((tmp_path / "new/checkpoint").glob("*2.pt"))


def test_what_is_finished_is_kept_and_replaced_when_asked(place, tmp_path, capsys):
    out = tmp_path / "new"
    arguments = ["finetune", str(place / "runs/tc"), "--tokens", "120", "--batch-size", "60", "--device", "cpu"]
    arguments += ["--dtype", "float32", "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    stamp = (out / "train.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert "already fine-tuned" in capsys.readouterr().out
    assert (out / "train.json").stat().st_mtime_ns == stamp
    assert main([*arguments, "--lr", "1e-4"]) == 1
    assert "holds another run: optimiser.lr" in capsys.readouterr().err
    assert main([*arguments, "--lr", "1e-4", "--fresh"]) == 0
    assert load_run(out).config["optimiser"]["lr"] == 1e-4


def test_the_length_and_the_rate_are_the_run_s_by_default(place, tmp_path):
    before = load_run(place / "runs/tc")
    source = finetune_module._Source.of(FinetuneConfig(str(place / "runs/tc"), device="cpu"))
    config = source.plan.config
    assert config.run.steps == 100  # a twentieth of 2400 tokens is less
    assert (config.optimiser.lr, config.data.batch_size) == (pytest.approx(1e-2 / 3), 60)
    assert config.loss.dead_after == 20 * 60 == finetune_module.dead_after(source.plan.config)
    assert config.temporal.model_dump(mode="json") == before.config["temporal"]
    steered = finetune_module._Source.of(FinetuneConfig(str(place / "others/steered"), device="cpu"))
    assert steered.plan.config.loss.l1 == load_run(place / "others/steered").metrics["sparsity_weight"]


def test_a_steered_run_is_steered_on(place, tmp_path):
    finetune_run(FinetuneConfig(str(place / "others/steered"), out=str(tmp_path / "new"), **SMALL))
    logged = read_metrics(tmp_path / "new")
    assert len({one["sparsity_weight"] for one in logged}) > 1


REFUSED = {
    "mlp": "layer 1 mlp_out, which lies inside a block",
    "txc": "one code for a window of positions",
    "by-feature": "λ2 per feature, which was measured while it trained",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fine_tuned_is_refused_by_name(place, tmp_path, name):
    with pytest.raises(RunError, match=REFUSED[name]):
        finetune_run(FinetuneConfig(str(place / "others" / name), out=str(tmp_path / "new"), **SMALL))
    assert not (tmp_path / "new/sae_weights.safetensors").exists()


def test_another_model_or_store_is_refused(place, tmp_path, corpus):
    run, out = str(place / "runs/tc"), str(tmp_path / "new")
    other = tiny_model("gemma2", tmp_path / "other", seed=5)
    with pytest.raises(RunError, match=r"are not those that .*l1\.zarr was extracted with"):
        finetune_run(FinetuneConfig(run, out=out, model=str(other), **SMALL))
    elsewhere = make_store(tmp_path / "cache", d_model=24, layer=1)
    with pytest.raises(RunError, match="was extracted from other weights"):
        finetune_run(FinetuneConfig(run, out=out, store=str(elsewhere), **SMALL))
    narrow = make_store(tmp_path / "narrow", d_model=8, layer=3)
    with pytest.raises(RunError, match="holds layer 3, width 8; the run is of layer 1, width 24"):
        finetune_run(FinetuneConfig(run, out=out, store=str(narrow), **SMALL))


def test_a_run_on_imported_vectors_has_no_model(tmp_path):
    torch.manual_seed(0)
    np.save(tmp_path / "x.npy", torch.randn(40, 16, 8).numpy())
    assert main(["import", str(tmp_path / "x.npy"), "--out", str(tmp_path / "x.zarr")]) == 0
    train = ["--steps", "3", "--batch-size", "60", "--width", "16", "--k", "2", "--device", "cpu", "--no-baseline"]
    assert main(["train", "--store", f"{tmp_path}/x.zarr", *train, "--out", str(tmp_path), "--name", "one"]) == 0
    with pytest.raises(RunError, match=r"holds imported vectors of .*: there is no language model"):
        finetune_run(FinetuneConfig(str(tmp_path / "one"), **SMALL))


def test_settings_that_cannot_be(place, monkeypatch):
    run = str(place / "runs/tc")
    for wrong, sentence in (
        ({"kl_share": 1.5}, "--kl-share 1.5 is no share"),
        ({"lr": -1.0}, "is no learning rate"),
        ({"tokens": -5}, "count tokens"),
        ({"balance": "never"}, "choose step or start"),
    ):
        with pytest.raises(UsageError, match=sentence):
            FinetuneConfig(run, **wrong)
    with pytest.raises(UsageError, match="is the run itself"):
        finetune_run(FinetuneConfig(run, out=run, device="cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process"):
        finetune_run(FinetuneConfig(run))


def test_an_unfinished_run_is_refused(place, tmp_path):
    shutil.copytree(place / "runs/tc", tmp_path / "tc")
    record = load_run(tmp_path / "tc")
    record.model_copy(update={"finished": False, "steps": 3}).save(tmp_path / "tc")
    with pytest.raises(RunError, match="has trained 3 of 40 steps: finish it"):
        finetune_run(FinetuneConfig(str(tmp_path / "tc"), device="cpu"))
