"""Other Zarr readers see what we wrote, and the snippets of docs/FORMAT.md run as they stand."""

import re
from pathlib import Path

import numpy as np
import pytest
from stores import make_activations, make_block, make_store
from tcsae.cache.format.shard_reader import ShardReader
from tcsae.cache.store import ActivationStore
from tcsae.errors import StoreError

FORMAT = Path(__file__).parents[2] / "docs" / "FORMAT.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", FORMAT.read_text().split("\n## Codes\n")[0], re.DOTALL)
CODECS = ["none", "lz4", "zstd"]


def first_import(snippet):
    """The package a snippet is about."""
    names = re.findall(r"^(?:import|from) ([a-z]+)", snippet, re.MULTILINE)
    return next((name for name in names if name in ("zarr", "xarray", "dask", "tensorstore", "tcsae")), "numpy")


@pytest.fixture(params=CODECS)
def stored(tmp_path, request):
    path = make_store(tmp_path, layer=12, rows=41, compression=request.param)
    block = make_block(41, 16)
    return path, block, make_activations(block, 8, layer=12)


def test_zarr_python(stored):
    zarr = pytest.importorskip("zarr")
    path, block, bits = stored
    group = zarr.open_group(str(path), mode="r")
    assert {name for name, _ in group.members()} == {"activations", "tokens", "documents", "flags"}
    assert group["activations"].attrs["bits_of"] == "bfloat16"
    np.testing.assert_array_equal(group["activations"][:], bits)
    np.testing.assert_array_equal(group["activations"][37:41, 3:5], bits[37:41, 3:5])
    for name, array in (("tokens", block.tokens_BT), ("documents", block.documents_BT), ("flags", block.flags_BT)):
        np.testing.assert_array_equal(group[name][:], array)


def test_zarr_python_finds_the_same_damage(tmp_path):
    zarr = pytest.importorskip("zarr")
    path = make_store(tmp_path, rows=16)
    file = path / "activations/c.0.0.0"
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(str(path / "activations"), mode="r")[:]


def test_our_reader_reads_what_zarr_python_writes(tmp_path):
    """The shard files are Zarr's, not a look-alike: another program's are read, and known not to be the
    committed ones.
    """
    zarr = pytest.importorskip("zarr")
    path = make_store(tmp_path, rows=32)
    new = np.random.default_rng(0).integers(0, 0x7F00, (32, 16, 8), dtype=np.uint16)
    zarr.open_array(str(path / "activations"), mode="r+")[:] = new
    store = ActivationStore.open(path)
    reader = ShardReader(store.place, store.layout)
    np.testing.assert_array_equal(reader.shard_rows(1, 3, 16, 16), new[19:])
    with pytest.raises(StoreError, match="not those that were committed"):
        store.rows(0, 32)


def test_xarray(stored):
    xarray = pytest.importorskip("xarray")
    path, block, bits = stored
    dataset = xarray.open_zarr(str(path), consolidated=False, chunks=None, mask_and_scale=False)
    assert dataset["activations"].dims == ("row", "position", "d_model")
    np.testing.assert_array_equal(dataset["activations"].values, bits)
    np.testing.assert_array_equal(dataset["tokens"].values, block.tokens_BT)


def test_dask(stored):
    dask_array = pytest.importorskip("dask.array")
    path, _, bits = stored
    np.testing.assert_array_equal(
        dask_array.from_zarr(str(path), component="activations").compute(scheduler="sync"), bits
    )


def test_tensorstore(stored):
    tensorstore = pytest.importorskip("tensorstore")
    path, block, bits = stored
    for name, wanted in (("activations", bits), ("documents", block.documents_BT), ("flags", block.flags_BT)):
        source = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{name}/"}}
        np.testing.assert_array_equal(tensorstore.open(source, read=True).result().read().result(), wanted)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[first_import(s) for s in SNIPPETS])
def test_the_documented_snippets_run(tmp_path, monkeypatch, snippet):
    package = first_import(snippet)
    pytest.importorskip(package)
    make_store(tmp_path, layer=12, rows=41)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(snippet, str(FORMAT), "exec"), found)
    wanted = ActivationStore.open("l12.zarr").rows(0, 2).float().numpy()
    if package == "dask":
        np.testing.assert_allclose(found["mean"], wanted.mean((0, 1)), rtol=1e-5)
    elif package == "numpy":
        np.testing.assert_array_equal(found["x"], wanted[1])
    else:
        np.testing.assert_array_equal(np.asarray(found["x"].float() if package == "tcsae" else found["x"]), wanted)


def test_there_is_a_snippet_for_every_reader():
    assert [first_import(s) for s in SNIPPETS] == ["tcsae", "zarr", "xarray", "dask", "tensorstore", "numpy"]
