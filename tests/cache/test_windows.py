"""Windows: consecutive usable tokens of one document, each token once an epoch, shuffled, resumable, indifferent to
growth.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cache_runs
from stores import grow_store, make_store
from tcsae.cache.store import ActivationStore
from tcsae.cache.windows import WindowStream, cut_windows, shuffle_windows, take_rows
from tcsae.errors import StoreError, UsageError


def batches(stream, n):
    return [stream.next_batch() for _ in range(n)]


def places(batch):
    return list(zip(batch.rows_N.tolist(), batch.starts_N.tolist(), strict=True))


def same(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("x_NWD", "documents_N", "rows_N", "starts_N")
    )


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**31))
def test_runs_are_cut_as_plain_loops_cut_them(rows, context, window, seed):
    rng = np.random.default_rng(seed)
    usable = rng.random((rows, context)) < 0.8
    documents = np.cumsum(rng.random((rows, context)) < 0.2).reshape(rows, context)
    at, unused = cut_windows(usable, documents, window, rng)
    runs = cache_runs(usable.tolist(), documents.tolist())
    assert len(at) == sum(length // window for _, _, length in runs)
    assert unused == sum(length % window for _, _, length in runs)
    covered = [index + k for index in at.tolist() for k in range(window)]
    assert len(set(covered)) == len(covered)
    for row, first, length in runs:
        inside = [i - row * context for i in at.tolist() if row * context + first <= i < row * context + first + length]
        assert len(inside) == length // window
        assert all(b - a == window for a, b in pairwise(inside))
        assert all(first <= t and t + window <= first + length for t in inside)


def test_where_windows_begin_is_uniform():
    usable, documents = np.ones((9000, 7), bool), np.zeros((9000, 7), int)
    at, _ = cut_windows(usable, documents, 5, np.random.default_rng(0))
    counts = np.bincount(at % 7, minlength=3)
    assert counts.sum() == 9000
    assert (abs(counts - 3000) < 200).all()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_an_epoch_holds_every_usable_token_at_most_once_and_its_own_values(tmp_path_factory, data):
    rows, context = data.draw(st.integers(6, 40)), data.draw(st.integers(6, 12))
    window = data.draw(st.integers(1, 4))
    packing = data.draw(st.sampled_from(["document", "concat"]))
    path = make_store(
        tmp_path_factory.mktemp("w"), rows=rows, context=context, chunk_rows=2, shard_rows=6, packing=packing
    )
    store = ActivationStore.open(path)
    pool = data.draw(st.integers(1, rows * context * 2))
    with WindowStream(store, window=window, tokens_per_batch=window, pool_tokens=pool, seed=3) as stream:
        x, flags, documents = store.rows(0, rows), store.flags(0, rows), store.documents(0, rows)
        seen = []
        batch = stream.next_batch()
        while stream.epoch == 0:
            ((row, start),) = places(batch)
            span = slice(start, start + window)
            assert torch.equal(batch.x_NWD[0], x[row, span])
            assert not flags[row, span].any()
            assert set(documents[row, span]) == {int(batch.documents_N[0])}
            seen += [(row, t) for t in range(start, start + window)]
            batch = stream.next_batch()
    assert len(set(seen)) == len(seen)
    runs = cache_runs((flags == 0).tolist(), documents.tolist())
    assert len(seen) == window * sum(length // window for _, _, length in runs)


@pytest.mark.parametrize("together", [1, 2])
def test_rows_that_are_one_pool_are_read_once(tmp_path, monkeypatch, together):
    store = ActivationStore.open(make_store(tmp_path, rows=45, chunk_rows=2, shard_rows=6))
    x, reads = store.rows(0, 45), []
    real = ActivationStore.read_chunks
    monkeypatch.setattr(ActivationStore, "read_chunks", lambda self, *args: reads.append(1) or real(self, *args))
    limit = float(x.double().norm(dim=-1).quantile(0.9))
    options = {"window": 3, "tokens_per_batch": 30, "seed": 1, "norm_limit": limit, "rows": 43, "together": together}
    with WindowStream(store, **options) as stream:
        states = []
        while stream.epoch < 4:
            states.append(stream.state_dict())
            batch = stream.next_batch()
            for own, row, start in zip(batch.x_NWD, batch.rows_N, batch.starts_N, strict=True):
                assert torch.equal(own, x[row, start : start + 3])
                assert row < 43
                assert (own.double().norm(dim=-1) <= limit * (1 + 1e-6)).all()
        assert len(reads) == 1
        last = stream.next_batch()
    with WindowStream(store, **options) as resumed:
        resumed.load_state_dict(states[-1])
        resumed.next_batch()
        assert same(resumed.next_batch(), last)


def test_norm_limit_ends_windows_and_kept_norms_change_nothing(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=40, packing="concat"))
    norms = np.linalg.norm(store.rows(0, 40, dtype=torch.float64).numpy(), axis=-1)
    limit = float(np.quantile(norms, 0.8))
    options = {"window": 3, "tokens_per_batch": 30, "pool_tokens": 200, "seed": 1, "norm_limit": limit}
    with WindowStream(store, **options) as stream:
        first = batches(stream, 12)
    for batch in first:
        assert (batch.x_NWD.double().norm(dim=-1) <= limit * (1 + 1e-6)).all()
    store.statistics()
    with WindowStream(store, **options) as stream:
        assert all(same(a, b) for a, b in zip(first, batches(stream, 12), strict=True))


@pytest.mark.parametrize("prefetch", [True, False])
def test_resumed_anywhere_it_goes_on_bit_for_bit(tmp_path, prefetch):
    store = ActivationStore.open(make_store(tmp_path, rows=48))
    options = {"window": 5, "tokens_per_batch": 40, "pool_tokens": 200, "seed": 7, "prefetch": prefetch}
    with WindowStream(store, **options) as stream:
        states, wanted = [], []
        for _ in range(40):
            states.append(stream.state_dict())
            wanted.append(stream.next_batch())
        dropped = stream.dropped_windows, stream.unused_tokens
        assert stream.epoch >= 2
        for at in (0, 1, 13, 39, 20):
            stream.load_state_dict(states[at])
            assert all(same(a, b) for a, b in zip(wanted[at:], batches(stream, 40 - at), strict=True))
            assert (stream.dropped_windows, stream.unused_tokens) == dropped


def test_a_state_of_another_stream_is_refused_by_name(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=48))
    with WindowStream(store, window=5, tokens_per_batch=40, seed=7) as stream:
        state = stream.state_dict()
    for change, name in (({"seed": 8}, "seed"), ({"window": 4}, "window"), ({"rows": 40}, "rows")):
        with (
            WindowStream(store, **{"window": 5, "tokens_per_batch": 40, "seed": 7} | change) as other,
            pytest.raises(UsageError, match=f"the stream's {name} was"),
        ):
            other.load_state_dict(state)


def test_growth_of_the_store_changes_nothing(tmp_path):
    small = ActivationStore.open(make_store(tmp_path / "a", rows=45))
    grown = ActivationStore.open(grow_store(make_store(tmp_path / "b", rows=45), 75))
    assert (grown.n_rows, grown.fingerprint(45)) == (75, small.fingerprint())
    options = {"window": 3, "tokens_per_batch": 30, "pool_tokens": 160, "seed": 2}
    with WindowStream(small, **options) as one, WindowStream(grown, rows=45, **options) as two:
        for _ in range(50):
            assert same(one.next_batch(), two.next_batch())
        assert one.epoch > 1


@pytest.mark.parametrize("width", [8, 6, 5])
def test_rows_are_taken_bit_for_bit(width):
    x = torch.arange(40 * width).view(40, width).to(torch.int16).view(torch.bfloat16)
    index = torch.tensor([39, 0, 7, 7, 12])
    assert torch.equal(take_rows(x, index).view(torch.int16), x[index].view(torch.int16))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 12), st.integers(1, 4), st.integers(0, 2**31))
def test_windows_kept_together_are_of_one_row_and_document(rows, context, together, seed):
    rng = np.random.default_rng(seed)
    documents = np.cumsum(rng.random((rows, context)) < 0.2).reshape(rows, context)
    at = np.flatnonzero(rng.random(rows * context) < 0.7)
    order, alone = shuffle_windows(at, documents, together, rng)
    kin = [(int(a) // context, int(documents.reshape(-1)[a])) for a in order]
    assert len(order) % together == 0
    assert all(len(set(kin[i : i + together])) == 1 for i in range(0, len(kin), together))
    assert len(set(order.tolist())) == len(order) == len(at) - alone
    every = [(int(a) // context, int(documents.reshape(-1)[a])) for a in at]
    assert alone == sum(every.count(k) % together for k in set(every))


def test_epochs_and_seeds_differ_and_windows_are_mixed(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=64))
    with WindowStream(store, window=1, tokens_per_batch=64, seed=0) as stream:
        first = batches(stream, 15)
        assert stream.epoch == 0
        second = batches(stream, 1)[0]
        assert stream.epoch == 1
    with WindowStream(store, window=1, tokens_per_batch=64, seed=1) as stream:
        other = stream.next_batch()
    assert places(first[0]) != places(second)
    assert places(first[0]) != places(other)
    # A batch of 64 out of 64 rows × 15 tokens: neighbours share a row with chance 14 / 959.
    rows = torch.cat([batch.rows_N for batch in first])
    share = float((rows[1:] == rows[:-1]).double().mean())
    assert share < 14 / 959 + 4 * math.sqrt(14 / 959 / len(rows))


def test_what_cannot_be_streamed_is_refused(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=8))
    for wrong in ({"window": 17, "tokens_per_batch": 20}, {"window": 5, "tokens_per_batch": 4}):
        with pytest.raises(UsageError, match="positions"):
            WindowStream(store, seed=0, **wrong)
    with pytest.raises(StoreError, match=r"9 rows are to be streamed, .* holds 8"):
        WindowStream(store, window=1, tokens_per_batch=4, seed=0, rows=9)
    with (
        WindowStream(store, window=5, tokens_per_batch=500, seed=0) as stream,
        pytest.raises(UsageError, match="no batch of 100 windows of 5 tokens"),
    ):
        stream.next_batch()
