import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcsae.evaluate.metrics.active_entries import ActiveEntries
from tcsae.evaluate.metrics.position import PositionStatistics, eta_squared, position_information
from tcsae.evaluate.metrics.rotation_test import RotationSample, false_discovery_rate, pooled_p, standardised
from worlds import batch_of, fake_sae, random_world

FEW = settings(max_examples=15, deadline=None)


def measure(*batches, features: int, seed: int = 0):
    part = PositionStatistics(fake_sae(features), context=batches[0][0].shape[1], seed=seed)
    for z, batch in batches:
        part.update(batch, ActiveEntries.from_dense(z, batch.valid_BT), batch.x_BTD)
    return part.result()


def at_positions(z, valid, feature: int):
    """Values of a feature at each position from 1 on, where the token counts."""
    return [[z[r][t][feature] for r in range(len(z)) if valid[r][t]] for t in range(1, len(z[0]))]


@FEW
@given(st.integers(0, 10_000))
def test_position_sums_give_what_loops_give(seed):
    (z, batch), (z2, batch2) = random_world(seed, rows=5), random_world(seed + 1, rows=4)
    found = measure((z, batch), (z2, batch2), features=4).per_feature
    rows = [*z.double().tolist(), *z2.double().tolist()]
    valid = [*batch.valid_BT.tolist(), *batch2.valid_BT.tolist()]
    for feature in range(4):
        groups = at_positions(rows, valid, feature)
        slow = reference.metric_eta_squared(groups)
        assert float(found["eta_squared"][feature]) == pytest.approx(slow, rel=1e-9, nan_ok=True)
        for t, group in enumerate(groups, start=1):
            mean = sum(group) / len(group) if group else math.nan
            assert float(found["position_mean"][feature, t]) == pytest.approx(mean, rel=1e-12, nan_ok=True)


@FEW
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(0, 10_000))
def test_information_is_unbiased_when_firings_fall_at_random(tokens, seed):
    """The correction is the exact mean over all ways to place the firings: here by trying many."""
    generator = np.random.default_rng(seed)
    n = sum(tokens)
    firing = int(generator.integers(1, n + 1))
    placed = [generator.permutation(n) < firing for _ in range(400)]
    edges = np.cumsum(tokens)[:-1]
    split = [[part.tolist() for part in np.split(one, edges)] for one in placed]
    slow = np.array([reference.metric_information(groups) for groups in split])
    counts = torch.tensor([[sum(group) for group in groups] for groups in split], dtype=torch.float64)
    fast = position_information(counts, torch.tensor(tokens, dtype=torch.float64)).numpy()
    bias = slow - fast
    assert bias == pytest.approx(np.full(400, bias[0]), abs=1e-12)
    assert abs(fast.mean()) <= 5 * slow.std() / 20 + 1e-12


