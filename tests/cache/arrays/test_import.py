"""Vectors of any origin become a store: every kind of file, every cut into sequences, and what is refused."""

import json
import shutil

import numpy as np
import psutil
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tcsae.cache.arrays import run as run_module
from tcsae.cache.arrays.config import ImportConfig, import_config
from tcsae.cache.arrays.plan import make_plan
from tcsae.cache.arrays.run import import_array
from tcsae.cache.arrays.sources import open_array
from tcsae.cache.format.layout import PADDING
from tcsae.cache.store import ActivationStore
from tcsae.cache.verify import verify
from tcsae.errors import ArrayError, StoreError, UsageError

S, T, D = 12, 10, 6


def vectors(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(path):
    """Vectors, tokens, documents and padding of a store, as arrays."""
    store = ActivationStore.open(path)
    whole = 0, store.n_rows
    flags = store.flags(*whole)
    return store.rows(*whole), store.tokens(*whole), store.documents(*whole), (flags & PADDING) != 0


def in_order(config):
    """The positions of both stores by document and position, without padding: [n, d] as it was."""
    found = []
    for at, path in enumerate((config.store, config.held_out_store)):
        single = at if make_plan(config).sequences == 1 else 0  # its end is held out
        x_RTD, tokens_RT, documents_RT, padding_RT = stored(path)
        keep = ~padding_RT
        rows = np.arange(len(x_RTD))[:, None].repeat(x_RTD.shape[1], 1)
        keys = zip(documents_RT[keep], rows[keep], np.argwhere(keep)[:, 1], strict=True)
        keys = [(single, *map(int, key)) for key in keys]
        found += [(*key, x, t) for key, x, t in zip(keys, x_RTD[keep], tokens_RT[keep], strict=True)]
    found.sort(key=lambda one: one[:4])
    return torch.stack([one[4] for one in found]), np.array([one[5] for one in found])


def written(kind, folder, x, tokens):
    """The same arrays in a file of one kind, and what the options must say."""
    path = folder / f"x{kind}"
    if kind == ".npy":
        np.save(path, x)
        np.save(folder / "tokens.npy", tokens)
        return {"array": path, "tokens": folder / "tokens.npy"}
    if kind == ".f.npy":
        np.save(path, np.asfortranarray(x))
        np.save(folder / "tokens.npy", tokens)
        return {"array": path, "tokens": folder / "tokens.npy"}
    if kind == ".npz":
        np.savez_compressed(path, vectors=x, tokens=tokens)
    elif kind == ".zarr":
        group = zarr.open_group(path, mode="w")
        group.create_array("vectors", data=x, chunks=(5, *x.shape[1:]))
        group.create_array("tokens", data=tokens)
    elif kind == ".safetensors":
        save_file({"vectors": torch.from_numpy(x), "tokens": torch.from_numpy(tokens)}, path)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"vectors": x.tolist(), "tokens": tokens.tolist()}), path, row_group_size=5)
    return {"array": path, "tokens": "tokens"}


KINDS = (".npy", ".f.npy", ".npz", ".zarr", ".safetensors", ".parquet")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(S, T, D), (S * T, D)], ids=["rows", "list"])
@pytest.mark.parametrize("context", [T, 4])
def test_every_kind_of_file_gives_the_same_vectors(tmp_path, kind, shape, context):
    x, tokens = vectors(*shape), np.arange(S * T).reshape(shape[:-1])
    options = written(kind, tmp_path, x, tokens)
    config = import_config(**options, context=context, out=tmp_path / "a.zarr", held_out=0.25)
    done = import_array(config)
    found, found_tokens = in_order(config)
    assert torch.equal(found, torch.from_numpy(x).reshape(-1, D).bfloat16())
    assert np.array_equal(found_tokens, np.arange(S * T))
    assert done.plan.sequences == (S if len(shape) == 3 else 1)
    for path in done.stores:
        assert verify(path).ok
        manifest = ActivationStore.open(path).manifest
        assert not manifest.of_language_model
        assert (manifest.model.vocab_size, manifest.layer, manifest.d_model) == (S * T, 0, D)


