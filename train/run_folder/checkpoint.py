"""Checkpoints of a run: written whole or not at all, two kept, read without unpickling code.

Members of one pass are checkpointed at the same steps; a process killed between two members' files leaves them a step
apart, which is why each keeps the one before, and :func:`latest_common` finds the newest step that all of them have.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...atomic_files import write_file
from ...console import format_bytes
from ...errors import ResourceError, RunError

FOLDER = "checkpoint"
_KEPT = 2


def save_checkpoint(run: Path, step: int, state: dict[str, Any]) -> None:
    """Write the state after ``step`` steps into ``run``, then drop all but the two newest.

    Raises:
        RunError: the folder cannot be written.
        ResourceError: the disk is full.

    """
    try:
        write_file(_file(run, step), lambda file: torch.save(state, file))
    except ResourceError as failure:
        size, free = sum(t.numel() * t.element_size() for t in _tensors(state)), shutil.disk_usage(run).free
        sizes = f"a checkpoint of {format_bytes(size)} does not fit into the {format_bytes(free)} left at {run}"
        raise ResourceError(f"{sizes}: make room and resume") from failure
    for old in checkpoints(run)[:-_KEPT]:
        _file(run, old).unlink(missing_ok=True)


def checkpoints(run: Path) -> list[int]:
    """Steps that ``run`` has checkpoints of, ascending."""
    return sorted(int(file.stem.removeprefix("step-")) for file in (run / FOLDER).glob("step-*.pt"))


def latest_common(runs: Sequence[Path]) -> int | None:
    """The newest step that every run has a checkpoint of; None where there is none."""
    common = set.intersection(*(set(checkpoints(run)) for run in runs)) if runs else set()
    return max(common, default=None)


def load_checkpoint(run: Path, step: int) -> dict[str, Any]:
    """The state after ``step`` steps.

    Raises:
        RunError: it cannot be read.

    """
    try:
        return torch.load(_file(run, step), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as failure:
        where = f"the checkpoint {_file(run, step)} is damaged"
        raise RunError(f"{where}: delete it to go on from the one before, or train with --fresh") from failure


def drop_checkpoints(run: Path) -> None:
    """Remove the checkpoints of a finished run."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def _file(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:010d}.pt"


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [tensor for value in (tree.values() if isinstance(tree, dict) else []) for tensor in _tensors(value)]
