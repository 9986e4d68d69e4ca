"""Writing sets of stores: what comes back, what is refused, how a store grows, and what a full disk leaves."""

import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import (
    LAYOUT,
    bits_of,
    content,
    make_activations,
    make_block,
    make_manifest,
    make_store,
    make_stores,
    manifests,
    pieces,
    write_all,
    write_rows,
)
from tcsae.cache.format.commit_log import LOG, parse_log
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.format.manifest import Execution, read_manifest
from tcsae.cache.format.shard_writer import ShardSetWriter, write_shard
from tcsae.cache.storage import local
from tcsae.cache.storage.open_place import place_of
from tcsae.cache.store import ActivationStore
from tcsae.cache.verify import verify
from tcsae.cache.writer import StoreSetWriter
from tcsae.errors import ResourceError, StoreError


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_the_sizes_what_was_written_is_read(tmp_path_factory, data):
    context, d_model = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    chunk, per_shard = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    rows, step = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 7))
    compression = data.draw(st.sampled_from(["none", "lz4", "zstd"]))
    folder = tmp_path_factory.mktemp("sizes")
    paths = make_stores(
        folder, [1, 2], rows=rows, context=context, d_model=d_model, chunk_rows=chunk,
        shard_rows=chunk * per_shard, step=step, compression=compression,
    )  # fmt: skip
    block = make_block(rows, context)
    for layer, path in paths.items():
        store, wanted = ActivationStore.open(path), make_activations(block, d_model, layer=layer)
        start = data.draw(st.integers(0, rows))
        stop = data.draw(st.integers(start, rows))
        np.testing.assert_array_equal(bits_of(store, start, stop), wanted[start:stop])
        np.testing.assert_array_equal(store.tokens(start, stop), block.tokens_BT[start:stop])
        np.testing.assert_array_equal(store.documents(start, stop), block.documents_BT[start:stop])
        np.testing.assert_array_equal(store.flags(start, stop), block.flags_BT[start:stop])
        assert verify(path).ok


def test_an_interrupted_store_resumes_to_the_same_bytes(tmp_path):
    whole = make_stores(tmp_path / "whole", [3, 5], rows=61)
    block = make_block(61, 16)
    bits = {n: make_activations(block, 8, layer=n) for n in (3, 5)}
    paths = {n: tmp_path / "torn" / f"l{n}.zarr" for n in (3, 5)}

    def interrupted():
        with StoreSetWriter.open(paths, manifests((3, 5), 61)) as writer:
            for part, x in pieces(block, bits, 0, 16, 4):
                writer.append(part, x)
            writer.commit({"row": 16})
            for part, x in pieces(block, bits, 16, 24, 4):
                writer.append(part, x)
            writer.drain()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list((tmp_path / "torn").rglob("*.partial"))
    with StoreSetWriter.open(paths, manifests((3, 5), 61)) as writer:
        assert (writer.rows_committed, writer.next_shard, writer.cursor) == (16, 1, {"row": 16})
        write_rows(writer, block, bits, step=5)
    for layer, path in paths.items():
        assert content(path) == content(whole[layer])


def test_a_finished_store_is_left_alone(tmp_path):
    paths = make_stores(tmp_path, rows=61)
    before = content(paths[3])
    with StoreSetWriter.open(paths, manifests((3,), 40)) as writer:
        assert (writer.rows_stored, writer.rows_committed, writer.kept_rows) == (61, 61, 0)
        writer.finish()
    assert content(paths[3]) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_id": "other"}, "model.id: store has 'tiny', you asked for 'other'"),
        ({"packing": "concat"}, "text.packing: store has 'document', you asked for 'concat'"),
        ({"layout": StoreLayout(8, 16, 4, 16, "lz4")}, "compression"),
        ({"layout": StoreLayout(8, 12, 4, 16)}, "text.context: store has 16, you asked for 12"),
        ({"layout": StoreLayout(9, 16, 4, 16)}, "d_model: store has 8, you asked for 9"),
    ],
)
def test_another_identity_is_refused_by_name(tmp_path, change, sentence):
    paths = make_stores(tmp_path, rows=20)
    before = content(paths[3])
    with pytest.raises(StoreError, match=sentence):
        StoreSetWriter.open(paths, {3: make_manifest(planned_rows=20, **change)})
    assert content(paths[3]) == before


