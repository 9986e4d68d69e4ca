import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcsae.evaluate.intervals.jackknife import group_of
from tcsae.evaluate.metrics.active_entries import ActiveEntries, matches, pair_masks
from tcsae.evaluate.metrics.gain_refit import refit_gains
from tcsae.evaluate.metrics.run_lengths import RunCounts, followed
from tcsae.evaluate.metrics.temporal import TemporalStatistics
from tcsae.evaluate.metrics.token_sample import TokenSample
from worlds import batch_of, fake_sae, random_world, value

FEW = settings(max_examples=15, deadline=None)


def measure(sae, *batches, lags: int = 4, seed: int = 0):
    """Feed (z, batch) pairs; the reconstruction is the activation itself."""
    part = TemporalStatistics(sae, context=batches[0][0].shape[1], seed=seed, lags=lags)
    for z, batch in batches:
        part.update(batch, ActiveEntries.from_dense(z, batch.valid_BT), batch.x_BTD)
    return part, part.result()


def same(a: float, b: float, *, absolute: float = 1e-9) -> bool:
    return math.isnan(a) if math.isnan(b) else a == pytest.approx(b, rel=1e-6, abs=absolute)


@FEW
@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_pair_metrics_equal_the_slow_ones(seed, density):
    z, batch = random_world(seed, density=density)
    _, found = measure(fake_sae(4), (z, batch))
    rows, valid, documents = z.double().tolist(), batch.valid_BT.tolist(), batch.documents_BT.tolist()
    pairs = reference.metric_pairs(valid, documents, 1)
    assert same(value(found.sums["temporal_variation"]), reference.metric_variation(rows, pairs))
    for name, slow in (
        ("adjacent_cosine_raw", reference.metric_cosine),
        ("adjacent_jaccard_raw", reference.metric_jaccard),
    ):
        every = [slow(rows[r][t], rows[r][t + 1]) for r, t in pairs]
        every = [v for v in every if not math.isnan(v)]
        assert same(value(found.sums[name]), sum(every) / len(every) if every else math.nan)
        assert found.sums[name].denominator_U.sum() == len(every)
    x = batch.x_BTD.double().tolist()
    every = [reference.metric_cosine(x[r][t], x[r][t + 1]) for r, t in pairs]
    slow = sum(every) / len(every) if every else math.nan
    assert same(value(found.sums["activation_adjacent_cosine"]), slow, absolute=1e-6)  # products of float32
    assert same(value(found.sums["smoothness"]), reference.metric_smoothness(rows, x, valid, documents))


@FEW
@given(st.integers(0, 10_000))
def test_autocorrelation_equals_the_slow_one_whatever_the_batches(seed):
    (z, batch), (z2, batch2) = random_world(seed), random_world(seed + 1, rows=2)
    part, _ = measure(fake_sae(4), (z, batch), (z2, batch2))
    both = [*z.double().tolist(), *z2.double().tolist()]
    valid = [*batch.valid_BT.tolist(), *batch2.valid_BT.tolist()]
    documents = [*batch.documents_BT.tolist(), *batch2.documents_BT.tolist()]
    for centred in (True, False):
        fast = part._sums.autocorrelations(centred=centred)
        for lag in (1, 2, 4):
            slow = reference.metric_autocorrelation(
                both, reference.metric_pairs(valid, documents, lag), lag, centred=centred
            )
            assert all(same(float(f), s) for f, s in zip(fast[:, lag - 1], slow, strict=True))


@FEW
@given(st.integers(0, 10_000), st.floats(0.3, 0.9))
def test_runs_equal_the_slow_ones(seed, density):
    z, batch = random_world(seed, density=density, context=9)
    active = ActiveEntries.from_dense(z, batch.valid_BT)
    masks = pair_masks(batch.valid_BT, batch.documents_BT, 1)
    runs = RunCounts(4, 9, z.device)
    runs.update(active, masks, group_of(batch.units_BT), *followed(active, matches(active, masks)))
    slow = reference.metric_runs(z.tolist(), batch.valid_BT.tolist(), batch.documents_BT.tolist())
    seen = [(length, ended) for _, length, begun, ended in slow if begun]
    for kept, wanted in ((runs.ended_GT.sum(0), True), (runs.cut_GT.sum(0), False)):
        assert kept.tolist() == [sum(length == at and ended == wanted for length, ended in seen) for at in range(10)]
    # A token is a chance to end when its successor counts: all of a run's tokens but the last, and the last if the end
    # is seen.
    assert runs.chances_GF.sum() == sum(length - 1 + ended for _, length, _, ended in slow)
    assert runs.ends_GF.sum(0).tolist() == [sum(f == i and ended for f, _, _, ended in slow) for i in range(4)]
    assert runs.starts_GF.sum() == len(seen)


