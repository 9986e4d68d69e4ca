"""Every way a store can be wrong is one sentence that names the file and the remedy."""

import json
import os
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
from stores import make_activations, make_block, make_manifest, make_store, write_rows
from tcsae.cache.format.commit_log import LOG
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.format.manifest import checksum, read_manifest
from tcsae.cache.storage.open_place import place_of
from tcsae.cache.store import ActivationStore
from tcsae.cache.verify import verify
from tcsae.cache.writer import StoreSetWriter
from tcsae.errors import ResourceError, StoreError

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
not_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def edit(path, change):
    document = json.loads((path / "zarr.json").read_bytes())
    change(document)
    (path / "zarr.json").write_text(json.dumps(document))


def newer(document):
    document["attributes"]["tcsae"]["format_version"] = 2


def renamed_field(document):
    record = document["attributes"]["tcsae"]
    record["modle"] = record.pop("model")
    document["attributes"]["tcsae_check"] = checksum(record)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (newer, "format version 2, this tcsae reads up to 1: upgrade"),
        (renamed_field, "damaged at model"),
        (lambda d: d["attributes"].pop("tcsae"), "not an activation store"),
        (lambda d: d.pop("attributes"), "not an activation store"),
        (lambda d: d["attributes"]["tcsae"].update(layer=4), "its checksum does not fit"),
    ],
)
def test_manifests(tmp_path, change, sentence):
    path = make_store(tmp_path, rows=20)
    edit(path, change)
    for look in (read_manifest, ActivationStore.open, verify):
        with pytest.raises(StoreError, match=sentence):
            look(path)


def test_no_store_at_all(tmp_path):
    with pytest.raises(StoreError, match=r"no store at .*`pipeline extract` writes one"):
        ActivationStore.open(tmp_path / "nowhere.zarr")
    with pytest.raises(StoreError, match=r"no zarr\.json"):
        ActivationStore.open(tmp_path)
    path = make_store(tmp_path, rows=20)
    (path / "zarr.json").write_bytes(b"{")
    with pytest.raises(StoreError, match="no JSON"):
        ActivationStore.open(path)


def test_still_being_written(tmp_path):
    path = make_store(tmp_path, rows=40, finish=False)
    with pytest.raises(StoreError, match="holds 40 of 40 rows, not finished: finish it with the same extract command"):
        ActivationStore.open(path)
    assert ActivationStore.open(path, allow_unfinished=True).n_rows == 40


@pytest.mark.parametrize(
    "change", [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b.replace(b'"rows":16', b'"rows":61')]
)
def test_a_finished_store_with_a_damaged_log(tmp_path, change):
    path = make_store(tmp_path, rows=40)
    (path / LOG).write_bytes(change((path / LOG).read_bytes()))
    with pytest.raises(StoreError, match=r"commits.jsonl is damaged: \d+ of 40 rows"):
        ActivationStore.open(path)
    (path / LOG).unlink()
    with pytest.raises(StoreError, match=r"commits.jsonl is missing"):
        ActivationStore.open(path)


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("break_it", ["missing", "truncated", "empty", "flipped", "longer"])
def test_shards(tmp_path, compression, break_it):
    path = make_store(tmp_path, rows=40, compression=compression)
    for name in ("activations/c.1.0.0", "tokens/c.1.0"):
        shutil.copytree(path, tmp_path / "copy", dirs_exist_ok=True)
        file = tmp_path / "copy" / name
        data = bytearray(file.read_bytes())
        if break_it == "missing":
            file.unlink()
        elif break_it == "flipped":
            data[len(data) // 3] ^= 4
            file.write_bytes(data)
        else:
            file.write_bytes({"truncated": data[:-5], "empty": b"", "longer": bytes(data) + b"\0"}[break_it])
        store = ActivationStore.open(tmp_path / "copy")
        read = (lambda: store.rows(16, 32)) if "activations" in name else (lambda: store.tokens(16, 32))  # noqa: B023
        with pytest.raises(StoreError, match=f"{name} is {'missing' if break_it == 'missing' else 'damaged'}"):
            read()
        assert [finding.file for finding in verify(tmp_path / "copy").findings] == [name]
        store.rows(0, 16)  # the other shards are as good as ever
        store.tokens(32, 40)


def test_rows_out_of_range(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=40))
    for ask in (
        lambda: store.rows(30, 41),
        lambda: store.tokens(-1, 3),
        lambda: store.read_chunks([10]),
        lambda: store.fingerprint(41),
    ):
        with pytest.raises(StoreError, match="holds"):
            ask()


