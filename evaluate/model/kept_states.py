"""States of the untouched model on a text, kept on disk between evaluations: they depend on no SAE, and computing them
is half of what measuring one SAE costs.

A folder holds one file for every batch of rows and every tensor, ``0000016-l8.safetensors``: tensors in the model's own
dtype, so that what is read is what was computed, bit for bit. Each file says its hash; one that is damaged is named and
computed again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ...console import format_bytes, note, warn
from ...errors import ResourceError, RunError
from ...system.atomic_files import write_file
from ...system.untrusted_files import open_regular, reason
from ..config import STATES_FOLDER

_TENSOR = "x"


class KeptStates:
    """The states of one model on one text.

    Args:
        folder: where they lie; made when something is kept.

    """

    def __init__(self, folder: Path):
        self._folder: Path | None = folder

    @classmethod
    def within(cls, folder: Path, needed: int, limit: float) -> KeptStates | None:
        """States that take ``needed`` bytes in ``folder``, and those of other texts: ``limit`` bytes together.

        Of other texts those used longest ago go first. None where these alone would not fit.
        """
        if needed > limit:
            if limit:
                note(
                    f"the model's states on this text would take {format_bytes(needed)}, more than the "
                    f"{format_bytes(limit)} of --keep-states: the next evaluation on it runs the model again"
                )
            return None
        if not folder.exists():
            note(
                f"the model's states on this text, {format_bytes(needed)}, are kept in {folder}: the next evaluation "
                "reads them (--keep-states)"
            )
        others = sorted(_age_and_size(other) for other in folder.parents[1].glob(f"*/{STATES_FOLDER}"))
        others = [other for other in others if other[2] != folder]
        while others and sum(size for _, size, _ in others) + needed > limit:
            shutil.rmtree(others.pop(0)[2], ignore_errors=True)
        return cls(folder)

    def get(self, rows: slice, names: Sequence[str], device: torch.device) -> dict[str, Tensor] | None:
        """The tensors of a batch by name; None unless all of them are there, whole."""
        found = {}
        for name in names:
            tensor = None if self._folder is None else _read(self._path(self._folder, rows, name))
            if tensor is None:
                return None
            found[name] = tensor.to(device)
        if self._folder is not None:
            with suppress(OSError):
                self._folder.touch()  # used now
        return found

    def put(self, rows: slice, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors of a batch. A disk that is full ends the keeping, not the evaluation."""
        for name, tensor in tensors.items():
            if self._folder is None:
                return
            tensor = tensor.detach().cpu().contiguous()
            content = save({_TENSOR: tensor}, {"check": _hash(tensor)})
            try:
                write_file(self._path(self._folder, rows, name), content)
            except (ResourceError, RunError) as failure:
                warn(f"the model's states on this text are not kept: {failure}")
                self._folder = None

    @staticmethod
    def _path(folder: Path, rows: slice, name: str) -> Path:
        return folder / f"{rows.start:07d}-{name}.safetensors"


def _age_and_size(folder: Path) -> tuple[float, int, Path]:
    """When it was last used, and bytes; of a folder that another process has just removed, none."""
    try:
        return folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir()), folder
    except FileNotFoundError:
        return 0.0, 0, folder


def _read(path: Path) -> Tensor | None:
    if not path.exists():
        return None
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            said, tensor = file.metadata()["check"], file.get_tensor(_TENSOR)
        if said != _hash(tensor):
            raise ValueError("it does not have the hash it says")
    except Exception as failure:  # damaged files raise errors of many kinds, and each means the same here
        warn(f"{path} cannot be used ({reason(failure)}): the model is run again on these rows")
        return None
    return tensor


def _hash(tensor: Tensor) -> str:
    about = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return xxhash.xxh3_128_hexdigest(about + tensor.view(torch.uint8).numpy().tobytes())
