"""What is written whole is written durably, and what goes wrong is one sentence without half a file left behind."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from tcsae.errors import ResourceError, RunError
from tcsae.system.atomic_files import make_folder, remove_partials, write_file, write_json


def test_bytes_text_json_and_writers_are_written_in_new_folders(tmp_path):
    write_file(tmp_path / "a/b/bytes", b"\x00\xff")
    write_file(tmp_path / "a/text", "λ2 → 0\n")
    write_file(tmp_path / "a/written", lambda file: torch.save({"x": torch.ones(2)}, file))
    write_json(tmp_path / "a/json", {"λ": [1, None]}, ascii_only=False)
    assert (tmp_path / "a/b/bytes").read_bytes() == b"\x00\xff"
    assert (tmp_path / "a/text").read_bytes() == "λ2 → 0\n".encode()
    assert torch.equal(torch.load(tmp_path / "a/written", weights_only=True)["x"], torch.ones(2))
    assert (tmp_path / "a/json").read_text(encoding="utf-8") == '{\n  "λ": [\n    1,\n    null\n  ]\n}\n'
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b", "json", "text", "written"]


def test_the_file_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append(f"rename to {new}"), replace(old, new)))
    write_file(tmp_path / "new/file", "x")
    assert seen[0] == str(tmp_path)  # the new folder's name
    assert seen[1].startswith(str(tmp_path / "new/file."))
    assert seen[2:] == [f"rename to {tmp_path / 'new/file'}", str(tmp_path / "new")]


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    write_file(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "file", lambda file: (file.write(b"new"), 1 / 0))
    with pytest.raises(ValueError):
        write_json(tmp_path / "file", {"x": float("nan")})
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"x" * 100_000, lambda file: torch.save(torch.zeros(50_000), file)])
def test_a_full_disk_is_one_sentence_whoever_writes(tmp_path, content):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"the disk is full: cannot write .*file .*; free some space"):
            write_file(tmp_path / "file", content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    write_file(tmp_path / "file", content)


def test_what_cannot_be_written_is_one_sentence_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a file and a folder go by the same name"):
        write_file(tmp_path / "file/inside", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="a file and a folder go by the same name"):
        write_file(tmp_path / "folder", "x")
    with pytest.raises(RunError, match="choose a shorter name"):
        write_file(tmp_path / ("x" * 300), "x")
    with pytest.raises(RunError, match="choose a shorter name"):
        make_folder(tmp_path / ("x" * 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "file.0a1b2c3d.partial").write_text("half")
    (tmp_path / "file").write_text("whole")
    remove_partials(tmp_path, older_than=1000)
    assert len(list(tmp_path.iterdir())) == 2
    remove_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
