"""A store as a dataset of PyTorch: every row once, whatever reads it."""

from __future__ import annotations

import pickle

import pytest
import torch
from stores import make_store
from tcsae.cache.dataset import ActivationDataset
from tcsae.cache.store import ActivationStore
from tcsae.errors import StoreError
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
