"""The record of a run: ``train.json`` beside the weights.

A run is finished if its record says so; evaluation and other commands use only finished runs. The record of a finished
run holds the hashes of the SAE's files, and a hash of all the rest of the record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ...errors import RunError
from ...sites import Location, location_of
from ...system.atomic_files import write_json
from ...system.checksums import content_hash, file_hash
from ...system.untrusted_files import read_json, shown

RECORD = "train.json"
SAE_CONFIG, SAE_WEIGHTS = "cfg.json", "sae_weights.safetensors"  # the SAE's files, in the format of SAELens
EXTENSION = "extension"
"""Folder inside a finished run's, where it is trained further."""


class TrainedPart(BaseModel):
    """One of the parts of a run that went on after it was finished."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    from_step: int
    """Steps of the parts before."""
    steps: int
    tokens: int
    lr: float
    """Peak learning rate."""
    warmup: int
    """Steps of this part over which the learning rate grows from zero."""
    decay: int
    """Last steps of this part over which it falls."""
    moments: Literal["fresh"] = "fresh"
    """Adam's averages: they begin anew with every part."""
    created: str
    """When the part was begun, ISO 8601, UTC."""
    cost: dict[str, float] = {}
    versions: dict[str, str] = {}


class RunRecord(BaseModel):
    """Everything needed to identify a run, to repeat it, and to find the held-out text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    name: str
    """Name of the run's folder."""
    role: Literal["tc", "twin"]
    """``tc``: has a temporal term, or has no twin. ``twin``: the same configuration with λ2 = 0."""
    twin: str | None
    """Folder name of the other run of the pair, in the same parent folder; None if there is none."""
    layer: int
    """Layer of the language model, counted from 0."""
    store: str
    """Path of the activation store, as given."""
    store_fingerprint: str
    """Fingerprint of the rows used."""
    store_rows: int
    """Number of rows used, from the beginning of the store."""
    store_manifest: dict[str, Any]
    """Copy of the store's manifest: model, text, tokenizer, held-out share."""
    config: dict[str, Any]
    """The full resolved training configuration of this SAE."""
    input_scale: float
    """Factor by which raw activations were multiplied for training; the saved weights already include it."""
    seed: int
    steps: int
    """Optimiser steps taken so far."""
    planned_steps: int
    tokens: int
    """Tokens trained on so far."""
    finished: bool
    metrics: dict[str, float | None]
    """The last metrics of the training stream (names as in ``metrics.jsonl``); None where undefined."""
    step: str = ""
    """fast: with hand-written gradients; autograd: with autograd. Empty: hand-written, before this was recorded."""
    pairs: dict[str, float | None] = {}
    """Of the pairs that the temporal term compared in the first batch: how many, the share of true neighbours, and the
    mean cosine of the paired inputs and of true neighbours (``pairs``, ``neighbours``, ``cosine``,
    ``neighbours_cosine``). Empty: there is no term, or before this was kept.
    """
    plugins: dict[str, str] = {}
    """Plug-ins used in training: name of the file → SHA-256 of its bytes."""
    origin: dict[str, Any] = {}
    """Of the SAE whose weights it began with (``run.init_from``): path, format, SHA-256 of its weights, and the model
    and hook name that it says. Empty: it began with random weights.
    """
    finetuned: dict[str, Any] = {}
    """Of a run of ``pipeline finetune``, whose weights are further trained ones of another run (``origin``): that run's
    name, steps and tokens, the settings that ``config`` has no place for, and the KL before the first step.
    """
    cost: dict[str, float] = {}
    """seconds: of this SAE's steps. peak_memory_bytes: of the process or its GPU. members: SAEs that trained beside."""
    parts: list[TrainedPart] = []
    """Of a run that was extended (``train --extend``), in order; empty: it was trained in one."""
    ends: dict[str, Any] = {}
    """Where training stopped, for an extension. stream: position of the next batch. target: of the controller on λ1.
    Empty: it is not finished, or before this was kept.
    """
    versions: dict[str, str]
    created: str
    """When the run started, ISO 8601, UTC."""
    failure: str = ""
    """Why the training cannot go on, one sentence; empty: it can, or is finished."""
    hashes: dict[str, str] = {}
    """File → ``BYTES:XXH3-128`` for the SAE's files of a finished run; ``train.json`` also holds its own hash."""

    @property
    def location(self) -> Location:
        """The layer and the hook point of the tensor that the SAE reconstructs."""
        hook_name = self.store_manifest.get("hook_name")
        return Location(self.layer) if hook_name is None else location_of(hook_name)

    def save(self, folder: Path) -> None:
        """Write ``folder/train.json`` atomically and durably; for a finished run with the hashes of the SAE's files.

        Raises:
            RunError, ResourceError: the folder cannot be written.

        """
        plain = self.model_dump(mode="json") | {"hashes": self._hashes(folder)}
        plain["hashes"][RECORD] = content_hash(plain)
        write_json(folder / RECORD, plain)

    def _hashes(self, folder: Path) -> dict[str, str]:
        files = [folder / name for name in (SAE_CONFIG, SAE_WEIGHTS)] if self.finished else []
        return {file.name: f"{file.stat().st_size}:{file_hash(file)}" for file in files if file.exists()}

    def check_files(self, folder: Path) -> None:
        """Compare the SAE's files with the recorded hashes; a record of an earlier version has no hashes to compare.

        Raises:
            RunError: a file is missing or differs from the one that was written.

        """
        for name, expected in self.hashes.items():
            if not (folder / name).exists():
                raise RunError(f"{folder / name} is missing: {_REMEDY}")
            said, found = expected.partition(":"), (folder / name).stat().st_size
            sizes = f"it has {found:,} bytes, {RECORD} says {shown(said[0])}" if str(found) != said[0] else ""
            if not sizes and file_hash(folder / name) == said[2]:
                continue
            if (folder / EXTENSION / RECORD).exists():
                raise RunError(
                    f"{folder} was being replaced by its extension when the program was stopped: "
                    f"finish that with 'pipeline train --extend {folder}'"
                )
            why = sizes or f"not the hash in {RECORD}"
            raise RunError(f"{folder / name} is damaged or was changed ({why}): {_REMEDY}")


