"""Damaged reports, rows and SAEs: noticed, named, and never in the way of the others."""

from __future__ import annotations

import dataclasses
import json
import random
import re

import numpy as np
import pytest
import torch
from synthetic import synthetic_report
from tcsae.errors import RunError
from tcsae.evaluate import run as evaluation
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.protocol import UnitSums
from tcsae.evaluate.results import read_results, write_results
from tcsae.evaluate.subjects import gather_subjects
from tcsae.evaluate.table_row import MeasuredRow
from tcsae.train.run_folder.record import RunRecord, load_run
from tcsae.train.sae.activation import Activation
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae


def flipped(content: bytes, seed: int) -> bytes:
    dice, changed = random.Random(seed), bytearray(content)
    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


@pytest.fixture(scope="module")
def row():
    sums = UnitSums(np.arange(40.0), np.ones(40), "1", "something")
    return MeasuredRow("a", "sae", 1, sums={"loss": sums}, notes=["a note"])


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_in_a_kept_row_means_measuring_it_again(row, tmp_path, seed, capsys):
    row.save(tmp_path / "row.npz")
    (tmp_path / "row.npz").write_bytes(flipped((tmp_path / "row.npz").read_bytes(), seed))
    back = MeasuredRow.load(tmp_path / "row.npz")
    if back is None:
        assert "the row is measured again" in capsys.readouterr().err
    else:  # a bit that says nothing, such as the time of day in the archive
        np.testing.assert_equal(dataclasses.asdict(back), dataclasses.asdict(row))


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06", b"x" * 100])
def test_a_row_that_is_none_is_measured_again(tmp_path, content):
    (tmp_path / "row.npz").write_bytes(content)
    assert MeasuredRow.load(tmp_path / "row.npz") is None


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write_results(synthetic_report(layers=(5,), features=2), tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_results_is_named_or_without_effect(results, tmp_path, seed):
    (tmp_path / "results.json").write_bytes(flipped(results.read_bytes(), seed))
    try:
        found = read_results(tmp_path)
    except RunError as failure:
        said = str(failure)
    else:  # the last digit of a number, too small a change to make it another number
        assert found == read_results(results)
        return
    assert re.search(r"results\.json .*evaluate again to replace it", said)


def test_results_of_before_have_no_checksum(results, tmp_path):
    plain = json.loads(results.read_text(encoding="utf-8"))
    del plain["checksum"]
    (tmp_path / "results.json").write_text(json.dumps(plain))
    assert read_results(tmp_path) == read_results(results)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_model("gemma2", folder / "model")
    tiny_corpus(folder / "text", documents=60, words=40)
    return folder


@pytest.fixture(scope="module")
def manifest(place):
    return make_manifest(place / "model", place / "text", 1)


BAD_RECORDS = {
    "config": ({"config": {"temporal": []}}, "has \\[\\] for its 'temporal' settings"),
    "scope": ({"config": {"temporal": {"scope": "all"}}}, "temporal scope of 'all'"),
    "manifest": ({"store_manifest": {"layer": 1}}, "what its record says of the store is not valid at"),
    "k": ({"config": {"sae": {"activation": "topk", "k": 64}}}, "says that 64 features are active, it has 32"),
    "layer": ({"layer": 3}, "its files belong to different runs"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_an_inconsistent_record_is_one_sentence(manifest, tmp_path, name):
    changes, sentence = BAD_RECORDS[name]
    run = make_run(tmp_path, "bad", manifest)
    record = load_run(run)
    RunRecord(**(record.model_dump() | changes)).save(run)
    _, (failure,) = gather_subjects(EvaluateConfig(runs=(str(run),)))
    assert re.search(sentence, failure.message)
    assert "\n" not in failure.message


BAD_CONFIGS = {
    "no k": {"architecture": "topk"},
    "k is text": {"architecture": "topk", "k": "6"},
    "k is null": {"architecture": "topk", "k": None},
    "k is infinite": {"architecture": "topk", "k": float("inf")},
    "k is a list": {"architecture": "topk", "k": [1]},
    "k is huge": {"architecture": "topk", "k": 1 << 70},
    "metadata is text": {"metadata": "gpt2"},
    "model is a number": {"metadata": {"model_name": 5}},
    "layer is huge": {"metadata": {"layer": 1 << 60}},
    "architecture is a list": {"architecture": ["topk"]},
    "architecture is of a plug-in": {"architecture": "tcsae:none_such"},
    "settings are text": {"architecture": "tcsae:sae", "tcsae_settings": "relu"},
    "settings are unknown": {"architecture": "tcsae:sae", "tcsae_settings": {"colour": "red"}},
    "normalised": {"normalize_activations": {"a": 1}},
    "another width": {"d_in": 7},
    "no width": {"d_in": None},
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_description_is_one_sentence(tmp_path, name):
    random_sae(24, 16, Activation("relu")).save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | BAD_CONFIGS[name]))
    _, (failure,) = gather_subjects(EvaluateConfig(saes=(str(tmp_path),), layers=(1,), model="x"))
    assert "\n" not in failure.message
    assert len(failure.message) < 600


BAD_STATES = {
    "empty": dict,
    "a list": lambda: [torch.ones(2)],
    "sparse": lambda: {"encoder.weight": torch.eye(4).to_sparse()},
    "meta": lambda: {"encoder.weight": torch.ones(4, 4, device="meta")},
    "nested": lambda: {"state": {"encoder.weight": torch.ones(4, 4)}},
    "complex": lambda: {"encoder.weight": torch.ones(4, 4, dtype=torch.complex64)},
    "no tensors": lambda: {"encoder.weight": 5},
    "expanded": lambda: {"encoder.weight": torch.ones(1).expand(1 << 18, 1 << 18), "bias": torch.ones(1)},
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_bad_ae_pt_is_one_sentence(tmp_path, name):
    torch.save(BAD_STATES[name](), tmp_path / "ae.pt")
    _, (failure,) = gather_subjects(EvaluateConfig(saes=(str(tmp_path),), layers=(1,), model="x"))
    assert str(tmp_path) in failure.message
    assert "\n" not in failure.message


def test_bad_saes_do_not_stop_the_good_one(place, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
    good = make_run(tmp_path / "runs", "good", manifest)
    damaged = make_run(tmp_path / "runs", "damaged", manifest, seed=1)
    file = damaged / "sae_weights.safetensors"
    file.write_bytes(flipped(file.read_bytes(), 0))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/ae.pt").write_bytes(b"\x80\x02]q\x00.")
    no_text = "\udc80"  # how Python reads a name that is no UTF-8
    config = EvaluateConfig(
        runs=(str(good), str(damaged)), saes=(str(tmp_path / "theirs"), no_text), layers=(1,), references=("zero",),
        out=str(tmp_path / "reports"), batches=2, batch_rows=4, device="cpu", dtype="float32", quick=True,
    )  # fmt: skip
    (outcome,) = evaluation.evaluate(config)
    assert outcome.report.record("good", 1) is not None
    paths = {failure.path for failure in read_results(outcome.folder).failures}
    assert paths == {str(damaged), str(tmp_path / "theirs"), r"\xdc80"}
