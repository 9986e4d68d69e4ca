"""States of the untouched model between evaluations: whole, within bounds, and never believed unread."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from tcsae.console import speaking
from tcsae.evaluate.config import STATES_FOLDER
from tcsae.evaluate.model.kept_states import KeptStates
from tcsae.system import atomic_files

CPU = torch.device("cpu")
ROWS = slice(16, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_read_is_what_was_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    kept = KeptStates(tmp_path / STATES_FOLDER)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(4, 3, 5, generator=generator).to(dtype) for name in ("final", "l1.mlp_out")}
    assert kept.get(ROWS, ["final"], CPU) is None
    kept.put(ROWS, {name: tensor.transpose(0, 1) for name, tensor in tensors.items()})  # not contiguous
    found = KeptStates(tmp_path / STATES_FOLDER).get(ROWS, list(tensors), CPU)
    assert found is not None
    assert all(torch.equal(found[name], tensor.transpose(0, 1)) for name, tensor in tensors.items())
    assert kept.get(slice(0, 16), ["final"], CPU) is None, "another batch"
    assert kept.get(ROWS, ["final", "l2"], CPU) is None, "all, or none"


@pytest.mark.parametrize("at", [0, 8, 60, -1])
def test_a_flipped_bit_is_noticed_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], at: int) -> None:
    kept = KeptStates(tmp_path)
    kept.put(ROWS, {"final": torch.ones(2, 3)})
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(bytes(content))
    assert kept.get(ROWS, ["final"], CPU) is None
    assert f"{file} cannot be used" in capsys.readouterr().err.replace("\n", " ")
    file.write_bytes(b"")
    assert kept.get(ROWS, ["final"], CPU) is None
    file.unlink()
    os.mkfifo(file)
    assert kept.get(ROWS, ["final"], CPU) is None


def test_those_of_other_texts_go_when_there_is_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / name / STATES_FOLDER for name in ("oldest", "newer", "mine")]
    for age, folder in enumerate(folders[:2]):
        KeptStates(folder).put(ROWS, {"final": torch.zeros(1000)})
        os.utime(folder, (age, age))
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    assert KeptStates.within(folders[2], size, 3 * size) is not None
    assert [folder.exists() for folder in folders[:2]] == [True, True]
    assert KeptStates.within(folders[2], size, 2.5 * size) is not None
    assert [folder.exists() for folder in folders[:2]] == [False, True]
    with speaking(True):
        assert KeptStates.within(folders[2], 2 * size, size) is None, "it would not fit alone"
    assert "more than the" in capsys.readouterr().err
    assert folders[1].exists(), "nothing goes for what is not kept"
    with speaking(True):
        assert KeptStates.within(folders[2], size, 0.0) is None
    assert not capsys.readouterr().err, "nobody asked for any"


def test_reading_makes_states_the_latest_used(tmp_path: Path) -> None:
    kept = KeptStates(tmp_path)
    kept.put(ROWS, {"final": torch.zeros(3)})
    os.utime(tmp_path, (1, 1))
    kept.get(ROWS, ["final"], CPU)
    assert tmp_path.stat().st_mtime > 1


def test_a_full_disk_ends_the_keeping_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    kept = KeptStates(tmp_path)

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_files, "_fill", full)
    kept.put(ROWS, {"final": torch.zeros(3), "l1": torch.zeros(3)})
    assert capsys.readouterr().err.count("are not kept: the disk is full") == 1
    kept.put(ROWS, {"final": torch.zeros(3)})
    assert not capsys.readouterr().err, "it is said once"
    assert kept.get(ROWS, ["final"], CPU) is None
