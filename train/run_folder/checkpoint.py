"""Checkpoints of a run: written whole or not at all, two kept, checked before they are believed.

Beside each ``step-N.pt`` lies ``step-N.pt.xxh3`` with the hash of its bytes; damage means going on from the one before.
One without it (of an earlier version, or of a process killed between the two files) is held to its archive's own sums.
They are read without unpickling code.

Members of one pass are checkpointed at the same steps; a process killed between two members' files leaves them a step
apart, which is why each keeps the one before, and :func:`latest_common` finds the newest step that all of them have.
"""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...atomic_files import remove_partials, write_file
from ...checksums import HashingFile, file_hash
from ...console import format_bytes, warn
from ...errors import ResourceError, RunError
from ...untrusted_files import open_regular, read_bytes

FOLDER = "checkpoint"
_KEPT = 2
_HASH = ".xxh3"


def save_checkpoint(run: Path, step: int, state: dict[str, Any]) -> None:
    """Write the state after ``step`` steps into ``run``, then drop all but the two newest.

    Raises:
        RunError: the folder cannot be written.
        ResourceError: the disk is full.

    """
    found = ""

    def write(file: BinaryIO) -> None:
        nonlocal found
        hashing: Any = HashingFile(file)  # all that torch.save asks of a file
        torch.save(state, hashing)
        found = hashing.hash()

    path = _file(run, step)
    try:
        _hash_file(path).unlink(missing_ok=True)  # of the same step, before the run was stopped and went on
        write_file(path, write)
        write_file(_hash_file(path), found + "\n")
    except ResourceError as failure:
        size, free = sum(t.numel() * t.element_size() for t in _tensors(state)), shutil.disk_usage(run).free
        sizes = f"a checkpoint of {format_bytes(size)} does not fit into the {format_bytes(free)} left at {run}"
        raise ResourceError(f"{sizes}: make room and resume") from failure
    for old in checkpoints(run)[:-_KEPT]:
        _remove(run, old)


def checkpoints(run: Path) -> list[int]:
    """Steps that ``run`` has checkpoints of, ascending; whether they are sound only :func:`latest_common` looks."""
    steps = [file.stem.removeprefix("step-") for file in (run / FOLDER).glob("step-*.pt")]
    return sorted(int(step) for step in steps if step.isdecimal())


def latest_common(runs: Sequence[Path], *, remove_damaged: bool = False) -> int | None:
    """The newest step that every run has a sound checkpoint of; None where there is none.

    Args:
        runs: folders of the members of one pass.
        remove_damaged: remove what is damaged, with a warning; only for the one process that writes.

    """
    common = set.intersection(*(set(checkpoints(run)) for run in runs)) if runs else set()
    for step in sorted(common, reverse=True):
        damaged = [run for run in runs if not _is_sound(_file(run, step))]
        if not damaged:
            return step
        for run in damaged if remove_damaged else []:
            warn(f"the checkpoint {_file(run, step)} is damaged and was removed")
            _remove(run, step)
    return None


def load_checkpoint(run: Path, step: int) -> dict[str, Any]:
    """The state after ``step`` steps, which :func:`latest_common` found sound.

    Raises:
        RunError: it cannot be read.

    """
    try:
        return torch.load(_file(run, step), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as failure:
        where = f"the checkpoint {_file(run, step)} cannot be read"
        raise RunError(f"{where}: delete it to go on from the one before, or train with --fresh") from failure


def drop_checkpoints(run: Path) -> None:
    """Remove the checkpoints of a finished run, and what a killed process left half written."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    remove_partials(run)


def _is_sound(path: Path) -> bool:
    try:
        if _hash_file(path).exists():
            said = read_bytes(_hash_file(path), most=256).decode(errors="replace").strip()
            return file_hash(path) == said
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # damaged archives raise errors of many kinds, and each means the same here
        return False


def _remove(run: Path, step: int) -> None:
    path = _file(run, step)
    for file in (path, _hash_file(path)):
        file.unlink(missing_ok=True)


def _file(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:010d}.pt"


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + _HASH)


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [tensor for value in (tree.values() if isinstance(tree, dict) else []) for tensor in _tensors(value)]
