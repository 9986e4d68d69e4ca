"""The trainer's small parts, each held to its definition: initialisation, buffer, partners, diagnostics, shares of a
batch.
"""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_store
from tcsae.cache.store import ActivationStore
from tcsae.cache.stream import TokenStream
from tcsae.cache.views import Windows
from tcsae.train.config import SAEConfig
from tcsae.train.loop.diagnostics import near_duplicates, temporal_variation
from tcsae.train.loop.distributed import World
from tcsae.train.loop.member import Member, dead_after
from tcsae.train.loop.stack import Stack
from tcsae.train.loop.temporal_buffer import TemporalBuffer
from tcsae.train.loss.partners import Batch, draw_partners, generator_of
from tcsae.train.plan import plan_members
from tcsae.train.presets import build_config
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.initialise import kaiming_uniform, orthogonal
from tcsae.train.sae.temporal_sae import TemporalSAE

examples = settings(max_examples=15, deadline=None)


def test_the_papers_initialisation():
    generator = torch.Generator().manual_seed(0)
    encoder = kaiming_uniform(64, 1024, generator)
    assert encoder.shape == (64, 1024)
    assert encoder.abs().max() <= math.sqrt(6 / 64)
    assert encoder.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.02)
    wide, narrow = orthogonal(128, 32, generator), orthogonal(16, 32, generator)
    torch.testing.assert_close(wide.T @ wide, torch.eye(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(16), atol=1e-5, rtol=0)
    assert wide.pow(2).sum(-1).mean().item() == pytest.approx(32 / 128, rel=1e-4)


def test_the_tied_initialisation_and_the_mean():
    sae = TemporalSAE(8, 32)
    mean = torch.arange(8.0)
    sae.initialise(SAEConfig(), 3, mean)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))
    assert torch.equal(sae.b_dec, mean)
    again, other = TemporalSAE(8, 32), TemporalSAE(8, 32)
    again.initialise(SAEConfig(), 3, mean)
    other.initialise(SAEConfig(), 4, mean)
    assert torch.equal(again.W_dec, sae.W_dec)
    assert not torch.equal(other.W_dec, sae.W_dec)
    jump = TemporalSAE(8, 32, Activation("jumprelu"))
    jump.initialise(SAEConfig(activation="jumprelu", b_dec="zero", threshold=0.5), 3, mean)
    assert torch.equal(jump.threshold, torch.full((32,), 0.5))
    assert not jump.b_dec.any()


def test_unit_rows_stay_unit_and_gradients_along_them_are_gone():
    member = one_member({"sae.k": 3, "optimiser.weight_decay": 0.0})
    Stack([member]).train_step(torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)))
    gradient, rows = member.sae.W_dec.grad, member.sae.W_dec
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(32))
    assert gradient.norm() > 0
    member = one_member({"sae.k": 3, "optimiser.lr": 1e-20})
    Stack([member]).train_step(torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)))
    along = (member.sae.W_dec.grad * member.sae.W_dec).sum(-1)
    assert along.abs().max() < 1e-6


def one_member(changes, **kwargs):
    small = {"sae.width": 32, "run.steps": 10, "run.baseline": False, "data.batch_size": 30}
    config = build_config(None, None, small | changes)
    (plan,) = plan_members(config, {}, layer=3, d_model=8, n_tokens=1000)
    return Member(plan, torch.zeros(8), torch.device("cpu"), torch.float32, **kwargs)


