"""Views of a pool: windows of consecutive usable tokens, pairs of an earlier token and a token, rows as they are."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cache_runs
from tcsae.cache.pools import Pool
from tcsae.cache.views import Pairs, Rows, Windows, cut_windows, draw_pairs, shuffle_windows, take_rows
from tcsae.errors import UsageError

small = settings(max_examples=60, deadline=None)


def pool_of(usable_RT, documents_RT, seed=0):
    """A pool whose activations are their own place: [row of the store, position]."""
    rows, context = usable_RT.shape
    places = np.random.default_rng(seed).permutation(rows)
    stored = np.empty((rows, context, 2), np.float32)
    stored[places, :, 0] = 10 + np.arange(rows)[:, None]
    stored[..., 1] = np.arange(context)
    x_ND = torch.from_numpy(stored).bfloat16().flatten(0, 1)
    return Pool(x_ND, 10 + np.arange(rows), places, usable_RT, documents_RT, documents_RT)


def random_pool(rows, context, seed, usable=0.8, ends=0.2):
    rng = np.random.default_rng(seed)
    documents = np.cumsum(rng.random((rows, context)) < ends).reshape(rows, context)
    return pool_of(rng.random((rows, context)) < usable, documents, seed)


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


@small
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


def test_a_view_that_runs_out_is_cut_again_elsewhere():
    pool = pool_of(np.ones((40, 9), bool), np.zeros((40, 9), int))
    cut = Windows(5).cut(pool, 4, 80, np.random.default_rng(0))  # 40 windows, 64 are asked for
    places = list(zip(cut.local_N.tolist(), cut.start_N.tolist(), strict=True))
    assert sorted(row for row, _ in places[:40]) == list(range(40))
    assert len(set(places[:64])) > 50


@small
@given(st.integers(1, 6), st.integers(2, 12), st.integers(0, 2**31))
def test_pairs_are_every_token_with_one_before_it_in_its_row_and_document(rows, context, seed):
    pool = random_pool(rows, context, seed)
    at = draw_pairs(pool.usable_RT, pool.documents_RT, np.random.default_rng(seed))
    expected = set()
    for row in range(rows):
        for t in range(context):
            if pool.usable_RT[row, t] and earlier_of(pool, row, t):
                expected.add(row * context + t)
    assert set(at[:, 1].tolist()) == expected
    assert len(at) == len(expected)
    for earlier, later in at.tolist():
        row, t = divmod(later, context)
        assert earlier - row * context in earlier_of(pool, row, t)


def earlier_of(pool, row, t):
    document = pool.documents_RT[row, t]
    return [s for s in range(t) if pool.usable_RT[row, s] and pool.documents_RT[row, s] == document]


def test_the_earlier_token_is_uniform_and_the_order_random():
    usable = np.ones((4000, 6), bool)
    usable[:, 1] = False
    at = draw_pairs(usable, np.zeros((4000, 6), int), np.random.default_rng(1))
    last = at[at[:, 1] % 6 == 5]
    counts = np.bincount(last[:, 0] % 6, minlength=6)
    assert counts[[1, 5]].tolist() == [0, 0]
    assert (abs(counts[[0, 2, 3, 4]] - 1000) < 120).all()
    assert abs(np.corrcoef(np.arange(len(at)), at[:, 1])[0, 1]) < 0.05


def test_with_earlier_tokens_extra_nearly_every_token_is_the_later_one_once():
    pool = random_pool(30, 12, 3, usable=1.0, ends=0)
    n = pool.usable_RT.size // 40
    assert [view.tokens_per_batch(41) for view in (Pairs(), Pairs(earlier_extra=True))] == [40, 41]
    view = Pairs(earlier_extra=True)
    cut = view.cut(pool, n, 40, np.random.default_rng(0))
    later = [(r, t) for b in range(n) for r, t in _later(view.gather(pool, cut, b))]
    assert len(later) == n * 40
    first = later[: 30 * 11]  # all but the first token of every row have an earlier one
    assert len(set(first)) == len(first)


def _later(batch):
    return zip(batch.rows_N.tolist(), batch.positions_NW[:, 1].tolist(), strict=True)


@small
@given(st.integers(2, 6), st.integers(2, 12), st.integers(0, 2**31))
def test_one_earlier_position_for_a_whole_batch(rows, context, seed):
    pool = random_pool(rows, context, seed)
    view = Pairs("batch")
    if not any(earlier_of(pool, r, t) and pool.usable_RT[r, t] for r in range(rows) for t in range(context)):
        with pytest.raises(UsageError, match="no two usable tokens of one document"):
            view.cut(pool, 1, 8, np.random.default_rng(seed))
        return
    cut = view.cut(pool, 5, 8, np.random.default_rng(seed))
    for number in range(5):
        batch = view.gather(pool, cut, number)
        assert len(set(batch.positions_NW[:, 0].tolist())) == 1
        for row, (source, t) in zip((batch.rows_N - 10).tolist(), batch.positions_NW.tolist(), strict=True):
            assert source in earlier_of(pool, row, t)
            assert pool.usable_RT[row, t]


@pytest.mark.parametrize("view", [Windows(2), Windows(3, 2), Pairs(), Pairs("batch"), Rows()], ids=lambda v: v.name)
def test_what_is_gathered_is_what_lies_there(view):
    pool = random_pool(30, 12, 5, ends=0.05)
    cut = view.cut(pool, 6, 24, np.random.default_rng(0))
    for number in range(6):
        batch = view.gather(pool, cut, number)
        n, w = batch.positions_NW.shape
        assert batch.x_NWD.shape == (n, w, 2)
        assert torch.equal(batch.x_NWD[..., 0].long(), batch.rows_N[:, None].expand(n, w))
        assert torch.equal(batch.x_NWD[..., 1].long(), batch.positions_NW)
        local = batch.rows_N[:, None] - 10
        usable = torch.from_numpy(pool.usable_RT)[local, batch.positions_NW]
        documents = torch.from_numpy(pool.documents_RT)[local, batch.positions_NW]
        if batch.valid_NW is None:
            assert usable.all()
            assert (documents == batch.documents_N[:, None]).all()
        else:
            assert torch.equal(batch.valid_NW, usable)
            assert torch.equal(batch.documents_NW, documents)
        assert batch.n_tokens == int(usable.sum())
        part = batch.part(slice(1, 3))
        assert torch.equal(part.x_NWD, batch.x_NWD[1:3])
        assert torch.equal(part.rows_N, batch.rows_N[1:3])


@small
@given(st.integers(4, 30), st.integers(1, 4), st.integers(0, 2**31))
def test_every_row_with_a_usable_token_comes_once(rows, n_batches, seed):
    pool = random_pool(rows, 8, seed, usable=0.9, ends=0)
    with_tokens = pool.usable_RT.any(1).nonzero()[0]
    cut = Rows().cut(pool, n_batches, 1, np.random.default_rng(seed))
    assert sorted(cut.local_N.tolist()) == with_tokens.tolist()
    sizes = np.diff(cut.bounds)
    assert sizes.sum() == len(with_tokens)
    assert sizes.max() - sizes.min() <= 1


def test_rows_of_tiny_documents_are_refused():
    pool = random_pool(30, 12, 0, ends=0.5)
    with pytest.raises(UsageError, match=r"a token has on average 0\.\d earlier tokens of its document in its row"):
        Rows().cut(pool, 2, 1, np.random.default_rng(0))


@pytest.mark.parametrize("width", [8, 6, 5])
def test_rows_are_taken_bit_for_bit(width):
    x = torch.arange(40 * width).view(40, width).to(torch.int16).view(torch.bfloat16)
    index = torch.tensor([39, 0, 7, 7, 12])
    assert torch.equal(take_rows(x, index).view(torch.int16), x[index].view(torch.int16))
