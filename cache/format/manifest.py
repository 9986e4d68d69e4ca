"""The manifest: what identifies a store's content, saved in the group's ``zarr.json`` under ``tcsae``.

It is written when a store is created, when its plan grows, and when it is finished. The number of committed rows is in
the commit log (``commit_log.py``), not here.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ...errors import StoreError
from ...sites import Location, location_of
from ...system.untrusted_files import parse_json, reason
from ..storage.open_place import place_of
from ..storage.places import Place
from .layout import StoreLayout

FORMAT_VERSION = 1
NO_MODEL = "none"  # the model's `architecture` in a store of imported vectors, which no language model produced
PLUGIN = "plug-in "  # in `versions`, "plug-in FILE" holds the SHA-256 of the file that registered the hook point
TEMPLATE = " template:"  # in the text's fingerprint, where there is a chat template: what its hash follows
_PACKAGES = ("tcsae", "torch", "transformers", "tokenizers", "datasets", "numpy")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelIdentity(_Record):
    """The language model that produced the activations. ``fingerprint`` covers the weights."""

    id: str
    revision: str | None = None
    gguf_file: str | None = None
    fingerprint: str
    architecture: str
    n_layers: int
    vocab_size: int
    attn_implementation: str
    dtype: str
    tokenizer_fingerprint: str
    load_in: str = ""
    """8bit or 4bit where the weights were quantised by bitsandbytes."""

    @model_serializer(mode="wrap")
    def _as_before_without_quantisation(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written only where it says something, so that older versions read all other stores."""
        return {name: value for name, value in plain(self).items() if name != "load_in" or value}