def test_a_parquet_column_of_lists_knows_its_sequences(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths = [3, 7, 1, 5]
    parts = [vectors(n, D, seed=n) for n in lengths]
    labels = ["a", "b", None, "a"]
    table = {"h": [p.tolist() for p in parts], "tokens": [list(range(n)) for n in lengths], "who": labels}
    pq.write_table(pa.table(table), tmp_path / "x.parquet", row_group_size=2)
    config = import_config(
        array=tmp_path / "x.parquet", key="h", tokens="tokens", labels="who", context=4, out=tmp_path / "a.zarr"
    )
    done = import_array(config)
    found, tokens = in_order(config)
    assert torch.equal(found, torch.from_numpy(np.concatenate(parts)).bfloat16())
    assert tokens.tolist() == [n for length in lengths for n in range(length)]
    assert done.plan.labels == labels


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=2, max_size=8), context=st.integers(2, 6), share=st.floats(0, 0.6))
def test_no_row_mixes_sequences_and_nothing_is_lost(tmp_path_factory, lengths, context, share):
    folder = tmp_path_factory.mktemp("lengths")
    n = sum(lengths)
    np.savez(folder / "x.npz", vectors=vectors(max(n, 1), D)[:n].reshape(n, D), lengths=np.array(lengths))
    config = import_config(
        array=folder / "x.npz", lengths="lengths", context=context, held_out=share, out=folder / "a.zarr"
    )
    try:
        plan = make_plan(config)
    except (ArrayError, UsageError):  # nothing at all, or nothing left to train on
        return
    place = np.repeat(np.arange(len(lengths)), lengths)
    seen = np.zeros(n, dtype=int)
    for rows in (plan.train, plan.held_out):
        for start, count, sequence in zip(rows.start_R, rows.count_R, rows.sequence_R, strict=True):
            assert 0 < count <= context
            assert (place[start : start + count] == sequence).all()
            seen[start : start + count] += 1
    assert (seen == 1).all()
    assert not set(plan.train.sequence_R) & set(plan.held_out.sequence_R)
    assert bool(len(plan.held_out)) == (share > 0) or 0 in lengths


def test_the_end_of_a_single_sequence_is_held_out(tmp_path):
    x = vectors(100, D)
    np.save(tmp_path / "x.npy", x)
    config = import_config(array=tmp_path / "x.npy", context=10, held_out=0.2, out=tmp_path / "a.zarr")
    import_array(config)
    held_out, *_ = stored(config.held_out_store)
    assert torch.equal(held_out.reshape(-1, D), torch.from_numpy(x[80:]).bfloat16())


def test_positions_beyond_a_row_s_length_are_padding(tmp_path):
    lengths = [10, 4, 7]
    np.savez(tmp_path / "x.npz", vectors=vectors(3, T, D), lengths=lengths)
    config = import_config(
        array=tmp_path / "x.npz", key="vectors", lengths="lengths", held_out=0, out=tmp_path / "a.zarr"
    )
    import_array(config)
    x_RTD, _, _, padding_RT = stored(config.store)
    assert (~padding_RT).sum(1).tolist() == lengths
    assert not x_RTD[torch.from_numpy(padding_RT)].any()


