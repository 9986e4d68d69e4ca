"""``study.json``: which file a study's folder belongs to, which stages are finished, and how long they took.

Written whole and durably after every stage. What it says of a stage is a note, never the proof: that a run is finished
stands in the run, that a store is whole in the store.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from .. import __version__
from ..errors import RunError, UsageError
from ..system.atomic_files import PARTIAL, make_folder, write_json
from ..system.untrusted_files import read_json
from .file import StudyFile

STATE = "study.json"
ANALYSIS = "analysis.json"
"""Names in a study's folder."""
PARTS = ("stores", "runs", "cost", "reports")
"""Its folders."""
_REMEDY = "give another --out, or begin anew with --fresh"


class StageState(BaseModel):
    """What is known of a stage."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # until 2026-11 a stage also had ``units``, of its work

    done: bool = False
    seconds: float = 0.0
    """Over all sittings that ended by themselves or were stopped; what a killed one took is not known."""
    failure: str = ""
    """Why it could not be done, one sentence. It is tried again by the next command."""
    code: str = ""
    """Of an evaluation: hash of everything that measures, and of what was measured."""


class StudyState(BaseModel):
    """The document."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    name: str
    scale: str
    fingerprint: str
    """Of the study file at this scale."""
    file: str
    """The file as it was given."""
    version: str = __version__
    created: str
    machine: dict[str, str | int | float | None] = {}
    stages: dict[str, StageState] = {}
    finished: bool = False
    """Whether every stage is done and the study is analysed."""

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages.values())

    def stage(self, name: str) -> StageState:
        """Of that name; a new one where it was never begun."""
        return self.stages.get(name, StageState())

    def save(self, folder: Path) -> None:
        """Write it, durably.

        Raises:
            RunError, ResourceError: the folder cannot be written.

        """
        write_json(folder / STATE, self.model_dump(mode="json"))


def new_state(study: StudyFile, file: str) -> StudyState:
    """Of a study that begins now."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return StudyState(name=study.name, scale=study.scale, fingerprint=study.fingerprint(), file=file, created=created)


def read_state(folder: Path) -> StudyState | None:
    """What a folder says of its study; None where there is none.

    Raises:
        RunError: it is damaged, or a newer version wrote it.

    """
    if not (folder / STATE).exists():
        return None
    found = read_json(folder / STATE, remedy=f"remove it: stores and runs beside it are kept, {_REMEDY}")
    version = found.get("format")
    if isinstance(version, int) and version > 1:
        raise RunError(f"{folder / STATE} is of format {version}, this program reads format 1: update tcsae")
    try:
        return StudyState.model_validate(found)
    except ValidationError as failure:
        where = ".".join(map(str, failure.errors()[0]["loc"])) or "its top level"
        raise RunError(
            f"{folder / STATE} is no state of a study (at '{where}'): remove it, stores and runs beside it are kept"
        ) from failure


def check_same(state: StudyState, study: StudyFile, folder: Path) -> None:
    """Whether a folder belongs to the study file as it is now.

    Raises:
        UsageError: it belongs to another file, or to this one before it was changed.

    """
    there, asked = f"{state.name} at scale {state.scale}", f"{study.name} at scale {study.scale}"
    if there != asked:
        raise UsageError(f"{folder} holds the study {there}, you asked for {asked}: give another --out")
    if state.fingerprint != study.fingerprint():
        raise UsageError(
            f"{folder} was begun with the file of hash {state.fingerprint}, this file has hash {study.fingerprint()}: "
            f"what a study compares and how it decides is fixed before it runs; {_REMEDY}"
        )


def check_free(folder: Path) -> None:
    """Whether a folder without a study may become one: it holds nothing but what a study's folder holds.

    Raises:
        UsageError: it holds other files, or is a file.

    """
    if folder.is_file():
        raise UsageError(f"{folder} is a file: give another --out")
    there = [path for path in folder.iterdir() if path.suffix != PARTIAL] if folder.is_dir() else []
    others = sorted(path.name for path in there if path.name not in PARTS)
    if others and not (folder / STATE).exists():
        raise UsageError(f"{folder} is no folder of a study and holds other files ({others[0]}): give another --out")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, for this process alone; the kernel releases it if the process dies.

    Raises:
        RunError: another process runs this study, or the folder cannot be made.

    """
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process runs the study in {folder}: wait for it, or give another --out") from None
        yield
    finally:
        os.close(handle)