def test_a_bad_output_buffer(tmp_path):
    store = ActivationStore.open(make_store(tmp_path, rows=40))
    for out in (
        torch.empty(4, 16, 8),
        torch.empty(3, 16, 8, dtype=torch.bfloat16),
        torch.empty(8, 16, 8, dtype=torch.bfloat16)[::2],
    ):
        with pytest.raises(ValueError, match="it must be contiguous bfloat16"):
            store.read_chunks([0], out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no mounting here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a process started by another test may still look at it


@root_only
def test_the_disk_fills_up_in_the_middle_of_a_shard(small_disk, monkeypatch):
    from tcsae.cache import resume

    layout = StoreLayout(d_model=64, context=16, chunk_rows=16, shard_rows=256)  # 0.5 MB a shard
    rows = 4 * 256
    block = make_block(rows, 16)
    bits = {3: make_activations(block, 64)}
    paths, about = {3: small_disk / "l3.zarr"}, {3: make_manifest(layout=layout, planned_rows=rows)}
    with pytest.raises(ResourceError, match=r"more are needed \(\d,\d{3},\d{3} bytes"):
        StoreSetWriter.open(paths, about)
    # Another program fills the disk after our look at it.
    monkeypatch.setattr(resume, "check_space", lambda *_: None)
    monkeypatch.setattr("tcsae.cache.writer.check_space", lambda *_: None)
    with pytest.raises(ResourceError, match="the disk is full"), StoreSetWriter.open(paths, about) as writer:
        write_rows(writer, block, bits, step=64)
    assert not list(small_disk.rglob("*.partial"))
    before = writer.rows_committed
    assert 0 < before < rows
    np.testing.assert_array_equal(
        ActivationStore.open(paths[3], allow_unfinished=True).rows(0, before).view(torch.uint16).numpy(),
        bits[3][:before],
    )
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    with StoreSetWriter.open(paths, about) as writer:
        assert writer.rows_committed == before
        write_rows(writer, block, bits)
    assert verify(paths[3]).ok


@root_only
def test_a_read_only_file_system_can_be_read_and_measured_but_not_written(small_disk):
    path = make_store(small_disk, rows=40)
    partial = make_store(small_disk, layer=4, rows=40, finish=False)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for target in ({3: small_disk / "new.zarr"}, {4: partial}):
        layer = next(iter(target))
        with pytest.raises(StoreError, match=r"Read-only file system; make it accessible .* or choose another place"):
            StoreSetWriter.open(target, {layer: make_manifest(layer=layer, planned_rows=40)})
    store = ActivationStore.open(path)
    assert store.statistics().rows == 40
    assert verify(path).ok


@not_root
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        StoreSetWriter.open({3: tmp_path / "l3.zarr"}, {3: make_manifest()})


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", forbidden)
    with pytest.raises(StoreError, match=r"cannot create .*l3.zarr.*: Permission denied; make it accessible"):
        StoreSetWriter.open({3: tmp_path / "l3.zarr"}, {3: make_manifest()})


def test_unknown_protocols_and_missing_packages(monkeypatch):
    with pytest.raises(StoreError, match="nonsense://bucket cannot be opened"):
        ActivationStore.open("nonsense://bucket")

    def missing(*_, **__):
        raise ImportError("no s3fs")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(StoreError, match=r"s3://bucket/l3.zarr needs s3fs, which is not installed: pip install s3fs"):
        ActivationStore.open("s3://bucket/l3.zarr")


def test_missing_credentials(monkeypatch):
    class NoCredentialsError(Exception):
        pass

    class Locked:
        def cat_file(self, *_, **__):
            raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr("fsspec.core.url_to_fs", lambda *_, **__: (Locked(), "bucket/l3.zarr"))
    with pytest.raises(
        StoreError, match=r"the object store refused .*; set credentials for it, such as AWS_ACCESS_KEY_ID"
    ):
        ActivationStore.open("s3://bucket/l3.zarr")


def test_a_lock_left_by_a_dead_process_is_no_obstacle(tmp_path):
    path = make_store(tmp_path, rows=20, finish=False)
    (path / "activations/writer.lock").write_text('{"pid": 1, "host": "elsewhere"}')
    with StoreSetWriter.open({3: path}, {3: make_manifest(planned_rows=20)}) as writer:
        writer.finish()
    assert verify(path).ok


def test_readers_see_only_whole_rows_while_a_writer_writes(tmp_path):
    block = make_block(160, 16)
    bits = {3: make_activations(block, 8)}
    path, wrong, done = tmp_path / "l3.zarr", [], threading.Event()

    def read():
        while not done.is_set():
            try:
                store = ActivationStore.open(path, allow_unfinished=True)
            except StoreError:
                continue
            found = store.rows(0, store.n_rows).view(torch.uint16).numpy()
            if not np.array_equal(found, bits[3][: store.n_rows]):
                wrong.append(store.n_rows)

    reader = threading.Thread(target=read)
    with StoreSetWriter.open({3: path}, {3: make_manifest(planned_rows=160)}) as writer:
        reader.start()
        write_rows(writer, block, bits)
    done.set()
    reader.join()
    assert not wrong


def test_local_urls_are_folders(tmp_path):
    path = make_store(tmp_path, rows=20)
    assert place_of(f"file://{path}").local
    assert ActivationStore.open(f"file://{path}").n_rows == 20


@pytest.mark.parametrize("name", ["zarr.json", LOG])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, name):
    path = make_store(tmp_path)
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with pytest.raises(StoreError, match="is a FIFO and no regular file: restore it"):
        ActivationStore.open(path)
