import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcsae.errors import RunError
from tcsae.evaluate.intervals.jackknife import GROUPS, jackknife
from tcsae.evaluate.metrics.active_entries import ActiveEntries, matches, pair_masks, uniform_hash
from tcsae.evaluate.metrics.all import AllMetrics, families
from tcsae.evaluate.metrics.features import FeatureStatistics
from worlds import batch_of, fake_sae, random_world, value

FEW = settings(max_examples=20, deadline=None)


@FEW
@given(st.integers(0, 10_000))
def test_codes_hold_what_the_dense_features_hold(seed):
    z, batch = random_world(seed)
    active = ActiveEntries.from_dense(z, batch.valid_BT)
    back = torch.zeros_like(z)
    back.view(-1, 4)[active.token_E, active.feature_E] = active.value_E.float()
    assert torch.equal(back, z * batch.valid_BT[..., None])
    key = active.feature_E * 1000 + active.token_E
    assert bool((key[1:] > key[:-1]).all())


@FEW
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_matches_are_the_entries_active_at_both_ends_of_a_valid_pair(seed, lags):
    z, batch = random_world(seed)
    active = ActiveEntries.from_dense(z, batch.valid_BT)
    found = matches(active, pair_masks(batch.valid_BT, batch.documents_BT, lags))
    fast = {
        (int(active.feature_E[a]), int(active.token_E[a]), int(active.token_E[b]), int(lag))
        for lag, a, b in zip(found.lag_M, found.earlier_M, found.later_M, strict=True)
    }
    slow = {
        (i, r * 7 + t, r * 7 + t + lag, lag)
        for lag in range(1, lags + 1)
        for r in range(3)
        for t in range(7 - lag)
        for i in range(4)
        if batch.valid_BT[r, t]
        and batch.valid_BT[r, t + lag]
        and batch.documents_BT[r, t] == batch.documents_BT[r, t + lag]
        and z[r, t, i] != 0
        and z[r, t + lag, i] != 0
    }
    assert fast == slow
    assert len(found.lag_M) == len(slow)


def test_a_damaged_feature_is_named():
    z, batch = random_world(0)
    row, position = batch.valid_BT.nonzero()[5].tolist()
    z[row, position, 2] = float("nan")
    with pytest.raises(RunError, match=f"feature 2 is nan at row {row} of the batch, position {position}"):
        ActiveEntries.from_dense(z, batch.valid_BT)


@FEW
@given(st.integers(0, 10_000))
def test_counts_equal_the_dense_ones_whatever_the_batches(seed):
    worlds = [random_world(seed), random_world(seed + 1, rows=2)]
    sae = fake_sae(4)
    sae.W_dec *= torch.tensor([[1.0], [2.0], [0.5], [3.0]])
    part = FeatureStatistics(sae, context=7, seed=0)
    for z, batch in worlds:
        part.update(batch, ActiveEntries.from_dense(z, batch.valid_BT), batch.x_BTD)
    kept = torch.cat([z[batch.valid_BT] for z, batch in worlds]).double()
    found, tokens = part.result(), len(kept)
    active = kept != 0
    assert found.per_feature["density"].tolist() == pytest.approx(active.double().mean(0).tolist(), nan_ok=True)
    assert found.metrics["alive"].value == pytest.approx(float(active.any(0).double().mean()))
    assert found.metrics["share_dense_10pct"].value == pytest.approx(
        float((active.double().mean(0) > 0.1).double().mean())
    )
    top = kept.max(0).values.numpy()
    assert np.nan_to_num(found.per_feature["max_activation"]).tolist() == top.tolist()
    l0 = active.sum(1)
    edges, counts = np.array(found.curves["l0"].x), found.curves["l0"].y
    assert counts == np.histogram(l0.numpy(), edges)[0].tolist()
    assert sum(found.curves["l1"].y) == tokens
    l1 = (kept * sae.W_dec.double().norm(dim=1)).sum(1).numpy()
    edges = np.array(found.curves["l1"].x)
    inside = l1[l1 > 0]
    assert inside.min() >= edges[0] * (1 - 1e-9)
    assert inside.max() <= edges[-1] * (1 + 1e-9)
    assert value(found.sums["mean_activation"]) == pytest.approx(l1.sum() / active.sum().item())


def test_dense_shares_count_features_above_their_thresholds():
    z = torch.zeros(10, 101, 4)
    z[0, 1:6, 0] = 1  # 0.5 %
    z[0, 1:21, 1] = 1  # 2 %
    z[:3, 1:, 2] = 1  # 30 %
    part = FeatureStatistics(fake_sae(4), context=101, seed=0)
    batch = batch_of(z)
    part.update(batch, ActiveEntries.from_dense(z, batch.valid_BT), batch.x_BTD)
    found = part.result().metrics
    assert [found[key].value for key in ("alive", "share_dense_1pct", "share_dense_10pct")] == [0.75, 0.5, 0.25]


def test_the_jackknife_of_a_mean_is_that_of_its_standard_error():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(GROUPS, generator=generator, dtype=torch.float64)
    counts = torch.ones(GROUPS, dtype=torch.float64)
    found = jackknife(lambda n, total: float(total / n), counts, values, unit="1", definition="x")
    error = float(values.std()) / GROUPS**0.5
    assert found.value == pytest.approx(float(values.mean()))
    assert found.high - found.low == pytest.approx(2 * 2.365 * error)


def test_an_interval_needs_two_groups_and_a_defined_statistic():
    one = torch.tensor([5.0] + [0.0] * (GROUPS - 1), dtype=torch.float64)
    found = jackknife(lambda n, total: float(total / n), one, one, unit="1", definition="x")
    assert (found.value, found.low, found.high) == (1, None, None)
    nothing = torch.zeros(GROUPS, dtype=torch.float64)
    assert jackknife(lambda n, total: float(total / n), nothing, nothing, unit="1", definition="x").value is None


def test_hashes_are_uniform_and_know_every_number():
    rows, positions = np.arange(200)[:, None], np.arange(50)[None]
    hashed = uniform_hash(1, rows, positions)
    assert len(np.unique(hashed)) == 10_000
    assert np.histogram(hashed, 10, (0, 1))[0].min() > 900
    assert not np.array_equal(hashed, uniform_hash(2, rows, positions))
    assert np.array_equal(hashed[3:5, 7:9], uniform_hash(1, rows[3:5], positions[:, 7:9]))


def test_everything_is_defined_whose_key_is_used_and_a_dead_dictionary_raises_the_alarm():
    for density in (0.4, 0.0):
        z, batch = random_world(0, rows=30, density=density)
        measures = AllMetrics(fake_sae(4), families(), context=7, seed=0)
        measures.update(batch, ActiveEntries.from_dense(z, batch.valid_BT), batch.x_BTD)
        found = measures.result()
        used = {m.definition for part in (found.sums, found.metrics, found.curves) for m in part.values()}
        assert used <= set(measures.definitions)
        assert not set(found.sums) & set(found.metrics)
        assert all(len(values) == 4 for values in found.per_feature.values())
        assert any("dictionary is dead" in note for note in found.notes) == (density == 0)


def test_a_collapsing_dictionary_raises_the_alarm():
    sae = fake_sae(4)
    sae.W_dec[1] = sae.W_dec[0] + 0.01
    z, batch = random_world(0, rows=30)
    measures = AllMetrics(sae, families(), context=7, seed=0)
    measures.update(batch, ActiveEntries.from_dense(z, batch.valid_BT), batch.x_BTD)
    found = measures.result()
    assert found.metrics["near_duplicate_share"].value == 0.5
    assert any("collapses" in note for note in found.notes)
