"""The store of codes on disk: its manifest, its six arrays and its commit log. docs/FORMAT.md defines all of it.

Shapes: R rows, T positions, N = R·T tokens (token n = row · T + position), E entries: codes that are not zero.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from ...cache.format.manifest import StoreManifest, checksum, installed_versions
from ...cache.storage.open_place import place_of
from ...cache.storage.places import Place
from ...errors import StoreError
from ...sites import Location, location_of
from ...system.untrusted_files import parse_json, reason

FORMAT_VERSION = 1
DEFAULT_NAME = "codes.zarr"
"""Folder of the codes inside their run's folder."""
LOG = "values/commits.jsonl"
LOCK = "values/writer.lock"
OUTLIER = 4
"""Flag of a token whose norm exceeds the store's limit; 1 and 2 are special tokens and padding, as in the store."""

_ENTRIES, _BOUNDS, _TOKENS = 1 << 20, 1 << 18, 1 << 18  # values per chunk
REMEDY = "write these codes again with --fresh"


@dataclass(frozen=True)
class ArrayFormat:
    """One array: its type, what stands along its axes, and how much of the first axis is in a chunk."""

    name: str
    dtype: str
    fill: int
    dimensions: tuple[str, ...]
    chunk: int
    context: int

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of one item along the first axis."""
        return (self.context,) if len(self.dimensions) == 2 else ()

    def key(self, chunk: int) -> str:
        """The file of a chunk, relative to the store."""
        return f"{self.name}/c.{chunk}" + (".0" if self.inner else "")

    def document(self, length: int) -> dict[str, Any]:
        """The array's ``zarr.json``."""
        plain = {"name": "bytes"} if np.dtype(self.dtype).itemsize == 1 else _BYTES
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [length, *self.inner],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.chunk, *self.inner]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": self.fill,
            "codecs": [plain, {"name": "zstd", "configuration": {"level": 1, "checksum": False}}, {"name": "crc32c"}],
            "dimension_names": list(self.dimensions),
            "attributes": {},
        }


_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


