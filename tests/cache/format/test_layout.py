"""The planner's arithmetic, and bits to tensors and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcsae.cache.format.layout import FILL, RowBlock, StoreLayout, from_bits, plan_layout, to_bits
from tcsae.errors import UsageError

sizes = st.integers(1, 5000)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 4096), st.integers(1, 10**12), st.none() | st.integers(1, 10**8))
def test_every_plan_is_whole_chunks_in_whole_shards(d_model, context, shard_bytes, planned):
    layout = plan_layout(d_model, context, shard_bytes=shard_bytes, planned_rows=planned)
    assert layout.shard_rows % layout.chunk_rows == 0
    assert layout.chunk_rows == 1 or layout.chunk_bytes <= 10_000_000
    assert layout.chunk_bytes == layout.chunk_rows * context * d_model * 2
    rows = planned or 7
    last = layout.shards_for(rows) - 1
    assert layout.rows_of(last, rows).stop == rows
    assert layout.rows_of(last, rows).start == last * layout.shard_rows
    assert not layout.rows_of(last + 1, rows)


def test_gemma_2_2b_gets_the_measured_best():
    layout = plan_layout(2304, 128)
    assert (layout.chunk_rows, layout.shard_rows) == (16, 512)
    assert 64e6 < layout.shard_bytes < 512e6


def test_a_small_plan_still_has_chunks_to_shuffle_and_shards_to_commit():
    layout = plan_layout(576, 128, planned_rows=1536)
    assert layout.chunks_for(1536) >= 64
    assert layout.shards_for(1536) >= 8


def test_bytes_of_the_plan_are_not_forgotten():
    layout = plan_layout(2304, 128)
    rows = 10_000_000 // 128
    assert layout.store_bytes(rows) >= rows * 128 * layout.bytes_per_token
    assert layout.store_bytes(rows) == pytest.approx(rows * 128 * 4617, rel=0.01)


@pytest.mark.parametrize("wrong", [{"d_model": 0, "context": 4}, {"d_model": 4, "context": 4, "compression": "gzip"}])
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(UsageError):
        plan_layout(**wrong)


def test_shards_of_broken_chunks_are_refused():
    with pytest.raises(ValueError, match="whole number of chunks"):
        StoreLayout(8, 8, chunk_rows=3, shard_rows=8)


def test_bits_round_to_nearest_even_and_come_back_without_a_copy():
    x = torch.tensor([1.0, 1 + 2**-9, 1 + 3 * 2**-9, -0.0, float("inf"), 3e38])
    bits = to_bits(x)
    assert bits.dtype == np.uint16
    assert torch.equal(from_bits(bits), x.to(torch.bfloat16))
    view = from_bits(bits)
    view[0] = 2
    assert bits[0] == 0x4000
    assert torch.isnan(from_bits(np.array([FILL], np.uint16))).all()


def test_a_block_of_rows_is_one_shape_and_the_right_types():
    good = np.zeros((2, 4), np.int32)
    flags = np.zeros((2, 4), np.uint8)
    block = RowBlock.concatenate([RowBlock(good, good, flags), RowBlock(good, good, flags)])
    assert len(block) == 4
    with pytest.raises(ValueError, match="flags_BT"):
        RowBlock(good, good, good)
    with pytest.raises(ValueError, match="documents_BT"):
        RowBlock(good, good[:1], flags)
