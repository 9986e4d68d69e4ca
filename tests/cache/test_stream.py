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
from tcsae.cache.format.layout import SPECIAL, of_role
from tcsae.cache.pools import PoolReader
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


# --- of conversations, one role's tokens alone


@pytest.fixture(scope="module", params=["document", "concat"])
def talks(request, tmp_path_factory):
    path = make_store(
        tmp_path_factory.mktemp("talks"), rows=48, context=24, documents=10, packing=request.param, turns=True
    )
    return ActivationStore.open(path)


def usable_and_messages(store, role):
    """Which tokens are of the role and not special, and the number of the message (and document) each is in."""
    flags, documents = store.flags(0, store.n_rows), store.documents(0, store.n_rows)
    said = of_role(flags, role)
    messages = np.full(said.shape, -1)
    count = 0
    for row, position in zip(*said.nonzero(), strict=True):
        before = position > 0 and said[row, position - 1] and documents[row, position - 1] == documents[row, position]
        count += not before
        messages[row, position] = count
    return said & (flags & SPECIAL == 0), messages


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_pool_counts_only_the_tokens_of_the_role(talks, role):
    usable, _ = usable_and_messages(talks, role)
    reader = PoolReader(talks, pool_tokens=200, tokens_per_batch=8, seed=1, norm_limit=None, rows=None, only=role)
    pools = [reader.read(0, number) for number in range(reader.pools)]
    assert reader.pools > 1
    assert sum(pool.n_tokens for pool in pools) == usable.sum()
    for pool in pools:
        assert np.array_equal(pool.usable_RT, usable[pool.rows_R])


@pytest.mark.parametrize(
    "view", [view for view in EVERY_VIEW if not isinstance(view, Rows)], ids=lambda view: view.name
)
def test_windows_and_pairs_lie_in_one_message_of_the_role(talks, view):
    usable, messages = usable_and_messages(talks, "assistant")
    x = talks.rows(0, talks.n_rows)
    with TokenStream(talks, [view], tokens_per_batch=12, seed=2, only="assistant") as stream:
        seen, n = set(), 0
        while stream.epoch < 3:
            (batch,) = stream.next_batches()
            rows_NW, positions_NW = batch.rows_N[:, None].expand_as(batch.positions_NW), batch.positions_NW
            assert usable[rows_NW, positions_NW].all()
            inside = messages[rows_NW, positions_NW]
            assert (inside == inside[:, :1]).all()
            assert torch.equal(batch.x_NWD, x[rows_NW, positions_NW])
            seen.update(zip(rows_NW.flatten().tolist(), positions_NW.flatten().tolist(), strict=True))
            n += 1
        assert n // 3 == usable.sum() // 12 or view.name != "windows of 1"
        assert len(seen) > 0.3 * usable.sum()


def test_whole_rows_are_masked_by_role_and_every_token_of_it_counts_once(talks):
    usable, _ = usable_and_messages(talks, "user")
    with TokenStream(talks, [Rows()], tokens_per_batch=60, seed=2, only="user") as stream:
        times = np.zeros(usable.shape, int)
        for _ in range(usable.sum() // 60):
            (batch,) = stream.next_batches()
            times[batch.rows_N] += batch.valid_NW.numpy()
    assert np.array_equal(times, usable.astype(int))


@pytest.mark.parametrize("view", EVERY_VIEW, ids=lambda view: view.name)
def test_a_stream_of_one_role_goes_on_bit_for_bit_and_is_no_other(talks, view):
    of = {"tokens_per_batch": 40, "pool_tokens": 400, "seed": 2}
    with TokenStream(talks, [view], only="assistant", **of) as stream:
        batches(stream, 3)
        state = stream.state_dict(view)
        after = batches(stream, 4)
    with TokenStream(talks, [view], only="assistant", **of) as stream:
        stream.load_state_dict(state, view)
        assert all(same(a, b) for a, b in zip(batches(stream, 4), after, strict=True))
    for other in ("user", ""):
        refused = pytest.raises(UsageError, match=f"only was assistant and is now {other or None}")
        with TokenStream(talks, [view], only=other, **of) as stream, refused:
            stream.load_state_dict(state, view)


def test_a_role_that_is_not_there_is_one_sentence(talks, tmp_path):
    for size, role, sentence in [
        (4, "tool", "has no usable token in a message of the role 'tool'"),
        (4000, "user", "no batch of 4000 tokens in messages of the role 'user' can be filled"),
    ]:
        refused = pytest.raises(UsageError, match=sentence)
        with TokenStream(talks, [Windows(1)], tokens_per_batch=size, seed=0, only=role) as stream, refused:
            stream.next_batches()
    plain = ActivationStore.open(make_store(tmp_path))
    with pytest.raises(StoreError, match="so that --only user selects nothing: extract rows of messages with --chat"):
        of_windows(plain, 2, tokens_per_batch=4, seed=0, only="user")


def test_pools_divide_an_epoch_as_numpy_does(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=91))
    options = {"tokens_per_batch": 1, "seed": 3, "norm_limit": None, "rows": None}
    reader = PoolReader(store, pool_tokens=5 * store.chunk_rows * store.context, **options)
    assert store.n_chunks % reader.pools  # not all of one size
    for epoch in (0, 1, 0):
        order = np.random.default_rng([3, epoch]).permutation(store.n_chunks)
        expected = [part.tolist() for part in np.array_split(order, reader.pools)]
        assert [reader._chunks(epoch, pool) for pool in range(reader.pools)] == expected