def test_an_import_that_was_stopped_goes_on(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", vectors(4000, 512))
    options = {"array": tmp_path / "x.npy", "context": 8, "shard_bytes": 500_000}
    whole = import_config(**options, out=tmp_path / "whole.zarr")
    import_array(whole)
    config = import_config(**options, out=tmp_path / "part.zarr")
    real, calls = run_module._read, []

    def read(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_read", read)
        with pytest.raises(KeyboardInterrupt):
            import_array(config)
    rows = ActivationStore.open(config.store, allow_unfinished=True).n_rows
    assert 0 < rows < ActivationStore.open(whole.store).n_rows
    done = import_array(config)
    assert done.rows_before == rows
    assert not done.already_complete
    for one, other in ((config.store, whole.store), (config.held_out_store, whole.held_out_store)):
        assert ActivationStore.open(one).fingerprint() == ActivationStore.open(other).fingerprint()
        assert verify(one).ok
    assert import_array(config).already_complete


def test_another_array_is_not_mixed_in(tmp_path):
    np.save(tmp_path / "x.npy", vectors(100, D))
    config = import_config(array=tmp_path / "x.npy", context=10, out=tmp_path / "a.zarr")
    import_array(config)
    np.save(tmp_path / "x.npy", vectors(100, D, seed=1))
    with pytest.raises(StoreError, match=r"holds other rows \(model\.fingerprint"):
        import_array(config)
    assert not import_array(import_config(array=tmp_path / "x.npy", context=10, out=tmp_path / "a.zarr", fresh=True))\
        .already_complete  # fmt: skip


def test_memory_does_not_grow_with_the_array(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(400_000, 256))
    array[::1000] = 1
    array.flush()
    del array
    import_array(import_config(array=tmp_path / "x.npy", key=None, out=tmp_path / "first.zarr", context=100_000))
    shutil.rmtree(tmp_path / "first.zarr")
    before, most = psutil.Process().memory_info().rss, [0]
    real = run_module._read

    def read(*args):
        most[0] = max(most[0], psutil.Process().memory_info().rss)
        return real(*args)

    small = 16_000_000  # a few shards are in memory at a time
    run_module._read = read
    config = import_config(array=tmp_path / "x.npy", out=tmp_path / "a.zarr", shard_bytes=small)
    try:
        import_array(config)
    finally:
        run_module._read = real
    assert (tmp_path / "x.npy").stat().st_size > 400e6
    assert most[0] - before < 300e6, "the array has 410 MB, and its copy in bfloat16 half of that"


@pytest.mark.parametrize(("arrays", "options", "sentence"), [
    ({"vectors": vectors(4)}, {}, r"has shape \[4\]: vectors are \[row, position, d\] or \[n, d\]"),
    ({"vectors": vectors(2, 2, 2, 2)}, {}, "vectors are"),
    ({"vectors": vectors(0, 3)}, {}, "vectors are"),
    ({"vectors": np.arange(12).reshape(4, 3)}, {}, "holds int64: vectors are floating-point numbers"),
    ({"vectors": vectors(4, 3).astype(complex)}, {}, "complex128, which are no real numbers"),
    ({"a": vectors(4, 3), "b": vectors(4, 3)}, {}, "holds a, b, none called vectors: say which with --key"),
    ({"a": vectors(4, 3)}, {"key": "c"}, "has no 'c': it has a"),
    ({"vectors": vectors(4, 1, 3)}, {}, "has rows of one position"),
    ({"vectors": vectors(9, 3), "lengths": [4, 4]}, {"lengths": "lengths"}, "adds up to 8, .* has 9 vectors"),
    ({"vectors": vectors(9, 3), "lengths": [4.5, 4.5]}, {"lengths": "lengths"}, "must be whole numbers from 0 up"),
    ({"vectors": vectors(3, 5, 3), "lengths": [4, 4, 6]}, {"lengths": "lengths"}, "has 3 rows of 5 positions"),
    ({"vectors": vectors(9, 3), "tokens": np.arange(8)}, {"tokens": "tokens"}, "one token for each vector"),
    ({"vectors": vectors(9, 3), "tokens": -np.arange(9)}, {"tokens": "tokens"}, "whole numbers from 0"),
    ({"vectors": vectors(9, 3), "tokens": np.ones(9)}, {"tokens": "tokens"}, "whole numbers from 0"),
    ({"vectors": vectors(3, 5, 3), "labels": ["a"]}, {"labels": "labels"}, "has 1 entries for 3 sequences"),
    (
        {"vectors": vectors(9, 3), "tokens": np.arange(9), "text": ["a"]},
        {"tokens": "tokens", "token_text": "text"},
        "1 texts, there are tokens up to 8",
    ),
    ({"vectors": vectors(9, 3)}, {"token_text": "text"}, "there are none: give --tokens"),
    ({"vectors": vectors(3, 2, 3)}, {"held_out": 0.99}, "leave none to train on"),
    ({"vectors": vectors(9, 3)}, {"context": 1}, "holds no two neighbours"),
    ({"vectors": vectors(9, 3)}, {"out": "x"}, r"must end with \.zarr"),
    ({"vectors": vectors(9, 3)}, {"site": "a b"}, "is no name"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(tmp_path, arrays, options, sentence):
    np.savez(tmp_path / "x.npz", **{name: np.asarray(one) for name, one in arrays.items()})
    with pytest.raises((ArrayError, UsageError), match=sentence):
        import_array(import_config(**{"array": tmp_path / "x.npz", "out": tmp_path / "a.zarr", **options}))
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(("value", "dtype", "sentence"), [
    (np.nan, np.float32, "holds NaN or infinity at row 7, position 2"),
    (np.inf, np.float16, "holds NaN or infinity at row 7, position 2"),
    (1e200, np.float64, "holds a number too large for bfloat16"),
])  # fmt: skip
def test_what_no_store_may_hold_is_named(tmp_path, value, dtype, sentence):
    x = vectors(10, 5, 4).astype(dtype)
    x[7, 2, 3] = value
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ArrayError, match=sentence):
        import_array(import_config(array=tmp_path / "x.npy", held_out=0, out=tmp_path / "a.zarr"))


def test_files_that_are_none_are_one_sentence(tmp_path):
    with pytest.raises(ArrayError, match=r"there is no .*nothing\.npy"):
        open_array(tmp_path / "nothing.npy")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(ArrayError, match="is no array that can be read"):
        open_array(tmp_path / "x.csv")
    for kind in ("npy", "npz", "safetensors", "parquet"):
        (tmp_path / f"x.{kind}").write_bytes(b"nothing of the kind")
        with pytest.raises(ArrayError, match="cannot be read"):
            open_array(tmp_path / f"x.{kind}")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    with pytest.raises(ArrayError, match="cannot be read"):
        open_array(tmp_path / "o.npy")


def test_a_store_is_no_array(tmp_path):
    np.save(tmp_path / "x.npy", vectors(40, D))
    import_array(import_config(array=tmp_path / "x.npy", context=4, out=tmp_path / "a.zarr"))
    with pytest.raises(ArrayError, match="is an activation store already"):
        open_array(tmp_path / "a.zarr")


def test_labels_and_texts_lie_in_files_too(tmp_path):
    np.save(tmp_path / "x.npy", vectors(S, T, D))
    np.save(tmp_path / "t.npy", np.ones((S, T), dtype=np.int64))
    (tmp_path / "labels.json").write_text(json.dumps([f"c{n % 2}" for n in range(S)]))
    (tmp_path / "text.json").write_text(json.dumps(["a", "b"]))
    files = {"labels": tmp_path / "labels.json", "tokens": tmp_path / "t.npy", "token_text": tmp_path / "text.json"}
    config = import_config(array=tmp_path / "x.npy", **files, out=tmp_path / "a.zarr", name="net work", layer=2)
    import_array(config)
    store = ActivationStore.open(config.store)
    assert store.location.short == "l2.net_work"
    cursor = store.commits[0].cursor
    assert cursor["token_text"] == ["a", "b"]
    assert set(cursor["labels"].values()) == {"c0", "c1"}
    assert ImportConfig("x.npy", name="net work").store == "cache/net work.zarr"
