"""Leaving a group of the text out must say what a measurement without it would have said; and what pairs
make of that.
"""

import dataclasses

import numpy as np
import pytest
import torch
from tcsae.evaluate.intervals import jackknife as intervals
from tcsae.evaluate.intervals.jackknife import (
    GROUPS,
    Jackknifed,
    jackknife,
    jackknife_band,
    jackknife_over_features,
)
from tcsae.evaluate.metrics.active_entries import ActiveEntries
from tcsae.evaluate.metrics.features import FeatureStatistics
from tcsae.evaluate.metrics.position import PositionStatistics
from tcsae.evaluate.metrics.temporal import TemporalStatistics
from tcsae.evaluate.table_row import MeasuredRow
from worlds import batch_of, fake_sae

# The gains and the centre are those of all the text.
HELD_FIXED = {
    "temporal_variation_refit",
    "refit_gain",
    "refit_coverage",
    "same_token_activation",
    "same_token_activation_near",
}


def group_batches(features: int = 6, rows: int = 4, context: int = 32):
    """One batch per group of the jackknife; features that last, five kinds of token, a document per row."""
    generator = torch.Generator().manual_seed(0)
    for g in range(GROUPS):
        fires = torch.rand(rows, context, features, generator=generator) < 0.4
        fires[:, 1:] |= fires[:, :-1] & (torch.rand(rows, context - 1, features, generator=generator) < 0.3)
        z = fires * (1 + torch.rand(rows, context, features, generator=generator))
        tokens = torch.randint(0, 5, (rows, context), generator=generator)
        units = torch.full((rows, context), 4 * g)
        yield z, batch_of(z, tokens_BT=tokens, units_BT=units, first_row=rows * g)


def measure(part, batches):
    for z, batch in batches:
        part.update(batch, ActiveEntries.from_dense(z, batch.valid_BT), batch.x_BTD)
    return part.result()


@pytest.mark.parametrize(
    ("kind", "groups"), [(FeatureStatistics, GROUPS), (TemporalStatistics, GROUPS), (PositionStatistics, 4)]
)
def test_leaving_a_group_out_is_measuring_without_it(kind, groups):
    batches = list(group_batches())
    whole = measure(kind(fake_sae(6), context=32, seed=0), batches)
    found = {name: one for name, one in whole.metrics.items() if isinstance(one, Jackknifed) and name not in HELD_FIXED}
    assert len(found) >= {FeatureStatistics: 3, TemporalStatistics: 8, PositionStatistics: 2}[kind]
    for g in (0, groups - 1):
        kept = [batch for at, batch in enumerate(batches) if at % groups != g]
        without = measure(kind(fake_sae(6), context=32, seed=0), kept)
        for name, one in found.items():
            assert one.left_out[one.groups.index(g)] == pytest.approx(
                without.metrics[name].value, rel=1e-6, abs=1e-9
            ), name


@pytest.mark.parametrize("sums", [1, 30, 10_000])
def test_some_features_at_a_time_is_all_at_once(sums, monkeypatch):
    """Also where some features have no number, in one group or in all of the text, and where a group has no tokens."""
    monkeypatch.setattr(intervals, "_SUMS", sums)
    generator = torch.Generator().manual_seed(0)
    tokens_G = torch.tensor([5.0, 3.0, 0.0, 4.0], dtype=torch.float64)
    a_GFP = torch.rand(4, 11, 3, generator=generator, dtype=torch.float64)
    b_GF = torch.rand(4, 11, generator=generator, dtype=torch.float64)
    a_GFP[:, 4], a_GFP[1:, 7] = 0, 0

    def each(a_FP, b_F, tokens):
        return torch.where(a_FP.sum(1) > 0, a_FP.sum(1) / b_F / tokens, torch.nan)

    names = {"unit": "1", "definition": "x"}
    whole = jackknife(lambda _, a, b, t: float(each(a, b, t).nanmean()), tokens_G, a_GFP, b_GF, tokens_G, n=10, **names)
    found, value_F = jackknife_over_features(each, tokens_G, [a_GFP, b_GF], [tokens_G], **names)
    assert found.n == 10
    assert found.groups == whole.groups == (0, 1, 3)
    assert found.value == pytest.approx(whole.value, rel=1e-12)
    assert found.left_out == pytest.approx(whole.left_out, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high), rel=1e-12)
    assert torch.equal(value_F.isnan(), torch.arange(11) == 4)


def test_a_band_is_the_jackknife_point_by_point():
    generator = torch.Generator().manual_seed(1)
    tokens, sums = torch.full((GROUPS,), 5.0), torch.rand(GROUPS, 3, generator=generator, dtype=torch.float64)
    y, low, high = jackknife_band(lambda n, total: total / n, tokens, sums)
    for at in range(3):
        one = jackknife(lambda n, total: float(total / n), tokens, sums[:, at], unit="1", definition="x")
        assert (y[at], low[at], high[at]) == pytest.approx((one.value, one.low, one.high))


def test_what_two_saes_share_on_the_same_text_cancels_in_their_difference():
    generator = torch.Generator().manual_seed(2)
    tokens = torch.full((GROUPS,), 5.0)
    text = torch.randn(GROUPS, generator=generator, dtype=torch.float64)
    own = 0.01 * torch.randn(GROUPS, generator=generator, dtype=torch.float64)
    one, other = (
        jackknife(lambda n, total: float(total / n), tokens, sums, unit="1", definition="x")
        for sums in (text + own, text)
    )
    found = one.minus(other)
    assert found.value == pytest.approx(one.value - other.value)
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.1 * (one.high - one.low)
    alone = one.model_copy(update={"groups": one.groups[1:], "left_out": one.left_out[1:]})
    assert alone.minus(other).low is None  # not the same text
    assert one.minus(other.model_copy(update={"value": None})).value is None


def test_a_kept_row_can_still_be_paired(tmp_path):
    nan = jackknife(
        lambda n, total: float(total / n) - 1,
        torch.ones(GROUPS),
        torch.ones(GROUPS) * torch.nan,
        unit="1",
        definition="x",
    )
    one = jackknife(lambda n, total: float(total / n), torch.ones(GROUPS), torch.arange(8.0), unit="1", definition="x")
    metrics = {"one": one, "nan": nan, "plain": one.plain()}
    row = MeasuredRow("a", "sae", 1, metrics=metrics, documents_U=np.array([0, 0, 1]))
    row.save(tmp_path / "row.npz")
    back = MeasuredRow.load(tmp_path / "row.npz")
    assert back is not None
    found, expected = (dataclasses.asdict(one) for one in (back, row))
    assert found.pop("documents_U").tolist() == expected.pop("documents_U").tolist() == [0, 0, 1]
    assert found == expected
    assert isinstance(back.metrics["one"], Jackknifed)
    assert not isinstance(back.metrics["plain"], Jackknifed)
