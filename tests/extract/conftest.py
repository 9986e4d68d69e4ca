"""Shards of 8 rows for tiny stores."""

import pytest
from tcsae.cache.layout import StoreLayout
from tcsae.extract import plan


@pytest.fixture
def small_shards(monkeypatch):
    """The planner would put these stores into one shard."""
    small = lambda d_model, context, *, compression, **_: StoreLayout(d_model, context, 4, 8, compression)  # noqa: E731
    monkeypatch.setattr(plan, "plan_layout", small)
