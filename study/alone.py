"""What training costs by itself: some SAEs once more for a few steps, each in a process of its own.

Members of a study train side by side in one process, so that the most it held tells nothing of any one of them. Where
the study file asks for it (``[cost_alone]``), variants are trained again, one SAE after the other, in fresh processes;
of each only its time and memory are kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ..cache.store import ActivationStore
from ..console import warn
from ..errors import RunError
from ..evaluate.results import Frozen
from ..system.atomic_files import make_folder, plain_errors, write_json
from ..system.untrusted_files import read_json
from ..train.config import TrainConfig
from .plan import AloneStage, PlannedMember

# The child finds packages where this process does, as multiprocessing has it; it reads nothing else of this process.
_CHILD = (
    "import json, sys; asked = json.loads(sys.stdin.read()); sys.path[:] = asked['path']; "
    "from tcsae.study.alone_process import train_alone; train_alone(asked)"
)
_PLACE = {"data": {"store"}, "run": {"out", "name", "device"}}
"""Fields of a configuration that say where, not what; the device is the machine's."""


class AloneCost(Frozen):
    """What the training of one SAE took in a process of its own."""

    variant: str
    seed: int
    model: str
    place: str
    repeats: int = Field(description="processes, of which the least memory and the least time are kept")
    steps: int
    tokens: int
    seconds: float = Field(description="of the steps, without reading and logging")
    held_bytes: int = Field(description="what the process (or its GPU) held before the training began")
    peak_bytes: int = Field(description="the most that it held")

    @property
    def memory_bytes(self) -> int:
        """What the training added to what the process held before: Python and libraries."""
        return self.peak_bytes - self.held_bytes

    @property
    def microseconds_per_token(self) -> float:
        """Of the steps."""
        return 1e6 * self.seconds / self.tokens


class _Kept(Frozen):
    """The file of one training."""

    format: int = 1
    fingerprint: str
    """Of what was trained on what, and of the machine."""
    machine: dict[str, str | int | float | None]
    repeats: int
    steps: int
    tokens: int
    seconds: float
    held_bytes: int
    peak_bytes: int


def in_processes(repeats: int) -> str:
    """How each SAE is trained, as a sentence goes on after "each in"."""
    return "a process of its own" if repeats == 1 else f"{repeats} processes of its own, of which the least counts"


def measure_alone(stage: AloneStage, machine: Mapping[str, Any]) -> int:
    """Train those members of a stage that no kept measurement fits; returns how many that were.

    Args:
        stage: what is trained.
        machine: where, as the study says it; measurements of another machine do not count.

    Raises:
        StoreError: the store cannot be read.
        RunError: a training failed, in its own sentence.
        ResourceError: a file cannot be written.

    """
    store = ActivationStore.open(stage.store).fingerprint()
    measured = 0
    for each in stage.members:
        wanted = _fingerprint(each.config, store, machine, stage.repeats)
        kept = _read(stage.file(each))
        if kept is not None and kept.fingerprint == wanted:
            continue
        tries = [_train_in_a_process(each) for _ in range(stage.repeats)]
        least = min(tries, key=lambda one: one["peak_bytes"] - one["held_bytes"])
        found = least | {"seconds": min(one["seconds"] for one in tries)}
        cost = _Kept(fingerprint=wanted, machine=dict(machine), repeats=stage.repeats, **found)
        write_json(stage.file(each), cost.model_dump(mode="json"))
        measured += 1
    return measured


def alone_costs(stage: AloneStage, model: str) -> list[AloneCost]:
    """What is kept of a finished stage; a file that is damaged or gone is left out."""
    found = []
    for each in stage.members:
        kept = _read(stage.file(each))
        if kept is not None:
            numbers = kept.model_dump(exclude={"format", "fingerprint", "machine"})
            about = {"variant": each.variant, "seed": each.seed, "model": model, "place": each.at.short}
            found.append(AloneCost(**about, **numbers))
    return found


def _fingerprint(config: TrainConfig, store: str, machine: Mapping[str, Any], repeats: int) -> str:
    plain = config.model_dump(mode="json", exclude=_PLACE)
    return sha256(json.dumps([plain, store, dict(machine), repeats], sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Path) -> _Kept | None:
    """What was kept; None where there is nothing, or nothing that can be believed."""
    if not file.exists():
        return None
    try:
        return _Kept.model_validate(read_json(file))
    except (RunError, ValidationError):
        warn(f"{file} is damaged: it does not count")
        return None


def _train_in_a_process(each: PlannedMember) -> dict[str, Any]:
    """The numbers of one training, whose run folder is removed again.

    Raises:
        RunError: it failed.

    """
    asked = {
        "path": [path or os.getcwd() for path in sys.path],
        "parent": os.getpid(),
        "config": each.config.model_dump(mode="json"),
    }
    with plain_errors(f"write into {each.folder}"):
        make_folder(each.folder.parent)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    shutil.rmtree(each.folder, ignore_errors=True)
    said: Any = _last_json(done.stdout.splitlines())
    if done.returncode or said is None:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(
            f"{each.name} could not be trained in a process of its own (status {done.returncode}: "
            f"{why}); the same command tries it again"
        )
    if "failure" in said:
        raise RunError(f"{each.name} could not be trained in a process of its own: {said['failure']}")
    return said


def _last_json(lines: Sequence[str]) -> dict[str, Any] | None:
    """The last line, unless it is something else: a plug-in may print."""
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