def arrays(context: int) -> dict[str, ArrayFormat]:
    """The six arrays of a store with rows of ``context`` positions."""
    rows = max(1, _TOKENS // context)
    found = (
        ("tokens", "int32", -1, ("row", "position"), rows),
        ("documents", "int32", -1, ("row", "position"), rows),
        ("flags", "uint8", 255, ("row", "position"), rows),
        ("indptr", "int64", 0, ("bound",), _BOUNDS),
        ("features", "int32", -1, ("entry",), _ENTRIES),
        ("values", "float32", 0, ("entry",), _ENTRIES),
    )
    return {name: ArrayFormat(name, dtype, fill, dims, chunk, context) for name, dtype, fill, dims, chunk in found}


class CodesManifest(BaseModel):
    """What a store of codes holds: whose codes, of which rows of which text."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format_version: int = FORMAT_VERSION
    run: str
    """Name of the run's folder."""
    weights: str
    """Hash of the SAE's weights file, as in the run's record."""
    architecture: str
    n_features: int
    part: Literal["all", "sparse"] = "all"
    """``sparse``: only the part of the codes that is sparse, of an architecture where not all of them are."""
    store: str
    """Path of the activation store, as given."""
    store_fingerprint: str
    """Of the rows that are encoded."""
    store_manifest: dict[str, Any]
    """Copy of the activation store's manifest: model, text, layer, hook point."""
    first_row: int = 0
    """The store's row that is row 0 here."""
    planned_rows: int = Field(ge=0)
    trained_rows: int
    """Of the rows here, those at the beginning that the run was trained on."""
    norm_limit: float
    """Norm beyond which a token does not count."""
    kept_by: Literal["encode", "evaluate"] = "encode"
    """``evaluate``: an evaluation kept them, of its own rows; ``store`` is then empty, or that of held-out vectors.
    """
    seed: int = 0
    """Of the samples that are drawn from them: the evaluation's."""
    finished: bool = False
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = Field(default_factory=installed_versions)

    @model_serializer(mode="wrap")
    def _as_before_of_stores(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written only where it says something, so that older versions read the codes of stores."""
        by_default = {"kept_by": "encode", "seed": 0}
        return {name: value for name, value in plain(self).items() if value != by_default.get(name, ...)}

    @property
    def of_store(self) -> StoreManifest:
        """The activation store's manifest."""
        return StoreManifest.model_validate(self.store_manifest)

    @property
    def context(self) -> int:
        """T, positions per row."""
        return self.of_store.text.context

    @property
    def location(self) -> Location:
        """The layer and the hook point of the activations."""
        return location_of(self.of_store.hook_name)

    def difference(self, other: CodesManifest) -> str | None:
        """The first field in which two stores hold different codes, in words."""
        for name in ("run", "weights", "n_features", "part", "store_fingerprint", "first_row", "planned_rows"):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                return f"{name.replace('_', ' ')}: it has {here!r}, you asked for {there!r}"
        return None


def group_document(manifest: CodesManifest) -> dict[str, Any]:
    """The complete ``zarr.json`` of the group."""
    record = manifest.model_dump(mode="json")
    attributes = {"tcsae_codes": record, "tcsae_check": checksum(record)}
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def read_manifest(path: str | Path | Place) -> CodesManifest:
    """The manifest of the codes at ``path``.

    Raises:
        StoreError: nothing there, no codes, of a newer format, or damaged.

    """
    place = place_of(path) if isinstance(path, str | Path) else path
    try:
        document = parse_json(place.read("zarr.json"))
    except FileNotFoundError:
        how = "`pipeline encode RUN` writes them, or `pipeline evaluate --codes`"
        raise StoreError(f"there are no codes at {place}: {how}") from None
    except ValueError as wrong:
        raise StoreError(f"{place}/zarr.json is damaged (no JSON: {reason(wrong)}): {REMEDY}") from None
    attributes = document.get("attributes") if isinstance(document, dict) else None
    record = attributes.get("tcsae_codes") if isinstance(attributes, dict) else None
    if not isinstance(attributes, dict) or not isinstance(record, dict):
        raise StoreError(f"{place} holds no codes (no 'tcsae_codes' attributes): name what `pipeline encode` wrote")
    found = record.get("format_version")
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise StoreError(f"{place} has format version {found}, this tcsae reads up to {FORMAT_VERSION}: upgrade tcsae")
    if attributes.get("tcsae_check") != checksum(record):
        raise StoreError(f"{place}/zarr.json is damaged (its checksum does not fit): {REMEDY}")
    try:
        manifest = CodesManifest.model_validate(record)
        StoreManifest.model_validate(manifest.store_manifest)
    except ValidationError as wrong:
        where = ".".join(map(str, wrong.errors()[0]["loc"])) or "its top level"
        raise StoreError(f"{place}/zarr.json is damaged at {where}: {REMEDY}") from None
    return manifest


@dataclass(frozen=True)
class Part:
    """A line of the commit log: rows that were committed together, and the hash of what each array holds of them."""

    first_row: int
    rows: int
    first_entry: int
    entries: int
    xxh3: dict[str, str]
    """Array → XXH3-64 of its bytes for these rows, uncompressed; of ``indptr`` its upper bounds [rows · T]."""

    @property
    def stop_row(self) -> int:
        """The first row behind it."""
        return self.first_row + self.rows

    @property
    def stop_entry(self) -> int:
        """The first entry behind it."""
        return self.first_entry + self.entries

    def to_line(self) -> bytes:
        """One line of the log."""
        record = asdict(self)
        record["check"] = checksum(record)
        return (json.dumps(record, separators=(",", ":")) + "\n").encode()


def parse_log(raw: bytes) -> tuple[list[Part], int]:
    """The parts that a log lists, and the length of the log that is sound: all before the first invalid line."""
    parts: list[Part] = []
    sound = 0
    for line in raw.splitlines(keepends=True):
        part = _parse_line(line) if line.endswith(b"\n") else None
        after = (parts[-1].stop_row, parts[-1].stop_entry) if parts else (0, 0)
        if part is None or (part.first_row, part.first_entry) != after:
            break
        parts.append(part)
        sound += len(line)
    return parts, sound


def _parse_line(line: bytes) -> Part | None:
    try:
        record = parse_json(line)
        return Part(**record) if record.pop("check") == checksum(record) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
