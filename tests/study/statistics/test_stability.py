"""Feature stability on dictionaries whose overlap is known."""

from __future__ import annotations

import pytest
import torch
from tcsae.errors import UsageError
from tcsae.study.statistics import stability as module
from tcsae.study.statistics.stability import MATCHED, stability


def directions(n: int, d: int, seed: int):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_a_dictionary_in_another_order_and_scale_is_the_same():
    W = directions(50, 16, 0)
    found = stability(W, 3 * W[torch.randperm(50, generator=torch.Generator().manual_seed(1))])
    assert found.mean_max_cosine == pytest.approx(1, abs=1e-5)
    assert found.matched_share == 1


def test_half_a_dictionary_found_again():
    W, other = directions(60, 64, 0), directions(60, 64, 1)
    other[:30] = W[:30] + 0.05 * directions(30, 64, 2)
    assert stability(W, other).matched_share == pytest.approx(0.5)


def test_random_dictionaries_share_nothing_and_their_mean_is_what_chance_gives():
    found = stability(directions(1000, 256, 0), directions(1000, 256, 1))
    assert found.matched_share == 0
    assert 0.15 < found.mean_max_cosine < (2 * torch.log(torch.tensor(1000.0)) / 256).sqrt()


def test_many_copies_of_one_feature_match_one():
    W = directions(40, 16, 0)
    copies = W[:1].expand(40, 16) + 0.001 * directions(40, 16, 1)
    assert stability(copies, W).matched_share == pytest.approx(1 / 40)


def test_opposite_directions_and_rows_of_zeros_are_like_none():
    W = torch.eye(8)
    assert stability(W, -W).matched_share == 0
    assert stability(torch.zeros(8, 8), W).mean_max_cosine == 0


def test_greedy_agrees_with_the_optimal_assignment_where_few_compete(monkeypatch):
    optimize = pytest.importorskip("scipy.optimize")
    W = directions(300, 32, 0)
    other = torch.cat([W[:200] + 0.1 * directions(200, 32, 1), W[150:200] + 0.1 * directions(50, 32, 2)])
    cosine = torch.nn.functional.normalize(W, dim=1) @ torch.nn.functional.normalize(other, dim=1).T
    rows, columns = optimize.linear_sum_assignment(-(cosine * (cosine > MATCHED)).numpy())
    expected = (cosine[rows, columns] > MATCHED).double().mean()
    monkeypatch.setattr(module, "_BLOCK", 37)
    assert stability(W, other).matched_share == pytest.approx(float(expected))
    assert stability(other, W).mean_max_cosine == pytest.approx(stability(W, other).mean_max_cosine)


def test_decoders_of_different_widths_are_refused():
    with pytest.raises(UsageError, match=r"\[4, 8\] and \[4, 16\]"):
        stability(torch.ones(4, 8), torch.ones(4, 16))
