"""A finished store grows: old rows and old fingerprints stay, other rows are refused, readers read on."""

import numpy as np
import pytest
from stores import (
    bits_of,
    content,
    grow_store,
    make_activations,
    make_block,
    make_store,
    make_stores,
    manifests,
    write_rows,
)
from tcsae.cache.store import ActivationStore
from tcsae.cache.verify import verify
from tcsae.cache.writer import StoreSetWriter
from tcsae.errors import StoreError


def test_a_finished_store_grows_and_old_fingerprints_stay(tmp_path):
    paths = make_stores(tmp_path, rows=40)  # shards of 16: the last holds 8
    old = ActivationStore.open(paths[3])
    prints = {rows: old.fingerprint(rows) for rows in (1, 16, 35, 40)}
    block = make_block(90, 16)
    bits = {3: make_activations(block, 8)}
    bits[3][:40], first = bits_of(old), bits_of(old)
    kept = make_block(40, 16)
    block.tokens_BT[:40], block.documents_BT[:40], block.flags_BT[:40] = (
        kept.tokens_BT,
        kept.documents_BT,
        kept.flags_BT,
    )
    for rows in (44, 90):  # twice, so that the same last shard is replaced twice
        with StoreSetWriter.open(paths, manifests((3,), rows)) as writer:
            assert (writer.rows_committed, writer.kept_rows, writer.cursor) == (
                32,
                writer.rows_stored - 32,
                {"row": 32},
            )
            writer.begin()
            with pytest.raises(StoreError, match=f"holds {writer.rows_stored} of {rows} rows, not finished"):
                ActivationStore.open(paths[3])
            write_rows(writer, block.slice(0, rows), {3: bits[3][:rows]})
        grown = ActivationStore.open(paths[3])
        assert grown.n_rows == rows
        np.testing.assert_array_equal(bits_of(grown, 0, 40), first)
        np.testing.assert_array_equal(bits_of(grown), bits[3][:rows])
        assert {n: grown.fingerprint(n) for n in prints} == prints
        assert verify(paths[3]).ok


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_who_opened_it_before_reads_on_while_it_grows(tmp_path, compression):
    path = make_store(tmp_path, rows=41, compression=compression)
    early, late = ActivationStore.open(path), ActivationStore.open(path)
    wanted = bits_of(early)
    grow_store(path, 60)
    for store in (early, late):  # one had the old file open, the other meets the new one
        np.testing.assert_array_equal(bits_of(store), wanted)
        assert store.tokens(0, 41).shape == (41, 16)


def test_growing_with_other_rows_is_refused_and_rounding_is_not(tmp_path):
    paths = make_stores(tmp_path, rows=40)
    block = make_block(40, 16)
    bits = bits_of(ActivationStore.open(paths[3]))
    longer = make_block(48, 16)
    longer.tokens_BT[:40], longer.documents_BT[:40], longer.flags_BT[:40] = (
        block.tokens_BT,
        block.documents_BT,
        block.flags_BT,
    )
    new = np.concatenate([bits, make_activations(longer, 8)[40:]])
    last_bit = new.copy()
    last_bit[:40, 3, 2] ^= 1
    other = new.copy()
    other[35] = other[20]
    wrong_text = make_block(48, 16, seed=9)
    for text, values in ((longer, other), (wrong_text, new)):
        with (
            pytest.raises(StoreError, match="differ from the stored"),
            StoreSetWriter.open(paths, manifests((3,), 48)) as writer,
        ):
            write_rows(writer, text, {3: values})
    with StoreSetWriter.open(paths, manifests((3,), 48)) as writer:
        write_rows(writer, longer, {3: last_bit})
    np.testing.assert_array_equal(bits_of(ActivationStore.open(paths[3])), new)  # the stored bits stayed


def test_layers_that_did_not_grow_together_are_not_thrown_away(tmp_path):
    paths = make_stores(tmp_path, [3], rows=60)
    before = content(paths[3])
    both = {**paths, 5: tmp_path / "l5.zarr"}
    with pytest.raises(StoreError, match=r"holds 60 rows but .*l5.zarr 0"):
        StoreSetWriter.open(both, manifests((3, 5), 60))
    assert content(paths[3]) == before