def test_fresh_begins_anew_but_never_in_a_strangers_folder(tmp_path):
    paths = make_stores(tmp_path, rows=20)
    with StoreSetWriter.open(paths, manifests((3,), 4, model_id="other"), fresh=True) as writer:
        assert writer.rows_stored == 0
    assert read_manifest(paths[3]).model.id == "other"
    stranger = tmp_path / "home"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(StoreError, match="other things"):
            StoreSetWriter.open({3: stranger}, manifests((3,), 4), fresh=fresh)
    assert content(stranger) == {"thesis.tex": b"years of work"}


def test_a_shard_of_another_store_is_not_taken_for_its_own(tmp_path):
    path, other = make_store(tmp_path / "a", rows=40), make_store(tmp_path / "b", rows=40, seed=1)
    (path / "activations/c.1.0.0").write_bytes((other / "activations/c.1.0.0").read_bytes())
    with pytest.raises(StoreError, match=r"c.1.0.0 is damaged: its bytes are not those that were committed"):
        ActivationStore.open(path).rows(16, 32)


def test_two_writers(tmp_path):
    paths = make_stores(tmp_path, [3, 5], rows=20, finish=False)
    with StoreSetWriter.open(paths, manifests((3, 5), 20)):
        with pytest.raises(StoreError, match=f"another writer holds .* \\(process {os.getpid()} on "):
            StoreSetWriter.open({5: paths[5]}, manifests((5,), 20))
        with pytest.raises(StoreError, match="another writer"):
            StoreSetWriter.open({5: paths[5]}, manifests((5,), 20), fresh=True)
    with StoreSetWriter.open(paths, manifests((3, 5), 20)) as writer:
        assert writer.rows_stored == 20
    assert not list(tmp_path.rglob("*.lock"))


def test_the_whole_plan_must_fit_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: type("usage", (), {"free": 100_000_000})())
    rows = 40_000_000 // (16 * 16 * 8)
    paths = {n: tmp_path / f"l{n}.zarr" for n in (3, 5, 7)}
    with pytest.raises(ResourceError, match=r"\d{3},\d{3},\d{3} bytes .*× 3 layers\) and 100 MB are free"):
        StoreSetWriter.open(paths, manifests(paths, 100 * rows))
    with StoreSetWriter.open({3: tmp_path / "small.zarr"}, manifests((3,), 60)):
        pass


def test_a_disk_that_fills_up_keeps_what_was_committed(tmp_path, monkeypatch):
    block = make_block(64, 16)
    bits = {3: make_activations(block, 8)}
    paths = {3: tmp_path / "l3.zarr"}
    free = iter([10**9, 10**9, 10**9])
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: type("usage", (), {"free": next(free, 1000)})())
    with pytest.raises(ResourceError, match="1 kB are free"), StoreSetWriter.open(paths, manifests((3,), 64)) as writer:
        write_rows(writer, block, bits)
    monkeypatch.undo()
    with StoreSetWriter.open(paths, manifests((3,), 64)) as writer:
        assert writer.rows_committed == 32
        write_rows(writer, block, bits)
    assert verify(paths[3]).ok


def test_rows_in_the_wrong_place_are_a_programming_error(tmp_path):
    block, layout = make_block(20, 16), LAYOUT
    bits = make_activations(block, 8)
    with StoreSetWriter.open({3: tmp_path / "l3.zarr"}, manifests((3,), 64)) as writer:
        with pytest.raises(ValueError, match="do not fit into the shard"):
            writer.append(block, {3: bits})
        writer.append(block.slice(0, 5), {3: bits[:5]})
        with pytest.raises(ValueError, match="before finish"):
            writer.finish()
        writer.commit({})
        with pytest.raises(ValueError, match="short shard"):
            writer.append(block.slice(5, 6), {3: bits[5:6]})
    with pytest.raises(ValueError, match="takes uint16"):
        write_all({3: tmp_path / "b"}, block, {3: bits[:, :, : layout.d_model - 1]})


