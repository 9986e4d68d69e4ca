"""Probes over codes that are written say what the evaluation's probes say of the same codes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tcsae
import torch
from coded_runs import WIDTH, coded, random_run
from stores import make_store
from tcsae.errors import UsageError
from tcsae.evaluate.codes.encode import EncodeConfig, encode_run
from tcsae.evaluate.codes.store import CodeStore
from tcsae.evaluate.features import probe as module
from tcsae.evaluate.features.probe import probe
from tcsae.evaluate.features.survey import entries_of
from tcsae.evaluate.metrics.probing.sparse_probes import KS, SparseProbes
from tcsae.pipeline import main
from tcsae.train.sae.protocol import SparseAutoencoder
from tiny import tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    store = make_store(folder, rows=120, packing="document", documents=60)
    encode_run(EncodeConfig(str(random_run(folder / "run", store))))
    return folder / "run"


@pytest.fixture
def labelled(monkeypatch):
    """Documents alternate between three labels; one has none."""
    labels = {document: "abc"[document % 3] for document in range(1000)} | {4: None}
    monkeypatch.setattr(module, "labels_of", lambda codes, documents: {int(one): labels[int(one)] for one in documents})
    return labels


def evaluated(run, name, labels):
    """The evaluation's own probes on the same codes."""
    codes = CodeStore.open(run / "codes.zarr")
    probes = SparseProbes(SparseAutoencoder.load(run).token_coder(), context=codes.context, seed=0)
    for part in codes:
        batch = module._batch(part)
        numbers = np.array(
            [-1 if labels[int(d)] is None else "abc".index(labels[int(d)]) for d in part.documents_RT.flat]
        )
        batch = replace(batch, labels_BT=torch.from_numpy(numbers.reshape(part.documents_RT.shape)))
        probes.update(batch, entries_of(part, codes.n_features), batch.x_BTD)
    sums = probes.result().sums
    found = {key: sums[f"probe_{name}_{key}"] for key in (*(f"k{k}" for k in KS), "permuted")}
    return {key: one.numerator_U.sum() / one.denominator_U.sum() for key, one in found.items()}


@pytest.mark.parametrize(("asked", "name"), [("label", "topic_passage"), ("position", "position")])
def test_the_accuracies_are_those_of_the_evaluation(run, labelled, asked, name):
    found = probe(CodeStore.open(run / "codes.zarr"), asked)
    expected = evaluated(run, name, labelled)
    for k in KS:
        assert found.accuracy[k].value == pytest.approx(expected[f"k{k}"], abs=1e-9)
    assert found.permuted.value == pytest.approx(expected["permuted"], abs=1e-9)
    assert found.accuracy[20].low < found.accuracy[20].value < found.accuracy[20].high
    assert found.n_documents == (59 if asked == "label" else 60)


def test_the_command_prints_and_names_features(run, labelled, capsys):
    assert main(["features", str(run), "--probe", "label", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["features"]) == {"a", "b", "c"}
    assert all(
        0 <= feature < WIDTH and 1 <= folds <= 3 for pairs in facts["features"].values() for feature, folds in pairs
    )
    assert main(["features", str(run), "--probe", "label"]) == 0
    out = capsys.readouterr().out
    assert "k = 20" in out
    assert "59 documents, 3 classes; 0.5 is chance" in out
    assert max(map(len, out.splitlines())) <= 81


def test_what_cannot_be_asked_is_a_sentence(run, monkeypatch, tmp_path):
    codes = CodeStore.open(run / "codes.zarr")
    with pytest.raises(UsageError, match="no probe 'mood': choose one of label, label_token, token_class, position"):
        probe(codes, "mood")
    monkeypatch.setattr(module, "labels_of", lambda codes, documents: {int(one): None for one in documents})
    with pytest.raises(UsageError, match="cannot be asked for the label: its text has no labels, or too few documents"):
        probe(codes, "label")


def test_labels_are_read_from_the_text_without_the_model(tmp_path, monkeypatch):
    """From extraction to probe: which folder a document is of, by features of a random model's activations."""
    for folder, words in (("night", "moon star dark owl sleep"), ("kitchen", "salt pan bread stove knife")):
        (tmp_path / "text" / folder).mkdir(parents=True)
        rng = np.random.default_rng(len(folder))
        for n in range(14):
            text = " ".join(rng.choice(words.split(), 60))
            (tmp_path / "text" / folder / f"{n}.txt").write_text(f"{n} {text}")
    model = tiny_model("llama", tmp_path / "model", n_layers=2)
    asked = {"model": str(model), "dataset": str(tmp_path / "text"), "layers": 1, "context": 16, "device": "cpu"}
    (store,) = tcsae.extract(**asked, tokens="10k", held_out=0.0, out=tmp_path / "cache").stores
    small = {"k": 4, "width": 32, "steps": 30, "batch_size": 120, "baseline": False, "device": "cpu"}
    (run,) = tcsae.train(store=store, out=tmp_path / "runs", **small).runs
    encode_run(EncodeConfig(str(run)))
    monkeypatch.setattr(
        "tcsae.extract.model.load.load_language_model", lambda *_, **__: pytest.fail("no model is needed")
    )
    codes = CodeStore.open(run / "codes.zarr")
    found = probe(codes, "label")
    assert set(found.features) == {"night", "kitchen"}
    assert found.accuracy[20].value > 0.8
    assert abs(found.permuted.value - 0.5) < 0.35
    assert probe(codes, "token_class").features


def test_inspect_codes(tmp_path, capsys):
    run, _ = coded(tmp_path)
    encode_run(EncodeConfig(str(run)))
    assert main(["inspect", str(run / "codes.zarr"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["codes_of"], facts["features"], facts["rows"], facts["finished"]) == ("run", WIDTH, 40, True)
    assert facts["entries"] == CodeStore.open(run / "codes.zarr").n_entries
