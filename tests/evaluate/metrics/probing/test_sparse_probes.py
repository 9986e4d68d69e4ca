"""Sparse probes against scikit-learn run by hand, and on planted features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tcsae.evaluate.metrics.active_entries import ActiveEntries
from tcsae.evaluate.metrics.all import AllMetrics, installed
from tcsae.evaluate.metrics.probing import sparse_probes
from tcsae.evaluate.metrics.probing.one_vs_rest import FOLDS, Question, folds_of, rank_features, sparse_columns
from tcsae.evaluate.metrics.probing.passages import pooled
from tcsae.evaluate.metrics.registry import METRICS
from tcsae.evaluate.metrics.token_sample import TokenSample
from tcsae.evaluate.protocol import RawActivations
from worlds import batch_of, fake_sae, value

sklearn = pytest.importorskip("sklearn")

ROWS, CONTEXT, TOPICS, F = 96, 17, 4, 12
TOPIC_FEATURES, POSITION_FEATURES = slice(0, TOPICS), slice(TOPICS, TOPICS + 8)


def planted(*, topic: bool = True, position: bool = True, seed: int = 0):
    """Two rows a document and a label for each document; features that know the topic, and that know the position."""
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.arange(ROWS) // 2)[:, None].expand(ROWS, CONTEXT)
    labels = documents % TOPICS
    classes = torch.randint(0, 3, (ROWS, CONTEXT), generator=generator)
    z = (torch.rand(ROWS, CONTEXT, F, generator=generator) < 0.3) * torch.rand(ROWS, CONTEXT, F, generator=generator)
    if topic:
        z[..., TOPIC_FEATURES] += torch.nn.functional.one_hot(labels, TOPICS) * 2.0
    if position:
        bucket = (torch.arange(CONTEXT) * 8 // CONTEXT).expand(ROWS, CONTEXT)
        z[..., POSITION_FEATURES] += torch.nn.functional.one_hot(bucket, 8) * 2.0
    return z, batch_of(z, documents_BT=documents, units_BT=documents, labels_BT=labels, classes_BT=classes)


def probed(z, batch, rows_per_batch: int = ROWS, **more):
    found = AllMetrics(fake_sae(F), {"sparse_probes": METRICS.get("sparse_probes")}, context=CONTEXT, seed=0, **more)
    for start in range(0, len(z), rows_per_batch):
        part = slice(start, start + rows_per_batch)
        cut = type(batch)(**{name: one[part] for name, one in vars(batch).items()})
        found.update(cut, ActiveEntries.from_dense(z[part], cut.valid_BT), torch.zeros(len(z[part]), CONTEXT, 4))
    return found.result()


def test_features_that_know_give_what_they_must_and_permuted_labels_are_at_chance():
    found = {name: value(sums) for name, sums in probed(*planted()).sums.items()}
    for target in ("topic_passage", "topic_token", "position"):
        assert found[f"probe_{target}_k1"] > 0.99, target
        assert found[f"probe_{target}_k20"] > 0.99, target
        assert found[f"probe_{target}_permuted"] == pytest.approx(0.5, abs=0.09), target
    assert found["probe_token_class_k20"] == pytest.approx(0.5, abs=0.06)  # no feature knows it


def test_features_that_do_not_know_are_at_chance():
    found = {name: value(sums) for name, sums in probed(*planted(topic=False, position=False)).sums.items()}
    for target in ("topic_passage", "topic_token", "position"):
        assert found[f"probe_{target}_k20"] == pytest.approx(0.5, abs=0.1), target


def test_the_accuracy_is_scikit_learns_run_by_hand():
    from sklearn.feature_selection import f_classif
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    z, batch = planted(position=False)
    z = z * (torch.rand(z.shape, generator=torch.Generator().manual_seed(5)) < 0.4)  # not so easy
    mean = (z * batch.valid_BT[..., None]).sum(1) / batch.valid_BT.sum(1, keepdim=True)
    x, y, documents = mean.double().numpy(), batch.labels_BT[:, 0].numpy(), batch.documents_BT[:, 0].numpy()
    fold = folds_of(documents, y, by_class=True)
    for k in (1, 5):
        per_class = []
        for one in range(TOPICS):
            says = np.zeros(ROWS, dtype=bool)
            for test in (fold == number for number in range(FOLDS)):
                best = np.argsort(-f_classif(x[~test], y[~test] == one)[0])[:k]
                center, scale = x[~test][:, best].mean(0), x[~test][:, best].std(0)
                model = LogisticRegression(class_weight="balanced", max_iter=1000)
                model.fit((x[~test][:, best] - center) / scale, y[~test] == one)
                says[test] = model.predict((x[test][:, best] - center) / scale)
            per_class.append(balanced_accuracy_score(y == one, says))
        assert value(probed(z, batch).sums[f"probe_topic_passage_k{k}"]) == pytest.approx(np.mean(per_class), abs=1e-9)
        assert 0.6 < np.mean(per_class) < 1


def test_no_document_is_trained_and_tested_on_in_one_fold():
    documents = np.random.default_rng(0).integers(0, 40, 500)
    labels = documents % 5
    for by_class in (True, False):
        fold = folds_of(documents, labels, by_class=by_class)
        assert set(fold) == set(range(FOLDS))
        assert all(len(set(fold[documents == one])) == 1 for one in range(40))
    fold = folds_of(documents, labels, by_class=True)
    for label in range(5):  # eight documents of each
        counts = [len(set(documents[(labels == label) & (fold == one)])) for one in range(FOLDS)]
        assert max(counts) - min(counts) <= 1


def test_features_are_chosen_on_the_training_documents_alone():
    """A feature that tells the topic in one fold's test documents only is not chosen for that fold."""
    z, batch = planted(topic=False, position=False)
    sample = TokenSample(5000, 0, 0, z.device)
    sample.update(batch, ActiveEntries.from_dense(z, batch.valid_BT))
    whole = sample.taken()
    question = Question.of(whole, whole.label_M.numpy(), True)
    leaky = torch.zeros(ROWS, CONTEXT)
    fold_of_document = dict(zip(whole.document_M.tolist(), question.fold_M.tolist(), strict=True))
    for row in range(ROWS):
        if fold_of_document[row // 2] == 0:
            leaky[row] = 5.0 * (row // 2 % TOPICS == 1)
    z = torch.cat([z, leaky[..., None]], 2)
    sample = TokenSample(5000, 0, 0, z.device)
    sample.update(batch, ActiveEntries.from_dense(z, batch.valid_BT))
    ranking = rank_features(sample.taken(), question.class_M, question.fold_M, question.asked, 1)
    assert ranking[1, 0].tolist() != [F]
    assert ranking[1, 1].tolist() == ranking[1, 2].tolist() == [F]
    columns = sparse_columns(sample.taken(), ranking)
    assert columns(1, 1, 1).shape == (len(whole), 1)


def test_every_accuracy_is_a_ratio_of_sums_over_documents():
    found = probed(*planted())
    sums = found.sums["probe_topic_token_k5"]
    assert len(sums.numerator_U) == ROWS // 2
    assert (sums.denominator_U > 0).all()  # every document is tested
    assert sums.denominator_U.sum() == pytest.approx(1)
    assert sums.n == ROWS * (CONTEXT - 1)


def test_nothing_depends_on_the_batches():
    z, batch = planted()
    whole, parts = probed(z, batch), probed(z, batch, rows_per_batch=7)
    assert whole.sums.keys() == parts.sums.keys()
    for key, sums in whole.sums.items():
        assert value(sums) == value(parts.sums[key]), key


def test_text_without_labels_has_no_topic_probe_and_says_so():
    z, batch = planted()
    found = probed(z, type(batch)(**vars(batch) | {"labels_BT": torch.full_like(batch.labels_BT, -1)}))
    assert not any("topic" in name for name in found.sums)
    assert any("no labels" in note for note in found.notes)
    assert value(found.sums["probe_position_k1"]) > 0.99


def test_a_label_with_too_few_documents_is_not_asked_for():
    z, batch = planted()
    rare = torch.where(batch.documents_BT == 3, 9, batch.labels_BT)
    found = probed(z, type(batch)(**vars(batch) | {"labels_BT": rare}))
    assert value(found.sums["probe_topic_passage_k1"]) > 0.97  # of the four others


def test_passages_are_means_over_tokens_that_count_and_rows_of_two_documents_are_none():
    z, batch = planted()
    documents = batch.documents_BT.clone()
    documents[4, 9:] = 99
    valid = batch.valid_BT.clone()
    valid[5, 3:] = False  # two tokens are too few
    valid[6, 8] = False
    batch = type(batch)(**vars(batch) | {"documents_BT": documents, "valid_BT": valid})
    shorter, active = pooled(batch, ActiveEntries.from_dense(z, valid))
    assert shorter.valid_BT.shape == (ROWS, 1)
    assert not shorter.valid_BT[4, 0]
    assert not shorter.valid_BT[5, 0]
    got = torch.zeros(ROWS, F, dtype=torch.float64)
    got[active.token_E, active.feature_E] = active.value_E
    for row in (0, 6):
        assert torch.allclose(got[row], z[row][valid[row]].double().mean(0))
        assert torch.allclose(shorter.x_BTD[row, 0], batch.x_BTD[row][valid[row]].mean(0))
    assert got[[4, 5]].abs().sum() == 0


def test_raw_activations_are_the_ceiling():
    z, batch = planted()
    batch = type(batch)(**vars(batch) | {"x_BTD": z})
    found = AllMetrics(RawActivations(F, z.device), {"p": METRICS.get("sparse_probes")}, context=CONTEXT, seed=0)
    found.update(batch, ActiveEntries.from_dense(z[..., :0], batch.valid_BT), z)
    sums = found.result().sums
    assert value(sums["probe_activation_topic_passage"]) > 0.99
    assert value(sums["probe_activation_position"]) > 0.95
    assert set(sums) == {f"probe_activation_{name}" for name in sparse_probes.TARGETS}


def test_memory_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr(sparse_probes, "TOKENS", 50)
    monkeypatch.setattr(sparse_probes, "PASSAGES", 10)
    z, batch = planted()
    probes = sparse_probes.SparseProbes(fake_sae(F), context=CONTEXT, seed=0)
    held = []
    for turn in range(20):
        rows = batch.rows_B + turn * ROWS
        again = type(batch)(**vars(batch) | {"rows_B": rows, "documents_BT": batch.documents_BT + turn * ROWS})
        probes.update(again, ActiveEntries.from_dense(z, again.valid_BT), z)
        held.append(sum(len(part.value_E) for one in (probes._tokens, probes._passages) for part in one._parts))
    assert max(held[10:]) <= 2 * (50 + 10) * F
    assert len(probes._tokens.taken()) == 50


def test_without_scikit_learn_the_metric_is_left_out_with_the_command_that_installs_it(monkeypatch):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "sklearn" else there(name))
    kept, missing = installed({name: METRICS.get(name) for name in ("sparse_probes", "features")})
    assert list(kept) == ["features"]
    (sentence,) = missing
    assert "pip install 'tcsae[study]'" in sentence
