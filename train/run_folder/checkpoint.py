"""Checkpoints of a run: written atomically, the last two kept, and checked before they are used.

Beside each ``step-N.pt`` lies ``step-N.pt.xxh3`` with the hash of its bytes. If a checkpoint is damaged, the previous
one is used. A checkpoint without a hash file (of an earlier version, or of a process killed between the two files) is
checked with the checksums inside its zip archive. Checkpoints are read without executing pickled code.

All members of a sweep write checkpoints at the same steps. A process that is killed between two members' files leaves
them one checkpoint apart. Therefore each member keeps two, and :func:`latest_common` finds the newest step of which all
members have a checkpoint.
"""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...console import format_bytes, warn
from ...errors import ResourceError, RunError
from ...system.atomic_files import remove_partials, write_file
from ...system.checksums import HashingFile, file_hash
from ...system.untrusted_files import open_regular, read_bytes

FOLDER = "checkpoint"
_KEPT = 2
_HASH = ".xxh3"


def save_checkpoint(run: Path, step: int, state: dict[str, Any]) -> None:
    """Write the state after ``step`` steps into ``run``, then delete all but the two newest checkpoints.

    Raises:
        RunError: the folder cannot be written.
        ResourceError: the disk is full.

    """
    found = ""

    def write(file: BinaryIO) -> None:
        nonlocal found
        hashing: Any = HashingFile(file)  # it has the methods that torch.save needs
        torch.save(state, hashing)
        found = hashing.hash()

    path = _file(run, step)
    try:
        _hash_file(path).unlink(missing_ok=True)  # may exist from an earlier attempt at the same step
        write_file(path, write)
        write_file(_hash_file(path), found + "\n")
    except ResourceError as failure:
        size, free = sum(t.numel() * t.element_size() for t in _tensors(state)), shutil.disk_usage(run).free
        sizes = f"a checkpoint of {format_bytes(size)} does not fit into the {format_bytes(free)} left at {run}"
        raise ResourceError(f"{sizes}: make room and resume") from failure
    for old in checkpoints(run)[:-_KEPT]:
        _remove(run, old)


def checkpoints(run: Path) -> list[int]:
    """The steps of the checkpoints in ``run``, ascending; :func:`latest_common` checks whether they are undamaged."""
    steps = [file.stem.removeprefix("step-") for file in (run / FOLDER).glob("step-*.pt")]
    return sorted(int(step) for step in steps if step.isdecimal())


def latest_common(runs: Sequence[Path], *, remove_damaged: bool = False) -> int | None:
    """The newest step of which every run has an undamaged checkpoint; None if there is none.

    Args:
        runs: folders of the members that are trained together.
        remove_damaged: remove damaged checkpoints, with a warning; only for the one process that writes.

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
    """The state after ``step`` steps, a step that :func:`latest_common` has returned.

    Raises:
        RunError: it cannot be read.

    """
    try:
        return torch.load(_file(run, step), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as failure:
        where = f"the checkpoint {_file(run, step)} cannot be read"
        raise RunError(f"{where}: delete it to go on from the one before, or train with --fresh") from failure


def drop_checkpoints(run: Path) -> None:
    """Remove the checkpoints of a finished run, and partial files of a killed process."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    remove_partials(run)


def _is_sound(path: Path) -> bool:
    try:
        if _hash_file(path).exists():
            said = read_bytes(_hash_file(path), most=256).decode(errors="replace").strip()
            return file_hash(path) == said
        # Without a hash (of an earlier version, or killed before it was written): the archive's own sums, which do not
        # cover its headers, so it must open, too.
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                return False
        torch.load(path, map_location="cpu", weights_only=True)
        return True
    except Exception:  # a damaged archive can raise many kinds of errors
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