def test_features_that_do_not_fire_are_counted_and_revived():
    member = one_member({"sae.k": 1, "loss.dead_after": 60, "loss.aux_weight": 0.0})
    revived = one_member({"sae.k": 1, "loss.dead_after": 60})
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    fired = torch.zeros(32, dtype=torch.bool)
    for step in range(4):
        fired |= (member.sae.encode(x).flatten(0, 1) > 0).any(0)
        Stack([member]).train_step(x)
        Stack([revived]).train_step(x)
        assert torch.equal(member.idle_F == 0, member.idle_F < 30)
        if step < 1:
            assert not member.dead.any()
    assert torch.equal(member.dead[~fired], torch.ones(int((~fired).sum()), dtype=torch.bool))
    silent = member.dead & revived.dead
    assert silent.any()
    untouched = one_member({"sae.k": 1}).sae.W_dec[silent]
    torch.testing.assert_close(member.sae.W_dec[silent], untouched, atol=1e-6, rtol=0)
    assert (revived.sae.W_dec[silent] - untouched).abs().max() > 1e-5


def test_dead_features_are_counted_in_tokens():
    member = one_member({"sae.k": 1})
    assert dead_after(member.config) == 20 * 30
    assert dead_after(build_config(None, None, {"run.steps": 10_000_000})) == 10_000_000
    assert dead_after(build_config(None, None, {"run.steps": 10_000})) == round(0.05 * 10_000 * 2045)


def test_jumprelu_thresholds_learn_and_stay_positive():
    member = one_member({"sae.activation": "jumprelu", "optimiser.lr": 0.05, "loss.l1": 0.5, "loss.l1_warmup": 0.0})
    before = member.sae.threshold.clone()
    for step in range(10):
        Stack([member]).train_step(torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(step)))
    assert not torch.equal(member.sae.threshold, before)
    assert (member.sae.threshold >= 0).all()


@examples
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 14), st.integers(0, 99), st.booleans())
def test_the_buffer_equals_the_sums_over_the_whole_history(length, streams, tokens, seed, centred):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, streams, 3, generator=generator).relu()
    fresh = torch.rand(tokens, streams, generator=generator) < 0.2
    buffer = TemporalBuffer(3, length, streams=streams)
    for t in range(tokens):
        buffer.push(z[t], fresh[t])
    expected = reference.lag_correlations(z, fresh, length, centred=centred)
    found = buffer.correlations(centred=centred).tolist()
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, nan_ok=True, rel=1e-5, abs=1e-6)


def test_the_buffers_memory_does_not_grow_and_known_correlations_come_out():
    buffer = TemporalBuffer(2, 4)
    signs = torch.tensor([1.0, -1.0])
    for t in range(1000):
        buffer.push(torch.stack([1 + signs[t % 2], torch.tensor(3.0)])[None])
    correlations = buffer.correlations()
    assert correlations[:, 0].tolist() == pytest.approx([-1, 1, -1], abs=1e-2)
    assert correlations[:, 1].isnan().all()
    assert buffer.correlations(centred=False)[:, 1].tolist() == pytest.approx([1, 1, 1])
    with pytest.raises(ValueError, match="no lags"):
        TemporalBuffer(2, 1)