def ar1(rho: float, rows: int, context: int, features: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.empty(rows, context, features)
    z[:, 0] = torch.randn(rows, features, generator=generator)
    for t in range(1, context):
        z[:, t] = rho * z[:, t - 1] + math.sqrt(1 - rho**2) * torch.randn(rows, features, generator=generator)
    return z


def test_an_autoregressive_feature_has_powers_of_its_coefficient():
    rho = 0.8
    z = ar1(rho, 100, 64, 3) + 5  # a mean that the centred form must not see
    _, found = measure(fake_sae(3), (z, batch_of(z)))
    curve = found.curves["lag_autocorrelation"]
    assert curve.y == pytest.approx([rho**lag for lag in (1, 2, 3, 4)], abs=0.02)
    assert all(low < y < high for low, y, high in zip(curve.low, curve.y, curve.high, strict=True))
    uncentred = found.metrics["lag1_autocorrelation_uncentred"].value
    assert uncentred == pytest.approx((rho + 25) / 26, abs=0.01)


def test_a_periodic_feature_comes_back_after_its_period():
    z = torch.zeros(6, 32, 1)
    z[:, ::4] = 1.0
    _, found = measure(fake_sae(1), (z, batch_of(z)))
    y = found.curves["lag_autocorrelation_uncentred"].y
    assert y[:3] == [0, 0, 0]
    assert y[3] == pytest.approx(1)
    assert found.curves["lag_autocorrelation"].y[3] == pytest.approx(1)
    assert value(found.sums["temporal_variation"]) == pytest.approx(2)  # neighbours share nothing


def test_a_constant_feature_does_not_vary_and_has_no_correlation():
    z = torch.full((4, 16, 2), 3.0)
    _, found = measure(fake_sae(2), (z, batch_of(z)))
    assert value(found.sums["temporal_variation"]) == 0
    assert found.metrics["lag1_autocorrelation"].value is None
    assert found.metrics["lag1_autocorrelation_uncentred"].value == pytest.approx(1)
    assert value(found.sums["smoothness"]) == 0


def markov(stay_on: float, turn_on: float, rows: int, context: int, features: int):
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(rows, context, features, generator=generator)
    on = torch.empty(rows, context, features, dtype=torch.bool)
    on[:, 0] = uniform[:, 0] < turn_on / (1 - stay_on + turn_on)
    for t in range(1, context):
        on[:, t] = uniform[:, t] < torch.where(on[:, t - 1], stay_on, turn_on)
    return on.float()


def test_runs_of_a_markov_chain_last_as_long_as_they_should_in_spite_of_short_rows():
    z = markov(0.8, 0.05, 1500, 20, 3)  # 5 tokens on average, in rows of 20: many are cut
    _, found = measure(fake_sae(3), (z, batch_of(z)))
    assert value(found.sums["run_length"]) == pytest.approx(5, rel=0.03)
    survival = found.curves["run_length"].y
    assert survival[:6] == pytest.approx([0.8**length for length in range(6)], abs=0.02)
    density = 0.05 / 0.25
    assert found.metrics["run_length_geometric"].value == pytest.approx(1 / (1 - density), rel=0.02)
    assert found.curves["run_length_geometric"].y[1:4] == pytest.approx([density, density**2, density**3], abs=0.01)
    assert found.metrics["run_length_excess"].value == pytest.approx(4, rel=0.05)


def test_independent_firing_has_the_geometric_run_length():
    z = markov(0.3, 0.3, 200, 32, 3)
    _, found = measure(fake_sae(3), (z, batch_of(z)))
    assert found.metrics["run_length_excess"].value == pytest.approx(1, abs=0.02)


def superposed(seed: int = 0):
    """Sparse codes of features with very different lives, decoded through rows that overlap, then shrunk unevenly."""
    generator = torch.Generator().manual_seed(seed)
    z = markov(0.9, 0.02, 40, 32, 12) * (1 + torch.rand(40, 32, 12, generator=generator))
    z[..., 6:] = (torch.rand(40, 32, 6, generator=generator) < 0.2) * 2.0
    sae = fake_sae(12, d_model=8, seed=seed)
    x = z @ sae.W_dec + 0.01 * torch.randn(40, 32, 8, generator=generator)
    shrink = torch.cat([torch.ones(6), torch.full((6,), 0.2)])  # the restless half is turned down
    return sae, z, x, shrink


def test_refitted_gains_undo_shrinkage():
    sae, z, x, shrink = superposed()
    sample = TokenSample(512, 8, 0, z.device)
    batch = batch_of(z * shrink, x_BTD=x)
    sample.update(batch, ActiveEntries.from_dense(z * shrink, batch.valid_BT))
    assert refit_gains(sample.taken(), sae.W_dec, sae.b_dec).tolist() == pytest.approx((1 / shrink).tolist(), rel=0.05)


def test_variation_after_refit_does_not_see_how_features_are_scaled_but_plain_variation_does():
    sae, z, x, shrink = superposed()
    results = [measure(sae, (z * scale, batch_of(z * scale, x_BTD=x)))[1] for scale in (1.0, shrink, 1 / shrink, 7.0)]
    refitted = [found.metrics["temporal_variation_refit"].value for found in results]
    assert refitted == pytest.approx([refitted[0]] * 4, rel=1e-3)
    rows, truth = z.double().tolist(), [1.0] * 12
    pairs = reference.metric_pairs(batch_of(z).valid_BT.tolist(), batch_of(z).documents_BT.tolist(), 1)
    assert refitted[0] == pytest.approx(reference.metric_variation(rows, pairs, truth), rel=0.02)
    plain = [value(found.sums["temporal_variation"]) for found in results]
    assert plain[3] == pytest.approx(plain[0])
    assert plain[1] < 0.7 * plain[0] < plain[2]
    energy = ((z * shrink) ** 2).sum((0, 1))
    assert results[1].metrics["refit_gain"].value == pytest.approx(
        float((energy / shrink).sum() / energy.sum()), rel=0.03
    )


def test_a_feature_rescaled_together_with_its_decoder_row_changes_nothing():
    sae, z, x, shrink = superposed()
    other = fake_sae(12, d_model=8)
    other.W_dec = sae.W_dec / shrink[:, None]
    before = measure(sae, (z, batch_of(z, x_BTD=x)))[1].metrics
    after = measure(other, (z * shrink, batch_of(z * shrink, x_BTD=x)))[1].metrics
    for key in ("temporal_variation_refit", "refit_gain"):
        assert after[key].value == pytest.approx(before[key].value, rel=1e-3)


def test_chance_correction_is_zero_without_memory_and_one_for_a_constant_document():
    generator = torch.Generator().manual_seed(0)
    memoryless = (torch.rand(60, 24, 16, generator=generator) < 0.3).float()
    _, found = measure(fake_sae(16), (memoryless, batch_of(memoryless)))
    for name in ("adjacent_cosine", "adjacent_jaccard"):
        assert value(found.sums[f"{name}_raw"]) > 0.15
        assert value(found.sums[name]) == pytest.approx(0, abs=0.02)
    by_document = memoryless[:, :1].expand(-1, 24, -1).contiguous()
    by_document[..., 0] = 1.0
    _, found = measure(fake_sae(16), (by_document, batch_of(by_document)))
    assert value(found.sums["adjacent_jaccard"]) == pytest.approx(1)


def test_chance_is_unknown_where_there_is_one_document():
    z = torch.rand(3, 8, 4)
    documents = torch.zeros(3, 8, dtype=torch.int64)
    _, found = measure(fake_sae(4), (z, batch_of(z, documents_BT=documents)))
    assert found.metrics["adjacent_cosine"].value is None
    assert found.metrics["adjacent_cosine_chance"].value is None


def test_same_token_far_away_is_alike_only_if_the_position_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (40, 16), generator=generator)
    by_token = torch.nn.functional.one_hot(tokens, 5).float()
    halves = torch.arange(16)[None, :, None] >= 8
    by_half = torch.cat([by_token * halves, by_token * ~halves], 2)
    _, free = measure(fake_sae(5), (by_token, batch_of(by_token, tokens_BT=tokens)))
    assert free.metrics["same_token"].value == pytest.approx(1)
    _, bound = measure(fake_sae(10), (by_half, batch_of(by_half, tokens_BT=tokens)))
    assert bound.metrics["same_token"].value == pytest.approx(0)
    assert bound.metrics["same_token_near"].value > 0.8


def test_the_sample_does_not_depend_on_the_batches():
    z, batch = random_world(5, rows=8, context=12)
    whole, parts = (TokenSample(20, 4, 1, z.device) for _ in range(2))
    whole.update(batch, ActiveEntries.from_dense(z, batch.valid_BT))
    for start in (0, 3, 6):
        cut = slice(start, start + 3)
        fields = {name: getattr(batch, name)[cut] for name in vars(batch)}
        parts.update(type(batch)(**fields), ActiveEntries.from_dense(z[cut], batch.valid_BT[cut]))
    one, other = whole.taken(), parts.taken()
    assert len(one) == 20
    for name in ("row_M", "position_M", "x_MD", "document_M", "unit_M"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.dense()[0], other.dense()[0])