def test_a_shard_begun_anew_records_how(tmp_path):
    block = make_block(32, 16)
    bits = {3: make_activations(block, 8)}
    paths = {3: tmp_path / "l3.zarr"}
    smaller = Execution(batch_size=2, threads=1, device="cpu", device_name="imaginary")
    with StoreSetWriter.open(paths, manifests((3,), 32)) as writer:
        writer.append(block.slice(0, 16), {3: bits[3][:16]})
        writer.commit({"row": 16})
        writer.append(block.slice(20, 29), {3: bits[3][20:29]})
        writer.restart_shard(smaller)
        assert (writer.rows_committed, writer.cursor) == (16, {"row": 16})
        write_rows(writer, block, bits)
    commits, _ = parse_log((paths[3] / LOG).read_bytes())
    assert [commit.execution for commit in commits] == [None, smaller.model_dump()]
    np.testing.assert_array_equal(bits_of(ActivationStore.open(paths[3])), bits[3])
    with StoreSetWriter.open(paths, manifests((3,), 32)) as writer:
        assert writer.execution == smaller


def test_shards_written_by_workers_in_any_order_make_the_same_store(tmp_path):
    whole = make_stores(tmp_path / "whole", [3, 5], rows=61)
    block = make_block(61, 16)
    bits = {n: make_activations(block, 8, layer=n) for n in (3, 5)}
    paths = {n: tmp_path / "parts" / f"l{n}.zarr" for n in (3, 5)}
    with StoreSetWriter.open(paths, manifests((3, 5), 61)) as writer:
        writer.begin()
        records = {}
        for shard in (2, 0, 3, 1):
            rows = LAYOUT.rows_of(shard, 61)
            records[shard] = write_shard(
                paths, {3: LAYOUT, 5: LAYOUT}, shard, pieces(block, bits, rows.start, rows.stop, 5)
            )
        with pytest.raises(StoreError, match="go on with shard 0"):
            writer.commit_records([records[1]], {})
        for shard in range(4):
            writer.commit_records([records[shard]], {"row": LAYOUT.rows_of(shard, 61).stop})
        writer.finish()
    for layer, path in paths.items():
        assert content(path) == content(whole[layer])


def test_a_log_torn_by_a_crash_is_cut_and_one_damaged_inside_is_refused(tmp_path):
    paths = make_stores(tmp_path, [3, 5], rows=64, finish=False)
    log = paths[5] / LOG
    good = log.read_bytes()
    log.write_bytes(good[:-7])
    with StoreSetWriter.open(paths, manifests((3, 5), 64)) as writer:
        assert writer.rows_committed == 48
    assert not (paths[3] / "activations/c.3.0.0").exists()
    lines = good.splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[1].replace(b'"rows":16', b'"rows":15') + lines[2])
    with pytest.raises(StoreError, match="damaged at line 2"):
        StoreSetWriter.open(paths, manifests((3, 5), 64))


@pytest.mark.parametrize("break_it", ["missing", "truncated"])
def test_resuming_over_lost_shards_is_refused(tmp_path, break_it):
    paths = make_stores(tmp_path, rows=64, finish=False)
    shard = paths[3] / "activations/c.1.0.0"
    if break_it == "missing":
        shard.unlink()
    else:
        os.truncate(shard, 100)
    with pytest.raises(StoreError, match=r"c.1.0.0 (is missing|has 100 bytes)"):
        StoreSetWriter.open(paths, manifests((3,), 64))


def test_shapes_follow_the_log_after_a_crash_between_them(tmp_path):
    paths = make_stores(tmp_path, rows=64, finish=False)
    document = paths[3] / "tokens/zarr.json"
    stale = json.loads(document.read_bytes())
    stale["shape"][0] = 48
    document.write_text(json.dumps(stale))
    with StoreSetWriter.open(paths, manifests((3,), 64)) as writer:
        writer.finish()
    assert verify(paths[3]).ok


