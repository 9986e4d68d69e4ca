"""A store as a dataset of PyTorch, every row once, whatever reads it; and as an iterator of shuffled batches."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from stores import make_store
from tcsae.cache.dataset import ActivationBatches, ActivationDataset
from tcsae.cache.store import ActivationStore
from tcsae.errors import StoreError, UsageError
from torch.utils.data import DataLoader


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("cache"), rows=30, context=8, d_model=6)


def test_a_row_is_what_the_store_has(path):
    data, store = ActivationDataset(path), ActivationStore.open(path)
    assert len(data) == 30
    for row in (0, 7, 29):
        item = data[row]
        assert torch.equal(item["x"], store.rows(row, row + 1)[0].float())
        assert item["tokens"].tolist() == store.tokens(row, row + 1)[0].tolist()
        assert item["documents"].tolist() == store.documents(row, row + 1)[0].tolist()
        assert item["usable"].tolist() == (store.flags(row, row + 1)[0] == 0).tolist()
    assert torch.equal(data[-1]["x"], data[29]["x"])
    assert ActivationDataset(path, dtype=torch.bfloat16)[3]["x"].dtype == torch.bfloat16
    for outside in (30, -31):
        with pytest.raises(IndexError, match="which has 30 rows"):
            data[outside]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_every_row_once(path, start):
    data = ActivationDataset(path)
    whole = torch.stack([data[row]["x"] for row in range(len(data))])  # opened before the workers are made
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context=start, timeout=120)
    assert torch.equal(torch.cat([batch["x"] for batch in loader]), whole)


def test_it_is_pickled_without_the_opened_store(path):
    data = ActivationDataset(path)
    again = pickle.loads(pickle.dumps(data)) if data[0] else None
    assert torch.equal(again[5]["x"], data[5]["x"])


def test_what_is_no_store_is_one_sentence(tmp_path):
    with pytest.raises(StoreError) as caught:
        ActivationDataset(tmp_path)
    assert "\n" not in str(caught.value)


def test_batches_hold_every_usable_token_once_per_epoch(path):
    store = ActivationStore.open(path)
    with ActivationBatches(store, 10, epochs=2, outliers=True) as batches:
        assert batches.d_model == 6
        found = list(batches)
        assert next(batches, None) is None
    usable_RT = torch.from_numpy(store.flags(0, 30) == 0)
    wanted = {tuple(x_D.tolist()) for x_D in store.rows(0, 30).float()[usable_RT]}
    per_epoch = len(wanted) // 10
    assert len(found) == 2 * per_epoch > 30
    assert all(x_ND.shape == (10, 6) and x_ND.dtype == torch.float32 for x_ND in found)
    for epoch in (found[:per_epoch], found[per_epoch:]):
        seen = {tuple(x_D.tolist()) for x_D in torch.cat(epoch)}
        assert len(seen) == 10 * per_epoch
        assert seen <= wanted
    assert not torch.equal(found[0], found[per_epoch])


def test_the_seed_decides_the_batches_and_a_state_goes_on(path):
    def some(n, **options):
        with ActivationBatches(path, 12, pool_tokens=60, **options) as batches:
            return torch.stack([next(batches) for _ in range(n)])

    whole = some(50, seed=3)  # several epochs: it does not end
    assert torch.equal(whole, some(50, seed=3))
    assert not torch.equal(whole, some(50, seed=4))
    with ActivationBatches(path, 12, pool_tokens=60, seed=3) as first:
        for _ in range(20):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
    with ActivationBatches(path, 12, pool_tokens=60, seed=3) as second:
        second.load_state_dict(state)
        assert torch.equal(torch.stack([next(second) for _ in range(30)]), whole[20:])
    with ActivationBatches(path, 12, pool_tokens=60, seed=4) as other, pytest.raises(UsageError, match="seed was 3"):
        other.load_state_dict(state)


def test_no_more_than_two_pools_are_in_memory(tmp_path, chunks_read):
    path = make_store(tmp_path, rows=64, context=8, d_model=6, chunk_rows=2, shard_rows=8)
    with ActivationBatches(path, 8, pool_tokens=32, outliers=True, dtype=torch.bfloat16) as batches:
        assert next(batches).dtype == torch.bfloat16
    assert chunks_read == [2, 2]  # of 32: the pool in use and the next one


def test_tokens_that_training_leaves_out_are_left_out(tmp_path):
    path = make_store(tmp_path, rows=30, context=8, d_model=6)
    store = ActivationStore.open(path)
    limit = store.statistics().norm_limit
    usable_RT = torch.from_numpy(store.flags(0, 30) == 0)
    over = int((store.rows(0, 30).float()[usable_RT].norm(dim=1) > limit).sum())
    with ActivationBatches(path, 1, epochs=1) as batches:
        n = sum(len(x_ND) for x_ND in batches)
    assert n == int(usable_RT.sum()) - over


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"epochs": 0}, {"pool_tokens": -1}, {"batch_size": 10**6}])
def test_sizes_that_cannot_be_are_one_sentence(path, options):
    with pytest.raises(UsageError) as caught, ActivationBatches(path, **options) as batches:
        next(batches)
    assert "\n" not in str(caught.value)
