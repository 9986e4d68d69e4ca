"""SAEs of imported vectors: measured on what was held out, without a language model and without CE and KL."""

import json
import shutil

import numpy as np
import pytest
import torch
from page import Page, data_of
from tcsae.cache.arrays.config import import_config
from tcsae.cache.arrays.run import import_array
from tcsae.errors import RunError
from tcsae.evaluate.codes.beside_report import document_labels
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.features.catalogue import codes_of
from tcsae.evaluate.results import read_results
from tcsae.evaluate.run import evaluate
from tcsae.on_disk import entries
from tcsae.pipeline import main

SMALL = {"batches": 4, "batch_rows": 4, "device": "cpu"}


def series(sequences, positions, width, seed=0):
    """Slow and quick numbers side by side, and a token that says which of three is largest."""
    rng = np.random.default_rng(seed)
    x = np.zeros((sequences, positions, width))
    for t in range(1, positions):
        x[:, t] = 0.9 * x[:, t - 1] + rng.standard_normal((sequences, width))
    return x.astype(np.float32), x[..., :3].argmax(-1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Imported vectors with tokens and labels, an SAE of them with its twin, and its report."""
    folder = tmp_path_factory.mktemp("vectors")
    x, tokens = series(40, 24, 8)
    labels = np.array([f"c{n % 2}" for n in range(40)])
    np.savez(folder / "net.npz", vectors=x, tokens=tokens, labels=labels, text=np.array(["one", "two", "three"]))
    words = ["import", f"{folder}/net.npz", "--tokens", "tokens", "--labels", "labels", "--token-text", "text"]
    assert main([*words, "--held-out", "0.3", "--out", f"{folder}/cache/net.zarr", "--site", "hidden"]) == 0
    small = ["--steps", "5", "--batch-size", "60", "--width", "16", "--k", "3", "--device", "cpu"]
    assert main(["train", "--store", f"{folder}/cache/net.zarr", *small, "--out", f"{folder}/runs"]) == 0
    return folder


@pytest.fixture(scope="module")
def outcome(place):
    (found,) = evaluate(EvaluateConfig(runs_folder=str(place / "runs"), out=str(place / "reports"), **SMALL))
    return found


def test_everything_is_measured_that_needs_no_model(outcome):
    report = read_results(outcome.folder)
    assert not report.failures
    saes = [record for record in report.records if record.kind == "sae"]
    assert {record.role for record in saes} == {"tc", "twin"}
    for record in saes:
        for name in (
            "explained_variance",
            "mse_per_token",
            "l0",
            "alive",
            "temporal_variation",
            "lag1_autocorrelation",
        ):
            assert record.metrics[name].value is not None, name
        for name in ("eta_squared", "same_token", "adjacent_cosine", "run_length", "neighbour_cosine"):
            assert name in record.metrics
    assert report.paired[0].metrics["explained_variance"].value is not None
    assert report.text.labels == ["c0", "c1"]
    cards = report.features[saes[0].name]
    assert set(cards[0].passages[0].tokens) <= {"one", "two", "three"}
    assert not cards[0].raises


def test_what_needs_a_model_is_absent_and_one_sentence_says_why(outcome):
    report = read_results(outcome.folder)
    model_only = ("ce", "kl", "prefix_shift", "boundary")
    for record in report.records:
        assert not [name for name in record.metrics if name.startswith(model_only)]
        assert not record.saebench_compat
    assert not [name for name in report.definitions if name.startswith(("ce", "kl"))]
    assert "zero_all" not in {record.name for record in report.records}
    assert len([one for one in report.notes if "neither CE nor KL" in one]) == 1
    page = (outcome.folder / "index.html").read_text()
    shown = Page(page).text
    assert "nan" not in shown.lower()
    assert data_of(page)["saes"]
    assert "spliced into the model" not in shown
    assert "12.44" not in shown  # the table of the paper is of a language model


def test_figures_are_those_of_the_held_out_vectors(place, outcome):
    """Explained variance, L0 and MSE of every held-out vector, computed again in one line each."""
    from tcsae.cache.store import ActivationStore
    from tcsae.train.sae.protocol import SparseAutoencoder

    report = read_results(outcome.folder)
    record = next(record for record in report.records if record.role == "tc")
    store = ActivationStore.open(place / "cache/net.held-out.zarr")
    x = store.rows(0, store.n_rows).float().reshape(-1, 8)[: report.n_tokens]
    with torch.no_grad():
        out = SparseAutoencoder.load(record.sae.path)(x)
    error = (x - out.reconstruction).square().sum(-1)
    spread = (x - x.mean(0)).square().sum(-1)
    assert report.n_tokens == store.n_tokens == 12 * 24
    assert record.metrics["mse_per_token"].value == pytest.approx(float(error.mean()), rel=1e-4)
    assert record.metrics["explained_variance"].value == pytest.approx(float(1 - error.sum() / spread.sum()), rel=1e-4)
    assert record.metrics["l0"].value == pytest.approx(float((out.features != 0).sum(-1).float().mean()))


def test_kept_rows_are_kept(place, outcome, capsys):
    words = ["evaluate", "--runs", f"{place}/runs", "--out", f"{place}/reports", "--batches", "4", "--batch-size", "4"]
    assert main([*words, "--device", "cpu", "--json"]) == 0
    said = capsys.readouterr()
    (report,) = json.loads(said.out)["reports"]
    assert report["folder"] == str(outcome.folder)
    assert not {"ce", "kl", "ce_score_mean"} & set(report["records"][0])


def test_the_commands_know_imported_stores(place, outcome, capsys):
    assert outcome.report.name == "net"
    for command in (["verify"], ["inspect", "--statistics"]):
        assert main([command[0], f"{place}/cache/net.zarr", *command[1:]]) == 0
    found = {entry.path.name: entry for entry in entries([place])}
    assert found["net.zarr"].finished
    assert "net layer 0 hidden" in found["net.held-out.zarr"].state
    capsys.readouterr()
    assert main(["verify", f"{place}/cache/net.zarr", "--model", "demo"]) == 2
    assert "no language model made them, leave --model out" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "sentence"), [
    ({"dataset": "nothing.zarr"}, "the vectors of net that were held out are not at nothing.zarr"),
    ({"model": "demo"}, "holds imported vectors, of which no text is known: with --model, name a text"),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_one_sentence(place, options, sentence):
    (run,) = (path for path in (place / "runs").iterdir() if "none" in path.name)
    with pytest.raises(RunError, match=sentence):
        evaluate(EvaluateConfig(runs=(str(run),), out=str(place / "other"), **SMALL, **options))


def test_vectors_of_another_width_are_refused(place, tmp_path):
    np.save(tmp_path / "wide.npy", series(4, 8, 9)[0])
    import_array(import_config(array=tmp_path / "wide.npy", out=tmp_path / "wide.zarr", held_out=0))
    with pytest.raises(RunError, match=r"of layer 0 hidden and width 8, .* of layer 0 wide and width 9"):
        evaluate(
            EvaluateConfig(runs_folder=str(place / "runs"), out=str(tmp_path), dataset=f"{tmp_path}/wide.zarr", **SMALL)
        )


def test_vectors_without_tokens_have_no_same_token(place, tmp_path):
    np.save(tmp_path / "net.npy", series(40, 24, 8)[0])
    import_array(import_config(array=tmp_path / "net.npy", out=tmp_path / "net.zarr", site="hidden", held_out=0.5))
    shutil.copytree(place / "runs", tmp_path / "runs")
    where = {
        "runs_folder": f"{tmp_path}/runs",
        "out": f"{tmp_path}/reports",
        "dataset": f"{tmp_path}/net.held-out.zarr",
    }
    (found,) = evaluate(EvaluateConfig(**where, quick=True, device="cpu", batch_rows=2))
    record = next(record for record in found.report.records if record.role == "tc")
    assert record.metrics["explained_variance"].value is not None
    assert record.metrics["same_token"].value is None


def test_codes_of_held_out_vectors_are_kept_with_their_labels(place, outcome, tmp_path):
    config = EvaluateConfig(runs_folder=str(place / "runs"), out=str(tmp_path), codes=True, **SMALL)
    (found,) = evaluate(config)
    for record in found.report.records:
        if record.kind == "sae":
            codes = codes_of(record.sae.path, report=str(found.folder))
            l0 = record.metrics["l0_without_outliers"]
            assert codes.n_entries / l0.n == pytest.approx(l0.value)
            assert set(document_labels(codes).values()) == {"c0", "c1"}
            assert (codes.manifest.trained_rows, codes.manifest.store) == (0, f"{place}/cache/net.held-out.zarr")
            assert record.metrics == outcome.report.record(record.name, record.layer, record.site).metrics
