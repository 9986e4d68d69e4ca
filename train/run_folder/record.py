"""What a run folder says of itself: ``train.json`` beside the weights.

A run is finished when its record says so, and only then do other stages see it. The record of a finished run vouches
for the SAE's files with their hashes, and for itself with one over everything else in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ...atomic_files import write_json
from ...checksums import content_hash, file_hash
from ...errors import RunError
from ...sites import Location, location_of
from ...untrusted_files import read_json, shown

RECORD = "train.json"
SAE_CONFIG, SAE_WEIGHTS = "cfg.json", "sae_weights.safetensors"  # the SAE's files, which SAELens opens


class RunRecord(BaseModel):
    """Everything needed to say what a run is, to repeat it, and to find the text it never saw."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    name: str
    """Name of the run's folder."""
    role: Literal["tc", "twin"]
    """``tc``: has a temporal term, or stands alone. ``twin``: the same configuration with λ2 = 0."""
    twin: str | None
    """Folder name of the other one of the pair, in the same parent folder; None where there is none."""
    layer: int
    """Layer of the language model, counted from 0."""
    store: str
    """Path of the activation store, as given."""
    store_fingerprint: str
    """Fingerprint of the rows used."""
    store_rows: int
    """Rows used: the first so many of the store."""
    store_manifest: dict[str, Any]
    """Copy of the store's manifest: model, text, tokenizer, held-out share."""
    config: dict[str, Any]
    """The full resolved training configuration of this SAE."""
    input_scale: float
    """Factor between raw activations and what the SAE was trained on; already folded into the saved weights."""
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
    """fast: by the step that was derived by hand; autograd: by autograd. Empty: by hand, before this was kept."""
    plugins: dict[str, str] = {}
    """Plug-ins it was trained with: name of the file → SHA-256 of its bytes."""
    cost: dict[str, float] = {}
    """seconds: of this SAE's steps. peak_memory_bytes: of the process or its GPU. members: SAEs that trained beside."""
    versions: dict[str, str]
    created: str
    """When the run began, ISO 8601, UTC."""
    hashes: dict[str, str] = {}
    """Of the SAE's files, once it is finished: bytes, a colon and their XXH3 (128 bits). In the file also of the record
    itself, the hash alone.
    """

    @property
    def location(self) -> Location:
        """The layer and the hook point whose tensor the SAE reconstructs."""
        hook_name = self.store_manifest.get("hook_name")
        return Location(self.layer) if hook_name is None else location_of(hook_name)

    def save(self, folder: Path) -> None:
        """Write ``folder/train.json`` whole and durably, if finished with the hashes of the SAE's files there.

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
        """Compare the SAE's files with what the record says of them; one of a version without hashes says nothing.

        Raises:
            RunError: a file is missing or not the one that was written.

        """
        for name, expected in self.hashes.items():
            if not (folder / name).exists():
                raise RunError(f"{folder / name} is missing: {_REMEDY}")
            said, found = expected.partition(":"), (folder / name).stat().st_size
            if str(found) != said[0]:
                sizes = f"it has {found:,} bytes, {RECORD} says {shown(said[0])}"
                raise RunError(f"{folder / name} is damaged or was changed ({sizes}): {_REMEDY}")
            if file_hash(folder / name) != said[2]:
                raise RunError(f"{folder / name} is damaged or was changed (not the hash in {RECORD}): {_REMEDY}")


def load_run(path: str | Path) -> RunRecord:
    """The record of the run in folder ``path``, finished or not.

    Raises:
        RunError: no run there, or its record is damaged or of a newer version.

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
    """Compare a record with the hash it has of itself, and take that out."""
    hashes = raw.get("hashes")
    if not isinstance(hashes, dict):
        return
    said = hashes.pop(RECORD, None)
    unknown = next((name for name in hashes if name not in (SAE_CONFIG, SAE_WEIGHTS)), None)
    if unknown is not None or said != content_hash(raw):
        what = f"{file} is damaged or was changed (it does not have the hash it says)"
        raise RunError(f"{what}: {_REMEDY}; if you changed it on purpose, take 'hashes' out of it")


def find_runs(folder: str | Path) -> list[Path]:
    """The finished runs directly inside ``folder``, by name; empty where there are none.

    One whose record is damaged is among them, so that opening it says so instead of it being passed over.
    """
    records = sorted(Path(folder).glob(f"*/{RECORD}"))
    return [file.parent for file in records if _finished_or_damaged(file.parent)]


def _finished_or_damaged(path: Path) -> bool:
    try:
        return load_run(path).finished
    except RunError:
        return True