def test_the_forward_pass_waits_only_when_too_much_is_queued(tmp_path, monkeypatch):
    from tcsae.cache import writer as module

    block = make_block(16, 16)
    bits = {3: make_activations(block, 8)}
    monkeypatch.setattr(module, "_QUEUE_BYTES", bits[3].nbytes // 4)
    with StoreSetWriter.open({3: tmp_path / "l3.zarr"}, manifests((3,), 16)) as writer:
        write_rows(writer, block, bits, step=2)
        assert writer.seconds_blocked > 0
        assert writer.bytes_written == sum(
            f.bytes for c in ActivationStore.open(tmp_path / "l3.zarr").commits for f in c.files.values()
        )


def test_two_workers_on_one_shard_never_write_into_one_file(tmp_path):
    """Dask gives the shard of a silent worker to another while the first still writes; what a dead one leaves is
    removed.
    """
    paths, block = {3: tmp_path / "l3.zarr"}, make_block(16, 16)
    bits = {3: make_activations(block, 8)}
    with StoreSetWriter.open(paths, manifests((3,), 16)) as writer:
        writer.begin()
        places, layouts = {3: place_of(paths[3])}, {3: LAYOUT}
        silent, dead = ShardSetWriter(places, layouts, 0), ShardSetWriter(places, layouts, 0)
        for part, x in pieces(block, bits, 0, 8, 4):
            silent.append(part, x)
            dead.append(part, x)
        record = write_shard(paths, layouts, 0, pieces(block, bits, 0, 16, 4))
        with silent:
            for part, x in pieces(block, bits, 8, 16, 4):
                silent.append(part, x)
            assert silent.commit() == record
        assert len(list(paths[3].rglob("*.partial"))) == 1
        writer.commit_records([record], {"row": 16})
        writer.finish()
        assert not list(paths[3].rglob("*.partial"))
        with dead:  # it lives after all: what it does now hurts nobody
            pass
    assert verify(paths[3]).ok
    np.testing.assert_array_equal(bits_of(ActivationStore.open(paths[3])), bits[3])


def test_leftovers_are_removed_on_resume_but_nobody_elses(tmp_path):
    paths = make_stores(tmp_path, rows=20, finish=False)
    ours = [
        paths[3] / name
        for name in ("zarr.json.0f.partial", "activations/c.2.0.0.a1.partial", "tokens/c.2.0.b2.partial")
    ]
    for path in ours:
        path.write_bytes(b"torn")
    with StoreSetWriter.open(paths, manifests((3,), 20)):
        assert not any(path.exists() for path in ours)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "film.partial").write_bytes(b"half")
    with pytest.raises(StoreError, match="other things"):
        StoreSetWriter.open({3: tmp_path / "downloads"}, manifests((3,), 4), fresh=True)
    with pytest.raises(StoreError, match="a file lies where a folder should be"):
        StoreSetWriter.open({3: tmp_path / "downloads" / "film.partial" / "l3.zarr"}, manifests((3,), 4))


def test_writeback_begins_while_a_file_is_written(tmp_path, monkeypatch):
    """Every byte but the last few is given to the kernel once, before the fsync; the file is none the worse."""
    asked = []
    monkeypatch.setattr(local, "_WRITEBACK_BYTES", 100)
    monkeypatch.setattr(local, "start_writeback", lambda fd, offset, length: asked.append((offset, length)))
    sink = place_of(tmp_path).create("file")
    for size in (60, 60, 10, 250, 30):
        sink.write([bytes([size]) * size, b"tail"])
    assert [path.suffix for path in tmp_path.iterdir()] == [local.PARTIAL]
    sink.commit()
    assert asked == [(0, 128), (128, 268)]
    assert (tmp_path / "file").read_bytes() == b"".join(
        bytes([size]) * size + b"tail" for size in (60, 60, 10, 250, 30)
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the advice means this on Linux only")
def test_starting_writeback_keeps_the_bytes(tmp_path, monkeypatch):
    real, asked = os.posix_fadvise, []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *advice: asked.append(advice) or real(fd, *advice))
    with open(tmp_path / "file", "wb+", buffering=0) as file:
        file.write(b"x" * 10_000)
        local.start_writeback(file.fileno(), 100, 9_000)
        assert os.pread(file.fileno(), 10_000, 0) == b"x" * 10_000
    assert asked == [(100, 9_000, os.POSIX_FADV_DONTNEED)]
