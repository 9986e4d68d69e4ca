"""Codes that an evaluation keeps are those its numbers are of, and looking at them needs no language model."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tcsae.errors import ResourceError, StoreError
from tcsae.evaluate import run as run_module
from tcsae.evaluate.codes.beside_report import LABELS, kept_beside
from tcsae.evaluate.codes.store import CodeStore
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.features.catalogue import codes_of
from tcsae.evaluate.features.folder import write_features
from tcsae.evaluate.features.probe import QUESTIONS, probe
from tcsae.evaluate.metrics.probing.sparse_probes import KS
from tcsae.evaluate.one_pass import Measurement
from tcsae.evaluate.results import read_results
from tcsae.on_disk import entries
from tcsae.pipeline import main
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.protocol import SparseAutoencoder
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

pytest.importorskip("sklearn")
SMALL = {"batches": 10, "batch_rows": 8, "device": "cpu", "dtype": "float32", "references": ("mean",), "seed": 3}
COMMAND = ["--batches", "10", "--batch-size", "8", "--device", "cpu", "--dtype", "float32", "--references", "mean"]


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a text with labels and a run with its twin."""
    folder = tmp_path_factory.mktemp("beside")
    model = tiny_model("gemma2", folder / "model")
    for seed, label in enumerate(("law", "music", "sports")):
        tiny_corpus(folder / "text" / label, documents=24, words=60, seed=seed)
    manifest = make_manifest(model, folder / "text", 1)
    make_run(folder / "runs", "tc", manifest, twin="twin")
    sae = random_sae(24, 32, Activation("relu"), 1)
    make_run(folder / "runs", "twin", manifest, role="twin", twin="tc", seed=1, sae=sae)
    return folder


def evaluated(place, out, **more):
    config = EvaluateConfig(runs_folder=str(place / "runs"), out=str(place / out), **(SMALL | more))
    (outcome,) = run_module.evaluate(config)
    return outcome


@pytest.fixture(scope="module")
def report(place):
    return evaluated(place, "reports", codes=True).folder


@pytest.fixture
def copied(place, report, tmp_path):
    """Runs and report, to be damaged."""
    shutil.copytree(report.parent, tmp_path / "reports")
    return tmp_path / "reports" / report.name


def numbers(report):
    keep = {"records": {"__all__": {"metrics", "curves", "name", "notes"}}, "paired": True, "features": True}
    return report.model_dump(include=keep)


@pytest.fixture
def _no_model(monkeypatch):
    for name in ("extract.model.load.load_language_model", "evaluate.sources.load_language_model"):
        monkeypatch.setattr(f"tcsae.{name}", lambda *_, **__: pytest.fail("no language model is needed"))


def test_no_number_depends_on_whether_codes_are_kept(place, report):
    plain = evaluated(place, "plain").report
    assert numbers(read_results(report)) == numbers(plain)
    assert all(record.codes == "" for record in plain.records)
    assert not (place / "plain" / "model" / "codes").exists()


def test_they_are_the_codes_of_every_run_on_the_evaluated_rows(place, report):
    found = read_results(report)
    assert [bool(record.codes) for record in found.records] == [record.kind == "sae" for record in found.records]
    for name in ("tc", "twin"):
        codes = CodeStore.open(report / found.record(name, 1).codes)
        (part,) = list(codes)
        assert (codes.n_rows, codes.manifest.trained_rows) == (found.n_rows, 0)
        assert int((part.flags_RT & 1 == 0).sum()) == found.n_tokens
        l0 = found.record(name, 1).metrics["l0_without_outliers"]
        assert codes.n_entries / part.valid.sum() == pytest.approx(l0.value, rel=1e-12)
        assert part.valid.sum() == l0.n
        assert (np.diff(part.indptr)[~part.valid.reshape(-1)] == 0).all()
        starts = part.indptr[:-1][np.diff(part.indptr) > 0]
        assert (np.delete(np.diff(part.feature_E), starts[1:] - 1) > 0).all()  # ascending within a token


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("asked", QUESTIONS)
def test_probes_of_the_codes_give_the_numbers_of_the_report(place, report, asked):
    for name in ("tc", "twin"):
        metrics = read_results(report).record(name, 1).metrics
        found = probe(codes_of(str(place / "runs" / name), report=str(report)), asked)
        for key, one in {**{f"k{k}": found.accuracy[k] for k in KS}, "permuted": found.permuted}.items():
            expected = metrics[f"probe_{QUESTIONS[asked]}_{key}"]
            assert (one.value, one.low, one.high, one.n) == (expected.value, expected.low, expected.high, expected.n)


