"""What extractions of tiny models share: a configuration, and shards of 8 rows."""

import pytest
from tcsae.cache.format.layout import StoreLayout
from tcsae.extract import plan
from tcsae.extract.config import ExtractConfig, ModelSource, TextSource


@pytest.fixture
def small_shards(monkeypatch):
    """The planner would put these stores into one shard."""
    small = lambda d_model, context, *, compression, **_: StoreLayout(d_model, context, 4, 8, compression)  # noqa: E731
    monkeypatch.setattr(plan, "plan_layout", small)


@pytest.fixture
def config(tiny_gemma2, corpus, tmp_path):
    """100 rows of 16 tokens, layers 1 and 2."""
    text = TextSource(str(corpus), context=16, held_out=0.1)
    source = ModelSource(str(tiny_gemma2), dtype="float32", device="cpu")
    return ExtractConfig((1, 2), source, text, tokens=1600, batch_size=4, out=str(tmp_path / "a"))
