"""Memory does not grow with the store: a store of hard links to one shard, far larger than what reading it may take."""

import psutil
import torch
from stores import make_block, make_manifest, tile_store, write_rows
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.store import ActivationStore
from tcsae.cache.stream import TokenStream
from tcsae.cache.views import Windows
from tcsae.cache.writer import StoreSetWriter

LAYOUT = StoreLayout(d_model=256, context=32, chunk_rows=16, shard_rows=128)  # 2 MB a shard
SHARDS = 500


def tiled_store(path):
    """One real shard, and every other a hard link to it."""
    block = make_block(LAYOUT.shard_rows, LAYOUT.context)
    x = torch.randn(LAYOUT.shard_rows, LAYOUT.context, LAYOUT.d_model, generator=torch.Generator().manual_seed(0))
    about = make_manifest(layout=LAYOUT, planned_rows=LAYOUT.shard_rows)
    with StoreSetWriter.open({3: path}, {3: about}) as writer:
        write_rows(writer, block, {3: x.bfloat16().view(torch.uint16).numpy()}, step=16)
    tile_store(path, SHARDS)
    return path


def test_reading_a_gigabyte_takes_a_few_megabytes(tmp_path):
    path = tiled_store(tmp_path / "l3.zarr")
    store = ActivationStore.open(path)
    assert store.n_tokens * store.d_model * 2 > 1e9
    pool = 8_000_000 // (2 * store.d_model)
    with TokenStream(store, [Windows(5)], tokens_per_batch=1024, pool_tokens=pool, seed=0) as stream:
        for _ in range(100):
            stream.next_batches()
        before = psutil.Process().memory_info().rss
        while stream.epoch == 0:
            stream.next_batches()
    grown = psutil.Process().memory_info().rss - before
    assert grown < 40e6  # indices and the last few shards' text, nothing in proportion to the gigabyte