@pytest.mark.usefixtures("_no_model")
def test_the_command_reads_them_from_the_report(place, copied, capsys, monkeypatch):
    run, report = str(place / "runs" / "tc"), copied
    assert main(["features", run, "--report", str(report), "--probe", "label", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["features"]) == {"law", "music", "sports"}
    assert main(["features", run, "--report", str(report), "--search", "northern road", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["occurrences"] > 0
    assert main(["features", run, "--probe", "label"]) == 1  # none in the run's own folder
    assert "there are no codes at" in capsys.readouterr().err
    assert main(["inspect", str(report / read_results(report).record("tc", 1).codes), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluated_on"] == str(place / "text")


@pytest.mark.usefixtures("_no_model")
def test_the_page_of_every_feature_is_written_from_them(place, copied):
    page = copied / "index.html"
    assert "pipeline features RUN --html --report" in page.read_text()
    done = write_features([str(place / "runs" / "tc")], report=str(copied))
    assert (done.page, done.runs) == (copied / "features" / "index.html", 2)  # the twin's codes are there, too
    assert "on text that training did not see" in done.page.read_text()
    assert 'href="features/index.html"' in page.read_text()
    assert "pipeline features RUN --html --report" not in page.read_text()


def test_what_is_there_is_not_measured_again_and_what_is_gone_is(place, copied, capsys, monkeypatch):
    monkeypatch.chdir(place)
    command = ["evaluate", "--runs", str(place / "runs"), "--out", str(copied.parent), "--seed", "3", *COMMAND]
    assert main([*command, "--codes"]) == 0
    assert "measured again" not in capsys.readouterr().err
    before = read_results(copied)
    assert main([*command, "--codes"]) == 0
    assert "the report is shown as it is" in capsys.readouterr().err
    assert main(command) == 0  # without the option they stay
    assert read_results(copied).record("tc", 1).codes == before.record("tc", 1).codes
    shutil.rmtree(copied / before.record("twin", 1).codes)
    seen, real = [], Measurement.run
    monkeypatch.setattr(
        Measurement, "run", lambda self, *a: (seen.append([c.row.name for c in self.candidates]), real(self, *a))[1]
    )
    assert main([*command, "--codes"]) == 0
    captured = capsys.readouterr()
    assert "1 row is measured again: its codes were not kept" in captured.err
    assert "the codes of 1 SAE take about" in captured.err
    assert "pipeline features RUN --report" in captured.out
    assert seen == [["twin"]]
    assert numbers(read_results(copied)) == numbers(before)
    assert CodeStore.open(copied / before.record("twin", 1).codes).n_rows == before.n_rows


def test_a_pass_that_stops_leaves_codes_that_nobody_takes_for_whole(place, tmp_path, monkeypatch):
    real = Measurement._batch

    def stopped(self, rows):
        real(self, rows)
        if rows.start >= 24:
            raise KeyboardInterrupt

    monkeypatch.setattr("tcsae.evaluate.codes.writer._PART_TOKENS", 100)
    with monkeypatch.context() as patch:
        patch.setattr(Measurement, "_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluated(place, tmp_path, codes=True)
    left = [entry for entry in entries([tmp_path]) if entry.kind == "codes"]
    assert {entry.finished for entry in left} == {False}
    assert "the same `pipeline evaluate --codes` writes them anew" in left[0].state
    with pytest.raises(StoreError, match=r"codes of \d+ of 80 rows, not finished: .*`pipeline evaluate --codes`"):
        CodeStore.open(left[0].path)
    folder = evaluated(place, tmp_path, codes=True).folder
    found = [entry for entry in entries([tmp_path]) if entry.kind == "codes"]
    assert {entry.finished for entry in found} == {True}
    assert kept_beside(place / "runs" / "tc", folder) is not None


def test_passes_that_do_not_fit_are_halved_with_their_codes(place, tmp_path, monkeypatch, report):
    real = Measurement.run

    def one_at_a_time(self, *args):
        if len(self.candidates) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, *args)

    monkeypatch.setattr(Measurement, "run", one_at_a_time)
    folder = evaluated(place, tmp_path, codes=True).folder
    for name in ("tc", "twin"):
        (one,), (other,) = (
            list(CodeStore.open(each / read_results(each).record(name, 1).codes)) for each in (folder, report)
        )
        np.testing.assert_array_equal(one.feature_E, other.feature_E)
        np.testing.assert_array_equal(one.value_E, other.value_E)


def test_other_weights_have_no_codes_here(place, copied, tmp_path):
    shutil.copytree(place / "runs" / "tc", tmp_path / "tc")
    assert kept_beside(tmp_path / "tc", copied) is not None  # wherever the run lies now
    random_sae(24, 32, Activation("topk", k=6), 9).save(tmp_path / "tc")
    assert kept_beside(tmp_path / "tc", copied) is None
    shutil.rmtree(copied / "codes")
    with pytest.raises(StoreError, match="there are no codes at"):
        kept_beside(place / "runs" / "tc", copied)


def test_damaged_labels_are_a_sentence(place, copied):
    path = copied / read_results(copied).record("tc", 1).codes / LABELS
    path.write_text(path.read_text().replace("music", "muzak", 1))
    with pytest.raises(StoreError, match=r"documents.json is missing or damaged \(its checksum does not fit\): write"):
        probe(codes_of(str(place / "runs" / "tc"), report=str(copied)), "label")


def test_a_disk_that_is_too_small_is_said_before_the_pass(place, tmp_path, monkeypatch):
    monkeypatch.setattr("tcsae.cache.storage.local.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(Measurement, "run", lambda *_: pytest.fail("the disk is too small"))
    with pytest.raises(ResourceError, match=r"needs about .* for codes and .* are free: free some space"):
        evaluated(place, tmp_path, codes=True)


def test_of_saes_from_elsewhere_no_codes_are_kept(place, tmp_path):
    SparseAutoencoder.load(place / "runs" / "tc").save(tmp_path / "theirs")
    config = {"saes": (str(tmp_path / "theirs"),), "layers": (1,), "model": str(place / "model")}
    more = {"dataset": str(place / "text"), "runs": (str(place / "runs" / "twin"),)}
    outcome = evaluated(place, tmp_path, codes=True, **config, **more)
    assert "the codes of theirs are not kept: it is no run of this program" in outcome.report.notes
    kept = {record.name: bool(record.codes) for record in outcome.report.records if record.kind == "sae"}
    assert kept == {"twin": True, "theirs": False}
