"""Fits of many classes at once against scikit-learn's, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tcsae.evaluate.metrics.probing import one_vs_rest
from tcsae.evaluate.metrics.probing.logistic import fit, predictions
from tcsae.evaluate.metrics.probing.one_vs_rest import Question
from tcsae.evaluate.metrics.token_sample import SampledTokens

pytest.importorskip("sklearn")

C, M = 3, 80


def a_world(seed: int, columns: int, *, scale: float = 1.0, strength: float = 1.0):
    """Sparse columns, of which the first tells something of every class; class 0 is rare."""
    draw = np.random.default_rng(seed)
    is_CM = draw.random((C, M)) < np.array([0.08, 0.4, 0.7])[:, None]
    is_CM[:, 0], is_CM[:, 1] = True, False
    x_CMK = draw.random((C, M, columns)) * (draw.random((C, M, columns)) < 0.4)
    x_CMK[..., 0] += strength * is_CM
    return scale * x_CMK, is_CM


def one_by_one(x_CMK, is_CM, penalty):
    from sklearn.linear_model import LogisticRegression

    found = []
    for x_MK, is_M in zip(x_CMK, is_CM, strict=True):
        model = LogisticRegression(C=penalty, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(x_MK, is_M)
        found.append([*model.coef_[0], model.intercept_[0]])
    return np.array(found)


@given(st.integers(0, 1000), st.integers(1, 20), st.sampled_from([0.01, 1.0, 100.0]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_minimum_is_scikit_learns(seed, columns, penalty, strength):
    x_CMK, is_CM = a_world(seed, columns, strength=strength)  # from telling nothing to telling all
    x_CMK = (x_CMK - x_CMK.mean(1, keepdims=True)) / x_CMK.std(1, keepdims=True).clip(1e-9)
    ones = np.ones((C, M, 1))
    found = fit(torch.from_numpy(np.concatenate([x_CMK, ones], 2)), torch.from_numpy(is_CM), penalty)
    np.testing.assert_allclose(found, one_by_one(x_CMK, is_CM, penalty), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_units_of_a_column_do_not_matter_and_a_constant_one_says_nothing(scale):
    x_CMK, is_CM = a_world(0, 4)
    expected = predictions(x_CMK, is_CM, x_CMK, 1.0)
    assert expected.any()
    assert not expected.all()
    moved = scale * x_CMK + 3 * scale
    constant = np.concatenate([moved, np.full((C, M, 1), 7.0)], 2)
    asked = np.concatenate([moved, np.full((C, M, 1), 9.0)], 2)  # another one than in training
    np.testing.assert_array_equal(predictions(constant, is_CM, asked, 1.0), expected)


def a_question(class_M, documents: int) -> Question:
    """Samples of these classes, from documents at random."""
    document_M = torch.from_numpy(np.random.default_rng(1).integers(0, documents, len(class_M)))
    unused = dict.fromkeys(SampledTokens.__dataclass_fields__, torch.zeros(0))
    sample = SampledTokens(**unused | {"document_M": document_M, "unit_M": document_M})
    return Question.of(sample, class_M, by_document=False)


def accuracy(question: Question, columns) -> float:
    sums = question.answered("accuracy", columns)["accuracy"]
    return sums.numerator_U.sum() / sums.denominator_U.sum()


def test_many_columns_are_fitted_by_scikit_learn_with_the_same_answers(monkeypatch):
    draw = np.random.default_rng(0)
    class_M = draw.integers(0, 3, 300)
    x_MK = draw.normal(size=(300, 6)) + 0.7 * np.eye(6)[class_M]
    together = accuracy(a_question(class_M, 30), lambda *_: x_MK)
    monkeypatch.setattr(one_vs_rest, "NARROW", 1)
    assert accuracy(a_question(class_M, 30), lambda *_: x_MK) == pytest.approx(together, abs=0.01)
    assert 0.55 < together < 0.95


def test_a_class_for_which_no_feature_tells_anything_is_answered_no():
    draw = np.random.default_rng(0)
    class_M = draw.integers(0, 2, 200)
    x_M1 = class_M[:, None] + 0.1 * draw.normal(size=(200, 1))
    found = accuracy(a_question(class_M, 20), lambda one, _: x_M1 if one == 1 else None)
    assert found == pytest.approx(0.75, abs=0.01)  # 1 of one class, ½ of the other