def load_run(path: str | Path) -> RunRecord:
    """Read the record of the run in folder ``path``, finished or not.

    Raises:
        RunError: there is no run, or its record is damaged or of a newer version.

    """
    file = Path(path) / RECORD
    raw = read_json(
        file,
        missing=f"{path} is no training run ({RECORD} is missing): name a folder that 'pipeline train' wrote",
        remedy="train the run again with --fresh",
    )
    _check_itself(file, raw)
    version = raw.get("format_version")
    if isinstance(version, int) and version > 1:
        raise RunError(f"{file} is of format {version}, this program reads format 1: update tcsae")
    try:
        return RunRecord.model_validate(raw)
    except ValidationError as failure:
        where = ".".join(str(part) for part in failure.errors()[0]["loc"]) or "its top level"
        raise RunError(f"{file} is not a valid run record at '{where}': train the run again") from failure


_REMEDY = "restore it, or train the run again with --fresh"


def _check_itself(file: Path, raw: dict[str, Any]) -> None:
    """Compare the record with its own hash, and remove that hash from it."""
    hashes = raw.get("hashes")
    if not isinstance(hashes, dict):
        return
    said = hashes.pop(RECORD, None)
    unknown = next((name for name in hashes if name not in (SAE_CONFIG, SAE_WEIGHTS)), None)
    if unknown is not None or said != content_hash(raw):
        what = f"{file} is damaged or was changed (it does not have the hash it says)"
        raise RunError(f"{what}: {_REMEDY}; if you changed it on purpose, take 'hashes' out of it")


def find_runs(folder: str | Path) -> list[Path]:
    """The finished runs directly inside ``folder``, sorted by name.

    Runs with a damaged record are included, so that opening them reports the damage instead of ignoring the run.
    """
    records = sorted(Path(folder).glob(f"*/{RECORD}"))
    return [file.parent for file in records if _finished_or_damaged(file.parent)]


def _finished_or_damaged(path: Path) -> bool:
    try:
        return load_run(path).finished
    except RunError:
        return True
