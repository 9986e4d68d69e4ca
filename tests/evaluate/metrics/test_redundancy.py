from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcsae.evaluate.metrics import redundancy
from tcsae.evaluate.metrics.redundancy import decoder_neighbours, duplicate_groups, neighbours_of

FEW = settings(max_examples=20, deadline=None)


@pytest.fixture(params=[3, 2048])
def block(request, monkeypatch):
    monkeypatch.setattr(redundancy, "BLOCK", request.param)


def rows(seed: int, features: int = 11) -> torch.Tensor:
    """Rows of different norms, several nearly repeated, one zero."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(features, 5, generator=generator)
    W[4] = 3 * W[1] + 0.02 * torch.randn(5, generator=generator)
    W[7] = 0.5 * W[1] + 0.02 * torch.randn(5, generator=generator)
    W[9] = 0
    return W


def cosines(W):
    unit = W.double() / W.double().norm(dim=1, keepdim=True)
    return unit @ unit.T


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_are_those_of_the_full_matrix(block, seed):
    W = rows(seed)
    alive = torch.ones(11, dtype=torch.bool)
    alive[2] = False
    neighbour, cosine = decoder_neighbours(W, alive)
    full = cosines(W)
    full[:, [2, 9]] = -2
    full.fill_diagonal_(-2)
    for i in range(11):
        if i in (2, 9):
            assert neighbour[i] == -1
            assert cosine[i].isnan()
        else:
            assert neighbour[i] == full[i].argmax()
            assert float(cosine[i]) == pytest.approx(float(full[i].max()), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_of_some_features_are_what_they_are_among_all(block, seed):
    W = rows(seed)
    alive = torch.ones(11, dtype=torch.bool)
    alive[2] = False
    neighbour, cosine = decoder_neighbours(W, alive)
    chosen = torch.tensor([10, 2, 7, 0, 9, 1, 5])
    some, their = neighbours_of(chosen, W, alive)
    others = torch.ones(11, dtype=torch.bool)
    others[chosen] = False
    assert (some[others] == -1).all()
    assert their[others].isnan().all()
    assert torch.equal(some[chosen], neighbour[chosen])
    assert torch.allclose(their[chosen], cosine[chosen], equal_nan=True)


def test_of_many_features_a_random_share_is_compared_and_n_says_so(monkeypatch):
    """A third of 3000 features repeat another one: 600 of them say so within three standard errors."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3000, 64, generator=generator)
    W[2500:] = W[:500]
    everywhere = SimpleNamespace(per_feature=lambda: torch.ones(3000))

    def measured():
        found = redundancy.Redundancy(SimpleNamespace(W_dec=W, n_features=3000), context=8, seed=1)
        found.update(None, everywhere, None)
        return found.result()

    exact = measured()
    monkeypatch.setattr(redundancy, "EXACT_UP_TO", 2999)
    monkeypatch.setattr(redundancy, "SAMPLE", 600)
    sampled = measured()
    assert exact.metrics["near_duplicate_share"].value == pytest.approx(1000 / 3000)
    assert exact.metrics["near_duplicate_share"].n == 3000
    assert sampled.metrics["near_duplicate_share"].n == 600
    assert sampled.metrics["near_duplicate_share"].value == pytest.approx(1 / 3, abs=3 * (2 / 9 / 600) ** 0.5)
    both = sampled.per_feature["neighbour"] >= 0
    assert both.sum() == 600
    assert (sampled.per_feature["neighbour"][both] == exact.per_feature["neighbour"][both]).all()


def test_a_lone_feature_has_no_neighbour():
    neighbour, cosine = decoder_neighbours(torch.eye(3), torch.tensor([True, False, False]))
    assert neighbour.tolist() == [-1, -1, -1]
    assert cosine.isnan().all()


@FEW
@given(st.integers(0, 1000), st.floats(0.3, 0.95))
def test_groups_are_those_of_one_leader_at_a_time(seed, threshold):
    W, energy = rows(seed), torch.rand(11, generator=torch.Generator().manual_seed(seed))
    full, order = cosines(W), torch.argsort(energy, descending=True).tolist()
    leaders, slow = [], list(range(11))
    for i in order:
        if i == 9:
            continue  # a zero row is like nothing
        best = max(leaders, key=lambda j: float(full[i, j]), default=None)
        if best is not None and full[i, best] >= threshold:
            slow[i] = best
        else:
            leaders.append(i)
    for size in (3, 2048):
        redundancy.BLOCK, before = size, redundancy.BLOCK
        try:
            assert duplicate_groups(W, energy, min_cosine=threshold).tolist() == slow
        finally:
            redundancy.BLOCK = before


def test_near_duplicates_join_the_more_energetic_one():
    W = rows(0)
    energy = torch.ones(11)
    energy[4] = 5
    leader = duplicate_groups(W, energy)
    assert leader[[1, 4, 7]].tolist() == [4, 4, 4]
    assert leader[[0, 9]].tolist() == [0, 9]