def drawn(kind, documents, window, step, siblings=1, starts=None):
    """Partners in a batch whose windows are, stretch by stretch, of one row; by default side by side in it."""
    n = len(documents)
    starts = torch.arange(n) % siblings * window if starts is None else starts
    batch = Batch(documents, torch.arange(n) // siblings, starts, window, generator_of(0, step), siblings)
    return draw_partners(kind, batch)


@examples
@given(n=st.integers(1, 17), window=st.integers(2, 5), step=st.integers(0, 50), siblings=st.integers(2, 4))
def test_partners_are_whom_their_name_says(n, window, step, siblings):
    documents = torch.arange(n) // siblings % 3
    other, same, shuffled = (
        drawn(kind, documents, window, step, siblings) for kind in ("other_document", "same_document", "shuffled")
    )
    own = torch.arange(n)[:, None].expand(n, window - 1)
    for partners in (other, same, shuffled):
        assert partners.shape == (n, window - 1)
        assert ((partners >= -1) & (partners < n * window)).all()
    found = other >= 0
    assert (documents[(other // window)[found]] != documents[own[found]]).all()
    if n > siblings:
        assert found.float().mean() > 0.3
    whole = own < n // siblings * siblings
    assert ((same >= 0) == whole).all()
    assert (same[whole] // window != own[whole]).all()
    assert torch.equal(same[whole] // window // siblings, own[whole] // siblings)
    found = shuffled >= 0
    assert (found <= whole).all()
    assert torch.equal((shuffled // window // siblings)[found], (own // siblings)[found])
    # the windows of a stretch lie one after the other, so that flat indices at distance 1 are true neighbours
    assert ((shuffled - (own * window + torch.arange(window - 1))).abs()[found] > 1).all()
    assert torch.equal(shuffled, drawn("shuffled", documents, window, step, siblings))
    assert drawn("next", documents, window, step) is None


def test_shuffled_partners_come_from_the_whole_stretch_and_never_from_next_door():
    found = torch.stack([drawn("shuffled", torch.zeros(8), 5, step, 8)[3] for step in range(500)])  # tokens 15 … 18
    assert (found >= 0).all()
    for token, partners in zip(range(15, 19), found.T, strict=True):
        places = torch.bincount(partners, minlength=40)
        assert places[token - 1 : token + 2].tolist() == [0, 0, 0]
        assert (places > 0).sum() == 37
    far = ((found - torch.arange(15, 19)).abs() > 4).double().mean()
    assert far == pytest.approx(1 - 6 / 37, abs=0.05)


def test_shuffled_partners_that_are_next_door_elsewhere_in_the_row_are_found_by_position():
    starts = torch.tensor([20, 5, 10, 15])  # the second window begins where the third would follow, and so on
    position = (starts[:, None] + torch.arange(5)).flatten()
    for step in range(50):
        shuffled = drawn("shuffled", torch.zeros(4), 5, step, 4, starts)
        own = position.view(4, 5)[:, :-1]
        assert ((position[shuffled] - own).abs() > 1).all()


def test_siblings_come_from_one_row_and_document(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=64, context=16, d_model=8, documents=12))
    with TokenStream(store, [Windows(3, together=2)], tokens_per_batch=60, seed=0) as stream:
        seen = set()
        for _ in range(6):
            (batch,) = stream.next_batches()
            assert len(batch.x_NWD) == 20
            rows, starts = batch.rows_N.view(-1, 2), batch.positions_NW[:, 0].view(-1, 2)
            assert torch.equal(rows[:, 0], rows[:, 1])
            assert torch.equal(batch.documents_N.view(-1, 2)[:, 0], batch.documents_N.view(-1, 2)[:, 1])
            assert ((starts[:, 0] - starts[:, 1]).abs() >= 3).all()
            assert len(set(rows[:, 0].tolist())) > 3
            pairs = set(zip(batch.rows_N.tolist(), batch.positions_NW[:, 0].tolist(), strict=True))
            assert not pairs & seen
            seen |= pairs


def test_temporal_variation_of_known_codes():
    z = torch.randn(400, 5, 20, generator=torch.Generator().manual_seed(0))
    assert temporal_variation(z) == pytest.approx(2, abs=0.1)
    assert temporal_variation(z[:, :1].expand(-1, 5, -1)) == 0
    assert temporal_variation(torch.zeros(2, 3, 4)) is None
    assert temporal_variation(z[:, :1]) is None


def test_near_duplicates_are_found():
    rows = torch.randn(100, 30, generator=torch.Generator().manual_seed(0))
    assert near_duplicates(rows) == 0
    rows[50:60] = 2 * rows[:10] + 1e-3
    assert near_duplicates(rows) == pytest.approx(0.2)


@examples
@given(n=st.integers(4, 41), size=st.integers(1, 4), together=st.integers(1, 3))
def test_shares_cover_a_batch_without_parting_siblings(n, size, together):
    covered = []
    for rank in range(size):
        share = World(rank, size).share(n, together=together)
        covered += list(range(n))[share]
        assert share.start % together == 0
    assert covered == list(range(n))
