"""Object storage through fsspec: the same store, the same failures; in memory, and on a real S3 server on loopback."""

import json
import os
import time

import fsspec
import numpy as np
import pytest
import torch
from stores import make_activations, make_block, make_manifest, make_store, pieces, write_rows
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.format.shard_writer import write_shard
from tcsae.cache.storage import lock as lock_module
from tcsae.cache.storage.open_place import place_of
from tcsae.cache.store import ActivationStore
from tcsae.cache.stream import TokenStream
from tcsae.cache.verify import verify
from tcsae.cache.views import Windows
from tcsae.cache.writer import StoreSetWriter
from tcsae.errors import StoreError

ROWS, LAYOUT = 45, StoreLayout(8, 16, 4, 16)
BLOCK = make_block(ROWS, 16)
BITS = {layer: make_activations(BLOCK, 8, layer=layer) for layer in (3, 5)}


def manifests(rows=ROWS, **about):
    return {layer: make_manifest(layer=layer, layout=LAYOUT, planned_rows=rows, **about) for layer in BITS}


@pytest.fixture(params=["memory", "s3"])
def bucket(request):
    return request.getfixturevalue(request.param)


def stored(url, layer=3):
    return ActivationStore.open(f"{url}/l{layer}.zarr")


def test_the_same_store_with_the_same_bytes(bucket, tmp_path):
    paths = {layer: f"{bucket}/l{layer}.zarr" for layer in BITS}
    with StoreSetWriter.open(paths, manifests()) as writer:
        write_rows(writer, BLOCK, BITS)
    local = make_store(tmp_path, rows=ROWS)
    store = stored(bucket)
    assert store.fingerprint() == ActivationStore.open(local).fingerprint()
    np.testing.assert_array_equal(store.rows(3, 41).view(torch.uint16).numpy(), BITS[3][3:41])
    np.testing.assert_array_equal(store.documents(3, 41), BLOCK.documents_BT[3:41])
    assert store.statistics().to_json() == ActivationStore.open(local).statistics().to_json()
    assert verify(paths[5]).ok
    options = {"views": [Windows(5)], "tokens_per_batch": 40, "pool_tokens": 200, "seed": 7}
    with TokenStream(store, **options) as far, TokenStream(ActivationStore.open(local), **options) as near:
        for _ in range(20):
            assert torch.equal(far.next_batches()[0].x_NWD, near.next_batches()[0].x_NWD)


def test_resume_grow_and_workers(bucket):
    paths = {layer: f"{bucket}/l{layer}.zarr" for layer in BITS}
    layouts = dict.fromkeys(BITS, LAYOUT)
    with StoreSetWriter.open(paths, manifests(rows=40)) as writer:
        writer.begin()
        record = write_shard(paths, layouts, 0, pieces(BLOCK, BITS, 0, 16, 5))
        write_shard(paths, layouts, 1, pieces(BLOCK, BITS, 16, 32, 5))  # durable, but nobody commits it
        writer.commit_records([record], {"row": 16})
    with StoreSetWriter.open(paths, manifests(rows=40)) as writer:
        assert (writer.rows_committed, writer.cursor) == (16, {"row": 16})
        write_rows(writer, BLOCK.slice(0, 40), {layer: x[:40] for layer, x in BITS.items()})
    before = stored(bucket).fingerprint()
    with StoreSetWriter.open(paths, manifests()) as writer:
        assert (writer.rows_committed, writer.kept_rows) == (32, 8)
        write_rows(writer, BLOCK, BITS)
    for layer, bits in BITS.items():
        np.testing.assert_array_equal(stored(bucket, layer).rows(0, ROWS).view(torch.uint16).numpy(), bits)
    assert stored(bucket).fingerprint(40) == before
    assert verify(paths[3]).ok


