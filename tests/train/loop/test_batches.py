"""Batches ahead of their use: the stream's own, in its order, from any position; the slow twin is the
stream by itself.
"""

from __future__ import annotations

import json
from concurrent.futures import wait
from typing import Any

import pytest
import torch
from stores import make_store
from tcsae.cache.store import ActivationStore
from tcsae.cache.stream import TokenStream
from tcsae.cache.views import Pairs, Windows
from tcsae.errors import UsageError
from tcsae.train.loop.batches import BatchReader

CPU = torch.device("cpu")
VIEWS = (Windows(5), Pairs())


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    return ActivationStore.open(make_store(tmp_path, rows=48))


@pytest.fixture(params=[0, 1, 2])
def ahead(request: pytest.FixtureRequest) -> int:
    return request.param


def stream_of(store: ActivationStore, **options: Any) -> TokenStream:
    return TokenStream(store, VIEWS, **{"tokens_per_batch": 40, "pool_tokens": 200, "seed": 7} | options)


def test_batches_states_and_epochs_are_the_streams(store, ahead):
    feed, stream = BatchReader(stream_of(store), CPU, ahead=ahead), stream_of(store)
    for _ in range(60):
        assert feed.epoch == stream.epoch
        assert [feed.state_dict(view) for view in VIEWS] == [stream.state_dict(view) for view in VIEWS]
        mine = feed.next_batches()
        for view, own in zip(VIEWS, stream.next_batches(), strict=True):
            for name in ("x_NWD", "documents_N", "rows_N", "positions_NW"):
                assert torch.equal(getattr(mine[view], name), getattr(own, name))
    assert feed.epoch >= 2
    feed.close()
    stream.close()


def test_going_back_forgets_what_was_gathered_ahead(store, ahead):
    feed, seen, states = BatchReader(stream_of(store), CPU, ahead=ahead), [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(feed.state_dict(VIEWS[1]))))
        seen.append(feed.next_batches()[VIEWS[0]].x_NWD)
    for at in (0, 29, 11):
        feed.load_state_dict(states[at], VIEWS[1])
        assert feed.state_dict(VIEWS[1]) == states[at]
        assert all(torch.equal(feed.next_batches()[VIEWS[0]].x_NWD, x) for x in seen[at:])
    feed.close()


def test_a_view_more_begins_where_the_others_are_however_many_batches_were_ahead(store, ahead):
    feed, stream, every_token = BatchReader(stream_of(store), CPU, ahead=ahead), stream_of(store), Windows(1, 1)
    for _ in range(3):
        feed.next_batches()
        stream.next_batches()
    wait(feed._ahead)  # the most that can have been made
    feed.add_view(every_token)
    stream.add_view(every_token)
    for _ in range(16):
        mine = feed.next_batches()
        for view, own in zip((*VIEWS, every_token), stream.next_batches(), strict=True):
            assert torch.equal(mine[view].x_NWD, own.x_NWD)
    feed.close()
    stream.close()


def test_what_the_stream_refuses_is_raised_where_the_batch_is_asked_for(store, ahead):
    feed = BatchReader(stream_of(store, tokens_per_batch=2000), CPU, ahead=ahead)
    with pytest.raises(UsageError, match="no batch of 2000 tokens"):
        feed.next_batches()
    other = BatchReader(stream_of(store, tokens_per_batch=2000, seed=8), CPU)
    with pytest.raises(UsageError, match="the stream's seed was 7 and is now 8"):
        other.load_state_dict(feed.state_dict(VIEWS[0]), VIEWS[0])
    feed.close()
    other.close()
