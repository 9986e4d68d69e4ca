"""Chunks that were read from object storage are kept within a bound, checked, and shared by processes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from stores import make_store
from tcsae.cache.storage import local_cache
from tcsae.cache.storage.local_cache import ChunkFiles, LocalCache
from tcsae.cache.storage.remote import RemotePlace
from tcsae.cache.store import ActivationStore
from tcsae.errors import StoreError, UsageError
from xxhash import xxh3_64_hexdigest

ROWS = 96


@pytest.fixture
def url(memory, tmp_path):
    """A finished store on object storage."""
    import fsspec

    folder = make_store(tmp_path / "here", rows=ROWS)
    fs, root = fsspec.core.url_to_fs(memory)
    for path in files_of(folder):
        fs.pipe_file(f"{root}/far.zarr/{path.relative_to(folder)}", path.read_bytes())
    return f"{memory}/far.zarr"


@pytest.fixture
def reads(monkeypatch):
    """Bytes of every ranged read from afar."""
    found, real = [], RemotePlace.read_into

    def read_into(self, key, offset, buffers):
        found.append((key, offset))
        return real(self, key, offset, buffers)

    monkeypatch.setattr(RemotePlace, "read_into", read_into)
    return found


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def held(folder):
    return sum(path.stat().st_size for path in files_of(folder))


def test_what_was_read_once_comes_from_the_disk(url, tmp_path, reads):
    cache = LocalCache(10**8, str(tmp_path / "kept"))
    plain = ActivationStore.open(url)
    expected = plain.read_chunks(range(plain.n_chunks)).clone()
    reads.clear()
    assert torch.equal(ActivationStore.open(url, cache=cache).read_chunks(range(plain.n_chunks)), expected)
    first, hashed = len(reads), len(files_of(tmp_path / "kept"))
    assert hashed == plain.n_chunks
    reads.clear()
    again = ActivationStore.open(url, cache=cache)  # of another process, say
    assert torch.equal(again.read_chunks(range(plain.n_chunks)), expected)
    assert len(reads) == first - hashed  # the index of every shard


@pytest.mark.parametrize("damage", ["altered", "cut short"])
def test_a_damaged_file_is_read_from_afar_again(url, tmp_path, damage):
    cache = LocalCache(10**8, str(tmp_path / "kept"))
    store = ActivationStore.open(url, cache=cache)
    expected = store.read_chunks([0]).clone()
    (file,) = files_of(tmp_path / "kept")
    sound = file.read_bytes()
    file.write_bytes(bytes([sound[0] ^ 1]) + sound[1:] if damage == "altered" else sound[:-1])
    assert torch.equal(store.read_chunks([0]), expected)
    assert file.read_bytes() == sound


def test_damage_far_away_is_not_kept(url, tmp_path):
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    store = ActivationStore.open(url, cache=LocalCache(10**8, str(tmp_path / "kept")))
    name = f"{root}/activations/c.0.0.0"
    data = bytearray(fs.cat_file(name))
    data[10] ^= 1
    fs.pipe_file(name, bytes(data))
    with pytest.raises(StoreError, match="its bytes are not those that were committed"):
        store.read_chunks([0])
    assert not files_of(tmp_path / "kept")


def chunk(number, size=1000):
    data = np.full(size, number % 251, np.uint8)
    return data, xxh3_64_hexdigest(data)


def test_the_folder_stays_within_its_limit_and_drops_what_was_used_longest_ago(tmp_path):
    kept = ChunkFiles(LocalCache(32_000, str(tmp_path)), "s3://bucket/store")
    old = tmp_path / "used"
    for number in range(200):
        data, xxh3 = chunk(number)
        kept.keep("c", number, data, xxh3)
        assert held(tmp_path) <= 32_000
        for path in files_of(tmp_path):  # files that were written within one tick of the clock have an order, too
            if path.stat().st_mtime > 10**6:
                os.utime(path, (number, number))
        if number >= 1:  # the first chunk is read again and again
            data, xxh3 = chunk(0)
            assert kept.read("c", 0, np.empty_like(data), xxh3), number
            for path in files_of(tmp_path):
                if path.stat().st_mtime > 10**6:
                    os.utime(path, (number, number))
    there = [number for number in range(200) if kept.read("c", number, np.empty(1000, np.uint8), chunk(number)[1])]
    assert there[0] == 0
    assert there[1:] == list(range(200 - len(there) + 1, 200))
    assert len(there) >= 24
    assert not old.exists()


def test_a_smaller_limit_empties_a_folder_that_is_there(tmp_path):
    large = ChunkFiles(LocalCache(10**6, str(tmp_path)), "here")
    for number in range(100):
        large.keep("c", number, *chunk(number))
    assert held(tmp_path) == 100_000
    ChunkFiles(LocalCache(32_000, str(tmp_path)), "here")
    assert held(tmp_path) <= 24_000


def test_what_a_killed_process_left_is_removed_in_time(tmp_path, monkeypatch):
    kept = ChunkFiles(LocalCache(10**6, str(tmp_path)), "here")
    kept.keep("c", 0, *chunk(0))
    (file,) = files_of(tmp_path)
    for name, age in (("new", 0), ("old", 2 * local_cache._ABANDONED)):
        partial = file.with_name(f"{name}.partial")
        partial.write_bytes(b"half")
        os.utime(partial, (file.stat().st_mtime - age,) * 2)
    ChunkFiles(LocalCache(10**6, str(tmp_path)), "here")
    assert {path.name for path in files_of(tmp_path)} == {file.name, "new.partial"}


def test_a_full_disk_is_said_once_and_reading_goes_on(url, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    expected = ActivationStore.open(url).rows(0, ROWS)
    store = ActivationStore.open(url, cache=LocalCache(10**8, str(tmp_path / "kept")))
    monkeypatch.setattr(local_cache.os, "replace", full)
    assert torch.equal(store.rows(0, ROWS), expected)
    assert capsys.readouterr().err.count("nothing more can be kept") == 1
    assert not files_of(tmp_path / "kept")


def test_a_cache_without_room_for_chunks_is_refused(url, tmp_path):
    with pytest.raises(UsageError, match=r"is too small for .*whose chunks have .*: give at least"):
        ActivationStore.open(url, cache=LocalCache(5000, str(tmp_path / "kept")))
    with pytest.raises(UsageError, match="keeps nothing"):
        LocalCache(0)


_SHARE = """
import sys
import numpy as np
from xxhash import xxh3_64_hexdigest
from tcsae.cache.storage.local_cache import ChunkFiles, LocalCache
kept, draw = ChunkFiles(LocalCache(64_000, sys.argv[1]), "s3://bucket/store"), np.random.default_rng(int(sys.argv[2]))
hits = 0
for number in draw.integers(0, 90, 3000).tolist():
    data = np.full(1000, number, np.uint8)
    xxh3, found = xxh3_64_hexdigest(data), np.empty(1000, np.uint8)
    if kept.read("c", number, found, xxh3):
        assert (found == data).all()
        hits += 1
    else:
        kept.keep("c", number, data, xxh3)
print(hits)
"""


def test_two_processes_share_a_folder(tmp_path):
    command = [sys.executable, "-c", _SHARE, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(seed)], **pipes) for seed in (0, 1)]
    most = 0
    while any(process.poll() is None for process in both):
        most = max(most, held_now(tmp_path))
    for process in both:
        said, problem = process.communicate()
        assert process.returncode == 0, problem
        assert int(said) > 1000
    assert most <= 64_000
    assert held(tmp_path) <= 64_000


def held_now(folder):
    """While files come and go."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
