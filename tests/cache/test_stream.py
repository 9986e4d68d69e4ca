"""The stream: each token at most once before its pool is used up, shuffled, resumable, indifferent to growth and to
which other views share the read.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cache_runs
from stores import grow_store, make_store
from tcsae.cache.store import ActivationStore
from tcsae.cache.stream import TokenStream
from tcsae.cache.views import Pairs, Rows, Windows
from tcsae.errors import StoreError, UsageError

WITH_EXTRA = [Pairs(earlier_extra=True), Pairs("batch", earlier_extra=True)]
EVERY_VIEW = [Windows(1), Windows(5), Windows(3, together=2), Pairs(), Pairs("batch"), *WITH_EXTRA, Rows()]


def batches(stream, n):
    return [batch for _ in range(n) for batch in stream.next_batches()]


def places(batch):
    return list(zip(batch.rows_N.tolist(), batch.positions_NW[:, 0].tolist(), strict=True))


def same(a, b):
    names = ("x_NWD", "documents_N", "rows_N", "positions_NW", "valid_NW", "documents_NW")
    both = [(getattr(a, name), getattr(b, name)) for name in names]
    return all((one is None and other is None) or torch.equal(one, other) for one, other in both)


def of_windows(store, window, **options):
    return TokenStream(store, [Windows(window)], **options)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_windows_hold_usable_tokens_of_one_document_each_once_before_the_pool_is_used_up(tmp_path_factory, data):
    rows, context = data.draw(st.integers(6, 40)), data.draw(st.integers(6, 12))
    window = data.draw(st.integers(1, 4))
    packing = data.draw(st.sampled_from(["document", "concat"]))
    path = make_store(
        tmp_path_factory.mktemp("w"), rows=rows, context=context, chunk_rows=2, shard_rows=6, packing=packing
    )
    store = ActivationStore.open(path)
    with of_windows(store, window, tokens_per_batch=window, seed=3) as stream:
        x, flags, documents = store.rows(0, rows), store.flags(0, rows), store.documents(0, rows)
        runs = cache_runs((flags == 0).tolist(), documents.tolist())
        n_windows = sum(length // window for _, _, length in runs)
        seen = []
        while stream.epoch == 0:
            (batch,) = stream.next_batches()
            if stream.position()["batch"] == 1 and seen:
                break
            ((row, start),) = places(batch)
            span = slice(start, start + window)
            assert torch.equal(batch.x_NWD[0], x[row, span])
            assert not flags[row, span].any()
            assert set(documents[row, span]) == {int(batch.documents_N[0])}
            seen += [(row, t) for t in range(start, start + window)]
    first_cut = seen[: n_windows * window]
    assert len(set(first_cut)) == len(first_cut)
    assert len(seen) == (flags == 0).sum() // window * window


@pytest.mark.parametrize("view", EVERY_VIEW, ids=lambda view: view.name)
def test_company_changes_nothing_and_the_store_is_read_once(tmp_path, chunks_read, view):
    store = ActivationStore.open(make_store(tmp_path, rows=48, packing="concat", documents=20))
    options = {"tokens_per_batch": 40, "pool_tokens": 200, "seed": 7}
    size = store.chunk_rows * store.context * store.d_model * 2
    with TokenStream(store, [view], prefetch=False, **options) as alone:
        own = batches(alone, 30)
    bytes_alone = sum(chunks_read) * size
    assert bytes_alone >= store.n_tokens * store.d_model * 2  # more than an epoch
    chunks_read.clear()
    with TokenStream(store, EVERY_VIEW, prefetch=False, **options) as shared:
        at = EVERY_VIEW.index(view)
        assert all(same(mine, shared.next_batches()[at]) for mine in own)
    assert sum(chunks_read) * size == bytes_alone


@pytest.mark.parametrize("view", EVERY_VIEW, ids=lambda view: view.name)
def test_resumed_anywhere_it_goes_on_bit_for_bit(tmp_path, view):
    store = ActivationStore.open(make_store(tmp_path, rows=48))
    for prefetch in (True, False):
        options = {"tokens_per_batch": 40, "pool_tokens": 200, "seed": 7, "prefetch": prefetch}
        with TokenStream(store, [view], **options) as stream:
            states, wanted = [], []
            for _ in range(40):
                states.append(stream.state_dict(view))
                wanted += stream.next_batches()
            assert stream.epoch >= 2
            for at in (0, 1, 13, 39, 20):
                stream.load_state_dict(states[at], view)
                assert all(same(a, b) for a, b in zip(wanted[at:], batches(stream, 40 - at), strict=True))


@pytest.mark.parametrize("together", [1, 2])
def test_rows_that_are_one_pool_are_read_once(tmp_path, monkeypatch, together):
    store = ActivationStore.open(make_store(tmp_path, rows=45, chunk_rows=2, shard_rows=6))
    x, reads = store.rows(0, 45), []
    real = ActivationStore.read_chunks
    monkeypatch.setattr(ActivationStore, "read_chunks", lambda self, *args: reads.append(1) or real(self, *args))
    limit = float(x.double().norm(dim=-1).quantile(0.9))
    view = Windows(3, together)
    options = {"tokens_per_batch": 30, "seed": 1, "norm_limit": limit, "rows": 43}
    with TokenStream(store, [view], **options) as stream:
        states = []
        while stream.epoch < 4:
            states.append(stream.state_dict(view))
            (batch,) = stream.next_batches()
            for own, (row, start) in zip(batch.x_NWD, places(batch), strict=True):
                assert torch.equal(own, x[row, start : start + 3])
                assert row < 43
                assert (own.double().norm(dim=-1) <= limit * (1 + 1e-6)).all()
        assert len(reads) == 1
        (last,) = stream.next_batches()
    with TokenStream(store, [view], **options) as resumed:
        resumed.load_state_dict(states[-1], view)
        resumed.next_batches()
        assert same(resumed.next_batches()[0], last)


def test_norm_limit_ends_windows_and_kept_norms_change_nothing(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=40, packing="concat"))
    norms = np.linalg.norm(store.rows(0, 40, dtype=torch.float64).numpy(), axis=-1)
    limit = float(np.quantile(norms, 0.8))
    options = {"tokens_per_batch": 30, "pool_tokens": 200, "seed": 1, "norm_limit": limit}
    with of_windows(store, 3, **options) as stream:
        first = batches(stream, 12)
    for batch in first:
        assert (batch.x_NWD.double().norm(dim=-1) <= limit * (1 + 1e-6)).all()
    store.statistics()
    with of_windows(store, 3, **options) as stream:
        assert all(same(a, b) for a, b in zip(first, batches(stream, 12), strict=True))


def test_a_state_of_another_stream_is_refused_by_name(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=48))
    view = Windows(5)
    with TokenStream(store, [view], tokens_per_batch=40, seed=7) as stream:
        state = stream.state_dict(view)
    for change, other_view, name in (
        ({"seed": 8}, view, "seed"), ({}, Windows(4), "view"), ({"rows": 40}, view, "rows"), ({}, Rows(), "view")
    ):  # fmt: skip
        with (
            TokenStream(store, [other_view], **{"tokens_per_batch": 40, "seed": 7} | change) as other,
            pytest.raises(UsageError, match=f"the stream's {name} was"),
        ):
            other.load_state_dict(state, other_view)
    del state["of"]["view"]  # as before there were views
    with (
        TokenStream(store, [view], tokens_per_batch=40, seed=7) as now,
        pytest.raises(StoreError, match="in another order"),
    ):
        now.load_state_dict(state, view)


def test_growth_of_the_store_changes_nothing(tmp_path):
    small = ActivationStore.open(make_store(tmp_path / "a", rows=45))
    grown = ActivationStore.open(grow_store(make_store(tmp_path / "b", rows=45), 75))
    assert (grown.n_rows, grown.fingerprint(45)) == (75, small.fingerprint())
    options = {"views": EVERY_VIEW, "tokens_per_batch": 30, "pool_tokens": 160, "seed": 2}
    with TokenStream(small, **options) as one, TokenStream(grown, rows=45, **options) as two:
        for _ in range(50):
            assert all(same(a, b) for a, b in zip(one.next_batches(), two.next_batches(), strict=True))
        assert one.epoch > 1


def test_epochs_and_seeds_differ_and_windows_are_mixed(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=64))
    with of_windows(store, 1, tokens_per_batch=64, seed=0) as stream:
        first = batches(stream, 15)
        assert stream.epoch == 0
        second = batches(stream, 1)[0]
        assert stream.epoch == 1
    with of_windows(store, 1, tokens_per_batch=64, seed=1) as stream:
        (other,) = stream.next_batches()
    assert places(first[0]) != places(second)
    assert places(first[0]) != places(other)
    # A batch of 64 out of 64 rows × 15 tokens: neighbours share a row with chance 14 / 959.
    rows = torch.cat([batch.rows_N for batch in first])
    share = float((rows[1:] == rows[:-1]).double().mean())
    assert share < 14 / 959 + 4 * math.sqrt(14 / 959 / len(rows))


@pytest.mark.parametrize("view", EVERY_VIEW, ids=lambda view: view.name)
def test_all_views_have_as_many_batches_as_the_tokens_fill(tmp_path, view):
    store = ActivationStore.open(make_store(tmp_path, rows=48, packing="concat", documents=20))
    with TokenStream(store, [view], tokens_per_batch=40, seed=7) as stream:
        n, tokens = 0, 0
        while True:
            (batch,) = stream.next_batches()
            if stream.epoch == 1:
                break
            tokens += batch.n_tokens // 2 if view in WITH_EXTRA else batch.n_tokens
            n += 1
    assert n == 48 * 15 // 40
    assert tokens / n == pytest.approx(view.tokens_per_batch(40))


def test_what_cannot_be_streamed_is_refused(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=8))
    for window, tokens in ((17, 20), (5, 4)):
        with pytest.raises(UsageError, match="positions"):
            of_windows(store, window, seed=0, tokens_per_batch=tokens)
    with pytest.raises(StoreError, match=r"9 rows are to be streamed, .* holds 8"):
        of_windows(store, 1, tokens_per_batch=4, seed=0, rows=9)
    for view, tokens, sentence in (
        (Windows(5), 500, "no batch of 500 tokens"),
        (Windows(16), 16, "no 16 consecutive tokens of one document"),
        (Windows(8, together=2), 16, "no 2 windows of 8 consecutive tokens in one row of one document"),
        (Rows(), 8, "batches of 8 tokens are less than a row of the store, which has 16 positions"),
        (Pairs(), 1, "hold no pair"),
    ):
        with pytest.raises(UsageError, match=sentence):
            TokenStream(store, [view], tokens_per_batch=tokens, seed=0, prefetch=False).next_batches()