class TextIdentity(_Record):
    """The text and how it was cut into rows."""

    dataset: str
    split: str
    revision: str | None = None
    text_column: str
    label_column: str | None = None
    fingerprint: str
    packing: Literal["document", "concat"]
    context: int
    bos_token_id: int | None = None
    special_token_ids: tuple[int, ...] = ()
    seed: int
    held_out: float

    @property
    def template_sha256(self) -> str | None:
        """SHA-256 of the chat template that put messages into words; it is the end of the fingerprint."""
        _, found, sha = self.fingerprint.partition(TEMPLATE)
        return sha if found else None

    @property
    def chat_template(self) -> bool:
        """Whether the text is of conversations, and the flags say whose each token is."""
        return self.template_sha256 is not None

    @model_serializer(mode="wrap")
    def _as_before_without_labels(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written only where it says something, so that older versions read all other stores."""
        return {name: value for name, value in plain(self).items() if name != "label_column" or value is not None}


class Execution(_Record):
    """How the forward passes were run. It is not part of the identity.

    It is recorded and used again on resume, since the last bits of the activations depend on it.
    """

    batch_size: int
    threads: int
    device: str
    device_name: str = ""
    device_map: str = ""
    """How the model was spread over devices; empty: it was on one."""

    @model_serializer(mode="wrap")
    def _as_before_on_one_device(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written only where it says something, so that older versions read all other stores."""
        return {name: value for name, value in plain(self).items() if name != "device_map" or value}


def installed_versions() -> dict[str, str]:
    """Installed versions of the packages that influence the stored bits."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class StoreManifest(_Record):
    """One layer's store: which activations, of which text, in which layout, and how many rows are planned."""

    format_version: int = FORMAT_VERSION
    layer: int = Field(ge=0)
    hook_name: str
    d_model: int
    model: ModelIdentity
    text: TextIdentity
    execution: Execution
    layout: StoreLayout
    planned_rows: int = Field(ge=0)
    finished: bool = False
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = Field(default_factory=installed_versions)

    @model_validator(mode="before")
    @classmethod
    def _name_the_hook(cls, data: Any) -> Any:
        if isinstance(data, dict) and "hook_name" not in data and "layer" in data:
            return {**data, "hook_name": f"blocks.{data['layer']}.hook_resid_post"}
        return data

    @property
    def location(self) -> Location:
        """The layer and the hook point of these activations."""
        return location_of(self.hook_name)

    @property
    def of_language_model(self) -> bool:
        """Whether a language model produced the activations; false of imported vectors."""
        return self.model.architecture != NO_MODEL

    @property
    def plugins(self) -> dict[str, str]:
        """The plug-in that registered the hook point, if any: file name → SHA-256."""
        return {name.removeprefix(PLUGIN): sha for name, sha in self.versions.items() if name.startswith(PLUGIN)}

    @model_validator(mode="after")
    def _one_width_one_context(self) -> StoreManifest:
        if (self.d_model, self.text.context) != (self.layout.d_model, self.layout.context):
            raise ValueError(
                f"manifest says {self.d_model} × {self.text.context}, its layout "
                f"{self.layout.d_model} × {self.layout.context}"
            )
        return self


def first_difference(stored: StoreManifest, asked: StoreManifest) -> str | None:
    """The first field in which the content of two stores differs, as a phrase; None if they hold the same rows.

    Layer, hook point, width, model, text and compression are compared. The plan, the execution, versions and the sizes
    of chunks and shards are not (an existing store keeps its own sizes).
    """
    for name in ("layer", "hook_name", "d_model"):
        old, new = getattr(stored, name), getattr(asked, name)
        if old != new:
            return f"{name}: store has {old!r}, you asked for {new!r}"
    for part in ("model", "text"):
        difference = identity_difference(getattr(stored, part), getattr(asked, part))
        if difference:
            return f"{part}.{difference}"
    if stored.layout.compression != asked.layout.compression:
        return f"compression: store has {stored.layout.compression!r}, you asked for {asked.layout.compression!r}"
    return None


def identity_difference(stored: _Record, asked: _Record, *, leave_out: Collection[str] = ()) -> str | None:
    """The first field in which two records of the same type differ, with both values; None if they agree."""
    for name in type(stored).model_fields:
        old, new = getattr(stored, name), getattr(asked, name)
        if old != new and name not in leave_out:
            return f"{name}: store has {old!r}, you asked for {new!r}"
    return None


def group_document(manifest: StoreManifest) -> dict[str, Any]:
    """The complete ``zarr.json`` of the store's group."""
    record = manifest.model_dump(mode="json")
    return {"zarr_format": 3, "node_type": "group", "attributes": {"tcsae": record, "tcsae_check": checksum(record)}}


def checksum(record: Any) -> str:
    """XXH3-64, in hexadecimal, of a record's canonical JSON: sorted keys, no spaces, UTF-8."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return xxhash.xxh3_64_hexdigest(canonical.encode())


def read_manifest(path: str | Path) -> StoreManifest:
    """Read the manifest of the store at ``path`` (a folder or an fsspec URL).

    Raises:
        StoreError: there is nothing, it is not a store of tcsae, it has a newer format version, or its ``zarr.json``
            is damaged.

    """
    return manifest_at(place_of(path))


def manifest_at(place: Place) -> StoreManifest:
    """As :func:`read_manifest`, for a place that is already opened."""
    try:
        raw = place.read("zarr.json")
    except FileNotFoundError:
        if not place.exists(""):
            raise StoreError(f"there is no store at {place}: `pipeline extract` writes one") from None
        raise StoreError(f"{place} is not an activation store: it has no zarr.json") from None
    try:
        return _parsed(parse_json(raw), place)
    except ValueError as wrong:
        what = f"{place}/zarr.json is damaged (no JSON: {reason(wrong)})"
        raise StoreError(f"{what}: restore it or extract anew with --fresh") from None


def _parsed(document: Any, place: Place) -> StoreManifest:
    attributes = document.get("attributes") if isinstance(document, dict) else None
    record = attributes.get("tcsae") if isinstance(attributes, dict) else None
    if not isinstance(attributes, dict) or not isinstance(record, dict):
        raise StoreError(f"{place} is a Zarr node but not an activation store: it has no 'tcsae' attributes")
    found = record.get("format_version")
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise StoreError(f"{place} has format version {found}, this tcsae reads up to {FORMAT_VERSION}: upgrade tcsae")
    if attributes.get("tcsae_check") != checksum(record):
        raise StoreError(
            f"{place}/zarr.json is damaged (its checksum does not fit): restore it or extract anew with --fresh"
        )
    try:
        return StoreManifest.model_validate(record)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise StoreError(
            f"{place}/zarr.json is damaged at {where} ({first['msg']}): restore it or extract anew"
        ) from None