def test_an_exception_uploads_nothing(bucket):
    paths = {layer: f"{bucket}/l{layer}.zarr" for layer in BITS}

    def interrupted():
        with StoreSetWriter.open(paths, manifests()) as writer:
            for part, x in pieces(BLOCK, BITS, 0, 12, 4):
                writer.append(part, x)
            writer.drain()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    fs, root = fsspec.core.url_to_fs(paths[3])
    assert not fs.exists(f"{root}/activations/c.0.0.0")
    assert not fs.exists(f"{root}/{lock_module.LOCK}")


def test_damage_is_found_there_too(bucket):
    paths = {layer: f"{bucket}/l{layer}.zarr" for layer in BITS}
    with StoreSetWriter.open(paths, manifests()) as writer:
        write_rows(writer, BLOCK, BITS)
    fs, root = fsspec.core.url_to_fs(paths[3])
    good = fs.cat_file(f"{root}/activations/c.1.0.0")
    fs.pipe_file(f"{root}/activations/c.1.0.0", good[:500] + bytes([good[500] ^ 1]) + good[501:])
    with pytest.raises(StoreError, match=r"c.1.0.0 is damaged"):
        stored(bucket).rows(16, 32)
    fs.rm_file(f"{root}/activations/c.1.0.0")
    with pytest.raises(StoreError, match=r"c.1.0.0 is missing"):
        stored(bucket).rows(16, 32)
    with pytest.raises(StoreError, match=r"no store at .*nothing.zarr"):
        ActivationStore.open(f"{bucket}/nothing.zarr")


def test_two_writers_and_a_dead_one(memory, monkeypatch):
    path = {3: f"{memory}/l3.zarr"}
    about = {3: manifests()[3]}
    with StoreSetWriter.open(path, about) as writer:
        with pytest.raises(StoreError, match=f"another writer holds .* \\(process {os.getpid()} on "):
            StoreSetWriter.open(path, about)
        writer.append(BLOCK.slice(0, 16), {3: BITS[3][:16]})
        writer.commit({"row": 16})
        writer.drain()
        # It dies without a word: its lease stays, and runs out.
        lease = json.loads(fsspec.filesystem("memory").cat_file(f"/bucket/stores/l3.zarr/{lock_module.LOCK}"))
        monkeypatch.setattr(lock_module.time, "time", lambda: lease["renewed"] + lock_module.STALE + 1)
        with StoreSetWriter.open(path, about) as heir:
            assert heir.rows_committed == 16
            # It was not dead after all: it finds out before it commits anything.
            writer.append(BLOCK.slice(16, 32), {3: BITS[3][16:32]})
            writer.commit({"row": 32})
            with pytest.raises(StoreError, match="another writer took over"):
                writer.drain()
            assert heir.rows_stored == 16
            writer._worker._failure = None


def test_a_lease_is_renewed_while_its_owner_lives(memory, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT", 0.01)
    with StoreSetWriter.open({3: f"{memory}/l3.zarr"}, {3: manifests()[3]}):
        first = fsspec.filesystem("memory").cat_file(f"/bucket/stores/l3.zarr/{lock_module.LOCK}")
        deadline = time.monotonic() + 60
        while fsspec.filesystem("memory").cat_file(f"/bucket/stores/l3.zarr/{lock_module.LOCK}") == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lease_outlives_a_store_that_is_out_of_reach_for_a_moment(memory, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT", 0.01)
    lease = lock_module.acquire(place_of(f"{memory}/l3.zarr"))
    asked, read = [], lease._place.read

    def cut_off(key):
        asked.append(key)
        raise StoreError("no connection")

    monkeypatch.setattr(lease._place, "read", cut_off)
    deadline = time.monotonic() + 60
    while len(asked) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(lease._place, "read", read)
    lease.confirm()
    monkeypatch.setattr(lease._place, "read", cut_off)
    lease.release()
    assert not lease._thread.is_alive()


def test_no_credentials(s3_server, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"the object store refused .*; set credentials"):
        ActivationStore.open("s3://somewhere/l3.zarr")
    s3fs.S3FileSystem.clear_instance_cache()
