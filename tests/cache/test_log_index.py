"""A store with an index is the store without one; whatever happens to the index, the log is what counts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stores import grow_store, make_activations, make_block, make_manifest, make_store, write_rows
from tcsae.cache.format import log_index
from tcsae.cache.format.commit_log import LOG, fingerprint, latest, parse_log, rows_in
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.format.log_index import INDEX
from tcsae.cache.storage.open_place import place_of
from tcsae.cache.store import ActivationStore
from tcsae.cache.verify import verify
from tcsae.cache.writer import StoreSetWriter
from tcsae.errors import StoreError


@pytest.fixture(autouse=True)
def every_log_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_index, "WORTH_IT", 1)
    monkeypatch.setattr(log_index, "_BLOCK", 1500)  # a few lines at a time


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that grew: its last shard was replaced by a longer one."""
    path = make_store(tmp_path, rows=44)
    grow_store(path, 75)
    (path / INDEX).unlink(missing_ok=True)
    return path


def check_as_the_log(path: Path) -> ActivationStore:
    """Everything that an opened store says equals what every line of the log says."""
    opened, (commits, sound) = ActivationStore.open(path), parse_log((path / LOG).read_bytes())
    assert list(opened.commits) == commits
    assert [opened.commits[at] for at in range(len(commits))] == commits
    assert opened.commits[-1] == commits[-1]
    assert opened.commits[1:3] == commits[1:3]
    assert list(opened._latest) == latest(commits)
    assert opened.n_rows == rows_in(commits)
    assert opened.n_bytes == sum(file.bytes for commit in latest(commits) for file in commit.files.values())
    for rows in range(opened.n_rows + 1):
        assert opened.fingerprint(rows) == fingerprint(opened.manifest, commits, rows)
    assert opened.commits.sound == sound
    assert len(opened.rows(0, opened.n_rows)) == rows  # every chunk's hash is looked up
    return opened


def test_index_and_log_say_the_same(store: Path) -> None:
    check_as_the_log(store)
    made = (store / INDEX).read_bytes()
    check_as_the_log(store)
    assert (store / INDEX).read_bytes() == made
    assert not verify(store).findings


def test_what_was_added_since_is_read_from_the_log(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_as_the_log(store)
    made = (store / INDEX).read_bytes()
    monkeypatch.setattr(log_index, "WORTH_IT", (store / LOG).stat().st_size)
    grow_store(store, 120)
    check_as_the_log(store)
    assert (store / INDEX).read_bytes() == made
    monkeypatch.setattr(log_index, "WORTH_IT", 1)
    check_as_the_log(store)
    assert (store / INDEX).read_bytes() != made


def test_a_longer_log_extends_the_index(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_as_the_log(store)
    before = len(ActivationStore.open(store).commits)
    grow_store(store, 120)
    (store / INDEX).unlink()
    ActivationStore.open(store)
    whole = (store / INDEX).read_bytes()
    lines = (store / LOG).read_bytes().splitlines(keepends=True)
    short = store.parent / "short"
    shutil.copytree(store, short)
    (short / LOG).write_bytes(b"".join(lines[:before]))
    (short / INDEX).unlink()
    log_index.open_log(place_of(short))
    (short / LOG).write_bytes(b"".join(lines))
    parsed, real = [], log_index.parse_line
    monkeypatch.setattr(log_index, "parse_line", lambda line: (parsed.append(line), real(line))[1])
    log_index.open_log(place_of(short))
    assert (short / INDEX).read_bytes() == whole
    assert {*parsed} == {*lines[before - 1 :]}  # the last of the old ones, which the new ones must follow


def test_checking_a_store_writes_no_index(store: Path) -> None:
    assert verify(store).ok
    assert not (store / INDEX).exists()


def test_layers_that_a_crash_left_uneven_go_on_from_their_common_line(tmp_path: Path) -> None:
    block = make_block(75, 16)
    layouts = {layer: StoreLayout(8, 16, 4, 16) for layer in (3, 5)}
    bits = {layer: make_activations(block, 8, layer=layer) for layer in layouts}
    paths = {layer: tmp_path / f"l{layer}.zarr" for layer in layouts}
    manifests = {layer: make_manifest(layer=layer, layout=layouts[layer], planned_rows=75) for layer in layouts}
    with StoreSetWriter.open(paths, manifests) as writer:
        write_rows(writer, block.slice(0, 64), {layer: x[:64] for layer, x in bits.items()}, finish=False)
    whole = {layer: (path / LOG).read_bytes() for layer, path in paths.items()}
    lines = whole[5].splitlines(keepends=True)
    (paths[5] / LOG).write_bytes(b"".join(lines[:-1]) + lines[-1][:40])  # killed while it wrote its line
    with StoreSetWriter.open(paths, manifests) as writer:
        assert (writer.rows_committed, writer.next_shard, writer.kept_rows) == (48, 3, 0)
        assert (paths[5] / LOG).read_bytes() == b"".join(lines[:-1])
        assert (paths[3] / LOG).read_bytes() == b"".join(whole[3].splitlines(keepends=True)[:-1])


@pytest.mark.parametrize("part", ["first byte", "header", "lines", "last byte"])
def test_a_flipped_bit_anywhere_makes_it_anew(store: Path, part: str) -> None:
    check_as_the_log(store)
    made = bytearray((store / INDEX).read_bytes())
    at = {"first byte": 0, "header": 30, "lines": made.index(b"\n") + 9, "last byte": len(made) - 1}[part]
    damaged = bytearray(made)
    damaged[at] ^= 4
    (store / INDEX).write_bytes(damaged)
    check_as_the_log(store)
    if part != "last byte":  # which is looked at when it is needed
        assert (store / INDEX).read_bytes() == made


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_cut_index(store: Path, keep: int) -> None:
    check_as_the_log(store)
    made = (store / INDEX).read_bytes()
    (store / INDEX).write_bytes(made[:keep])
    check_as_the_log(store)
    assert (store / INDEX).read_bytes() == made


def test_of_another_log_or_of_a_longer_one(store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", rows=75, seed=5)
    check_as_the_log(other)
    (store / INDEX).write_bytes((other / INDEX).read_bytes())
    check_as_the_log(store)
    lines = (store / LOG).read_bytes().splitlines(keepends=True)
    check_as_the_log(store)
    (store / LOG).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(StoreError, match="damaged"):
        ActivationStore.open(store)


def test_a_changed_log_is_noticed_though_the_index_is_whole(store: Path) -> None:
    check_as_the_log(store)
    raw = bytearray((store / LOG).read_bytes())
    raw[20] ^= 1
    (store / LOG).write_bytes(raw)
    with pytest.raises(StoreError, match="is damaged: 0 of"):
        ActivationStore.open(store)


def test_a_log_that_changes_under_an_open_store(store: Path) -> None:
    opened = check_as_the_log(store)
    raw = bytearray((store / LOG).read_bytes())
    raw[20] ^= 1
    (store / LOG).write_bytes(raw)
    with pytest.raises(StoreError, match="has changed since it was opened"):
        opened.commits[0]


def test_where_nothing_can_be_written(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(type(place_of(store)), "replace", refuse)
    check_as_the_log(store)
    assert not (store / INDEX).exists()


def test_killed_while_it_is_written(store: Path) -> None:
    """A part of the file, under another name, is all that a kill leaves."""
    code = f"""
import os, signal
from tcsae.cache.format import log_index
from tcsae.cache.storage import local
from tcsae.cache.store import ActivationStore
log_index.WORTH_IT = 1
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
ActivationStore.open({str(store)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (store / INDEX).exists()
    check_as_the_log(store)
    assert (store / INDEX).exists()