def test_information_of_frequent_features_meets_that_of_rare_ones():
    tokens = torch.full((31,), 2000.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for firing in (1900, 2100):  # either side of where the exact correction ends
        active = torch.bincount(torch.randint(0, 31, (firing,), generator=generator), minlength=31).double()[None]
        slow = reference.metric_information([[True] * int(a) + [False] * int(2000 - a) for a in active[0]])
        assert slow - float(position_information(active, tokens)) == pytest.approx(30 / (2 * 62000), rel=0.05)


def test_a_position_locked_feature_has_all_its_variance_there_and_a_mixed_one_its_share():
    generator = torch.Generator().manual_seed(0)
    z = torch.zeros(200, 16, 3)
    z[:, 5, 0] = 2.0  # fires at position 5, always the same
    z[:, 1:, 1] = torch.arange(15) / 15 + torch.randn(200, 15, generator=generator)  # a slope in noise
    z[:, :, 2] = torch.randn(200, 16, generator=generator)
    found = measure((z, batch_of(z)), features=3)
    eta = found.per_feature["eta_squared"]
    slope = float((torch.arange(15) / 15).var(correction=0))
    assert eta[0] == pytest.approx(1)
    assert eta[1] == pytest.approx(slope / (1 + slope), abs=0.02)
    assert eta[2] == pytest.approx(0, abs=0.01)
    fire = torch.zeros(200, 16)
    fire[:, 5] = 1
    entropy = -(1 / 15) * math.log(1 / 15) - (14 / 15) * math.log(14 / 15)
    assert found.per_feature["position_information"][0] == pytest.approx(entropy, rel=0.02)
    assert found.per_feature["position_q"][0] < 1e-4
    assert found.per_feature["position_q"][2] > 0.05


def test_the_means_have_intervals_over_text_that_hold_the_truth_of_independent_features():
    z = (torch.rand(120, 16, 50, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    found = measure((z, batch_of(z)), features=50).metrics
    for key in ("eta_squared", "position_mutual_information"):
        assert found[key].low < 0 < found[key].high
        assert found[key].high - found[key].low < 0.01


def test_bias_correction_centres_eta_squared_on_zero():
    z = torch.randn(20, 33, 400, generator=torch.Generator().manual_seed(0)).double()
    sums = z[:, 1:].sum(0).T
    eta = eta_squared(sums, (z[:, 1:] ** 2).sum((0, 1)), torch.full((32,), 20.0, dtype=torch.float64))
    raw_mean = 31 / 639  # what η² itself would average to
    assert abs(float(eta.mean())) < raw_mean / 20


def bursty(rows: int, context: int, features: int, seed: int):
    """Features without any tie to the position, but in bursts, of every density and with heavy-tailed values."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.logspace(-2, -0.5, features)
    stay = torch.rand(features, generator=generator) * 0.9
    uniform = torch.rand(rows, context, features, generator=generator)
    on = torch.empty(rows, context, features, dtype=torch.bool)
    on[:, 0] = uniform[:, 0] < density
    for t in range(1, context):
        on[:, t] = uniform[:, t] < torch.where(on[:, t - 1], stay, density * (1 - stay) / (1 - density))
    return on * torch.randn(rows, context, features, generator=generator).exp()


def test_the_rotation_test_keeps_its_rate_on_bursts_and_finds_what_is_planted():
    """400 features, a tenth planted: at 5 % the false share of what is found stays within binomial noise of 5 %."""
    discoveries, false, p_values = 0, 0, []
    for seed in range(3):
        z = bursty(120, 24, 400, seed)
        z[:, 7, ::10] += torch.randn(120, 40, generator=torch.Generator().manual_seed(seed)).abs() * 3
        batch = batch_of(z)
        sample = RotationSample(400, 24, seed)
        sample.update(batch, ActiveEntries.from_dense(z, batch.valid_BT))
        p = sample.p_values(rotations=100)
        planted = np.arange(400) % 10 == 0
        found = false_discovery_rate(p) <= 0.05
        assert np.isfinite(p[~planted]).mean() > 0.9
        assert found[planted].mean() > 0.95
        discoveries += found.sum()
        false += found[~planted].sum()
        p_values.append(p[~planted & np.isfinite(p)])
    limit = 0.05 * discoveries
    assert false <= limit + 3 * math.sqrt(limit)
    below = np.concatenate(p_values)
    for level in (0.01, 0.05, 0.2, 0.5):
        expected = level * len(below)
        assert abs((below <= level).sum() - expected) < 4 * math.sqrt(expected) + 0.1 * expected


def test_the_statistic_is_the_between_position_sum_of_squares_and_offsets_rotate_rows():
    z, batch = random_world(3, rows=12, context=6)
    sample = RotationSample(4, 6, 0)
    sample.update(batch, ActiveEntries.from_dense(z, batch.valid_BT))
    found = sample.statistics(np.arange(4), 5, seed=1)
    offsets = np.random.default_rng(1).integers(5, size=(6, 12), dtype=np.int16)
    offsets[0] = 0
    for at, offset in enumerate(offsets):
        rotated = torch.stack([torch.roll(z[r, 1:], int(offset[r]), 0) for r in range(12)])
        counted = torch.stack([torch.roll(batch.valid_BT[r, 1:], int(offset[r]), 0) for r in range(12)])
        for feature in range(4):
            groups = [rotated[counted[:, p], p, feature].double().tolist() for p in range(5)]
            everything = [v for group in groups for v in group]
            mean = sum(everything) / len(everything)
            slow = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups if g)
            assert found[feature, at] == pytest.approx(slow, rel=1e-6)


def test_the_sample_stays_bounded_keeps_whole_rows_and_does_not_depend_on_the_batches():
    z = (
        torch.rand(96, 12, 5, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.9, 0.5, 0.2, 0.05, 0.0])
    ).float()
    samples = [RotationSample(5, 12, 0, events=40, min_rows=2) for _ in range(2)]
    for sample, step in zip(samples, (8, 48), strict=True):
        for start in range(0, 96, step):
            batch = batch_of(z[start : start + step], first_row=start)
            sample.update(batch, ActiveEntries.from_dense(z[start : start + step], batch.valid_BT))
    one, other = samples
    assert one.level_F.tolist() == other.level_F.tolist()
    events, rows = one.events()
    assert events.max() <= 80
    assert one.level_F[0] > one.level_F[2] >= 0
    assert np.array_equal(events, other.events()[0])
    for feature in range(5):
        kept = np.flatnonzero(one._row_level >= one.level_F[feature])
        assert events[feature] == z[kept, 1:, feature].sum()
        assert rows[feature] == (z[kept, 1:, feature].sum(1) > 0).sum()


def test_too_rare_features_are_not_tested():
    z = torch.zeros(40, 8, 2)
    z[:9, 3, 0] = 1.0  # nine rows, one position: remarkable, but too few rotations differ
    z[:, 3, 1] = 1.0
    found = measure((z, batch_of(z)), features=2)
    assert np.isnan(found.per_feature["position_p"][0])
    assert found.per_feature["position_p"][1] < 0.01
    assert found.metrics["position_tested_share"].value == 0.5
    assert found.metrics["position_specific_share"].value == 1


def test_replicates_are_measured_against_the_others():
    null = np.array([[1.0, 2.0, 3.0, 10.0]])
    observed, standard = standardised(np.array([[4.0, *null[0]]]))
    assert observed[0] == pytest.approx((4 - 4) / null.std())
    others = np.array([1.0, 2.0, 3.0])
    assert standard[0, 3] == pytest.approx((10 - others.mean()) / others.std())


def test_the_gamma_tail_goes_on_where_counting_ends():
    generator = np.random.default_rng(0)
    null = generator.gamma(3, 1, 40_000)
    for value in (12.0, 16.0, 20.0):
        true = math.exp(-value) * (1 + value + value**2 / 2)
        assert pooled_p(np.array([value]), null)[0] == pytest.approx(true, rel=0.5)
    assert np.all(np.diff(pooled_p(np.linspace(0, 30, 200), null)) <= 0)


def test_q_values_are_those_of_benjamini_and_hochberg():
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.9])
    assert false_discovery_rate(p)[[0, 2, 3, 4]] == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.9])
    assert np.isnan(false_discovery_rate(p)[1])


def test_a_text_without_firings_has_no_position():
    z = torch.zeros(3, 6, 2)
    found = measure((z, batch_of(z)), features=2)
    assert found.metrics["eta_squared"].value is None
    assert found.metrics["position_specific_share"].n == 0
    assert found.curves == {}
