"""A worker that outlives its run: whatever it still computes, it puts no file into a store that another run may own."""

from functools import partial

import fsspec
import pytest
from stores import LAYOUT, make_activations, make_block, manifests, pieces, write_rows
from tcsae.cache.format.shard_writer import ShardSetWriter, write_shard
from tcsae.cache.format.zarr_documents import ARRAYS, shard_key
from tcsae.cache.storage.open_place import place_of
from tcsae.cache.verify import verify
from tcsae.cache.writer import StoreSetWriter
from tcsae.errors import StaleRunError

BLOCK, OTHER = make_block(32, 16), make_block(32, 16, seed=1)
BITS, OTHERS = {3: make_activations(BLOCK, 8)}, {3: make_activations(OTHER, 8, seed=1)}


@pytest.fixture(params=["folder", "memory", "s3"])
def paths(request, tmp_path):
    return {3: f"{tmp_path if request.param == 'folder' else request.getfixturevalue(request.param)}/l3.zarr"}


def begun(paths):
    """A run that was stopped, its token, and a worker's shard of it that lacks only the last step."""
    with StoreSetWriter.open(paths, manifests((3,), 32)) as writer:
        writer.begin()
        shard = ShardSetWriter({3: place_of(paths[3])}, {3: LAYOUT}, 1, owner=writer.run)
        for part, x in pieces(BLOCK, BITS, 16, 32, 4):
            shard.append(part, x)
    return writer.run, shard


def put_in_place(shard):
    with shard:
        return shard.commit()


def files(path):
    fs, root = fsspec.core.url_to_fs(str(path))
    return {name: fs.cat_file(name) for name in fs.find(root)}


def test_a_shard_of_a_stopped_run_is_dropped(paths):
    _, shard = begun(paths)
    with pytest.raises(StaleRunError, match=r"the run that was writing .*l3.zarr has ended .* does the rest again"):
        put_in_place(shard)
    left = files(paths[3])
    assert not any(name.endswith((".partial", *(shard_key(array, 1) for array in ARRAYS))) for name in left)


def test_a_shard_of_a_stopped_run_never_enters_another_configurations_store(paths):
    _, shard = begun(paths)
    with StoreSetWriter.open(paths, manifests((3,), 32, model_id="another"), fresh=True) as writer:
        write_rows(writer, OTHER, OTHERS)
        before = files(paths[3])
        with pytest.raises(StaleRunError, match=r"another writer took over .*l3.zarr"):
            put_in_place(shard)
        assert files(paths[3]) == {name: data for name, data in before.items() if not name.endswith(".partial")}
    assert verify(paths[3]).ok


def test_a_task_of_a_stopped_run_computes_nothing(paths):
    token, shard = begun(paths)
    shard.discard()
    nothing = iter(partial(pytest.fail, "a forward pass was run"), None)
    with pytest.raises(StaleRunError, match="has ended"):
        write_shard(paths, {3: LAYOUT}, 1, nothing, owner=token)


def test_a_shard_of_the_run_that_holds_the_store_is_put_in_place(paths):
    with StoreSetWriter.open(paths, manifests((3,), 16)) as writer:
        writer.begin()
        record = write_shard(paths, {3: LAYOUT}, 0, pieces(BLOCK, BITS, 0, 16, 5), owner=writer.run)
        writer.commit_records([record], {"row": 16})
        writer.finish()
    assert verify(paths[3]).ok
