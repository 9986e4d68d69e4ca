"""The configuration of an extraction: three frozen records that check their values. Imports nothing heavy."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict, Unpack

from .. import options
from ..console import parse_count
from ..errors import UsageError
from ..plugins import load_plugins
from ..sites import HOOK_POINTS, RESIDUAL, Location
from ..system.untrusted_files import seed_number

if TYPE_CHECKING:
    from ..cache.format.manifest import ModelIdentity, TextIdentity

Packing = Literal["document", "concat"]
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class ModelSource:
    """Which language model, and how to run it."""

    id: str = "google/gemma-2-2b"
    """A hub id, a folder that ``save_pretrained`` wrote, a ``.gguf`` file, or ``demo``."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: str | None = None
    """A GGUF file inside the folder or hub repository."""
    device: str = "auto"
    """``cuda``, ``cuda:1``, ``cpu`` …; ``auto`` takes the GPU if there is one."""
    dtype: str = "auto"
    """Weights and arithmetic: ``bfloat16``, ``float32``, or ``auto`` (bfloat16 if it is fast). Stores are bfloat16."""
    device_map: str = ""
    """How a model that is larger than one GPU is spread by accelerate: ``auto``, ``balanced``, ``balanced_low_0``,
    ``sequential``, or a JSON file of module → device, ``cpu`` or ``disk``. Empty: it lies on ``device``.
    """
    load_in: str = ""
    """``8bit`` or ``4bit``: weights quantised by bitsandbytes; empty: as they are."""

    @property
    def is_placed(self) -> bool:
        """Whether it is put where it belongs while it is loaded, not moved to ``device`` afterwards."""
        return bool(self.device_map or self.load_in)

    def __post_init__(self):
        if self.load_in not in ("", "8bit", "4bit"):
            raise UsageError(f"--load-in {self.load_in} is unknown: choose 8bit or 4bit, or leave it out")
        if self.device_map and self.device_map not in DEVICE_MAPS and not self.device_map.endswith(".json"):
            known = ", ".join(DEVICE_MAPS)
            raise UsageError(f"--device-map {self.device_map} is unknown: choose one of {known}, or a .json file")
        if self.is_placed and (self.gguf_file or self.id.endswith(".gguf")):
            raise UsageError("--device-map and --load-in are not for GGUF files: give the model's own weights")
        if not self.id:
            raise UsageError("--model is empty: give a hub id, a folder or a .gguf file")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise UsageError(f"--dtype {self.dtype} is unknown: choose auto, bfloat16 or float32")


@dataclass(frozen=True)
class TextSource:
    """Which text, and how it is cut into rows."""

    dataset: str = "Skylion007/openwebtext"
    """A hub id (``id:subset`` where the dataset has several), a local file or folder, or ``demo``."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset or of a local folder that has splits; other local text has only ``train``."""
    text_column: str = "text"
    """The column that holds the text, in anything but ``.txt`` files."""
    label_column: str | None = None
    """The column that holds each document's label, in anything but ``.txt`` files (these have it from their folder)."""
    packing: Packing = "document"
    """``document``: no row mixes documents, tails shorter than a row are dropped. ``concat``: documents are joined."""
    context: int = 128
    """Tokens per row, the beginning-of-sequence token included."""
    seed: int = 0
    """Decides the order of the documents."""
    held_out: float = 0.01
    """Share of documents that are never extracted, chosen by a hash of their text; evaluation uses these."""
    chat_template: bool = False
    """Whether the column holds messages, which the tokenizer's chat template puts into words."""

    def __post_init__(self):
        if not self.dataset:
            raise UsageError("--dataset is empty: give a hub id, a file, a folder or 'demo'")
        if self.packing not in ("document", "concat"):
            raise UsageError(f"--packing {self.packing} is unknown: choose document or concat")
        if self.context < 2:
            raise UsageError(f"--context {self.context} leaves no room for a token after the first: use at least 2")
        if not 0 <= self.held_out < 1:
            raise UsageError(f"--held-out {self.held_out} is no share: use a number from 0 up to, not including, 1")
        seed_number(self.seed)


@dataclass(frozen=True)
class ExtractConfig:
    """One extraction: a model, a text, and the stores to fill."""

    layers: tuple[int, ...]
    """Blocks whose activations are stored, counted from 0."""
    model: ModelSource = field(default_factory=ModelSource)
    text: TextSource = field(default_factory=TextSource)
    tokens: int = 10_000_000
    """Tokens per layer, rounded up to whole rows; a finished store that holds fewer is extended."""
    batch_size: int | None = None
    """Rows per forward pass; None: chosen for the device, and recorded."""
    out: str = "cache"
    """Folder or object-store URL for the stores: ``lL.zarr`` for layer L, ``lL.SITE.zarr`` for other hook points."""
    compression: Literal["none", "lz4", "zstd"] = "none"
    """How the stores are compressed on disk."""
    shard_bytes: int = 256_000_000
    """Approximate bytes of activations in one shard, which is committed as a whole."""
    fresh: bool = False
    """Delete stores that are already there instead of resuming them."""
    workers: int | None = None
    """Number of processes of a local Dask cluster; None: run in this process."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers run the forward passes."""
    sites: tuple[str, ...] = (RESIDUAL,)
    """Hook points that are stored of every layer, all from one forward pass."""
    plugins: tuple[str, ...] = ()
    """Python files that register hook points."""

    def __post_init__(self):
        load_plugins(self.plugins)
        if not self.sites:
            raise UsageError(f"no site was named: say for instance --site {RESIDUAL}")
        for site in self.sites:
            HOOK_POINTS.check(site)
        if len(set(self.sites)) < len(self.sites):
            raise UsageError(f"--site {' '.join(self.sites)} names one twice")
        if not self.layers:
            raise UsageError("no layers were named: say for instance --layers 5 12 19")
        if len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise UsageError(f"--layers {' '.join(map(str, self.layers))} must be different numbers from 0 up")
        if self.tokens < 1:
            raise UsageError(f"--tokens {self.tokens} asks for nothing: use 1 or more")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size} must be at least 1, or auto")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers {self.workers} must be at least 1")
        if self.workers and self.scheduler:
            raise UsageError("--workers starts a cluster of its own and --scheduler names one: give only one of them")

    @property
    def rows(self) -> int:
        """Rows that the requested tokens fill."""
        return -(-self.tokens // self.text.context)

    @property
    def locations(self) -> tuple[Location, ...]:
        """All layers and sites: layers in ascending order, and for each the sites in the given order."""
        return tuple(Location(layer, site) for layer in sorted(self.layers) for site in self.sites)

    @property
    def paths(self) -> dict[Location, str]:
        """The path of each store, in the order of :attr:`locations`."""
        return {at: f"{self.out.rstrip('/')}/{at.short}.zarr" for at in self.locations}


class ExtractOptions(TypedDict, total=False):
    """The options of ``pipeline extract`` under their names in Python; None means the default."""

    layers: Required[int | Sequence[int]]
    """Layers whose activations are stored, from 0."""
    site: str | Sequence[str] | None
    """Hook points that are stored of each layer."""
    model: str | Path | None
    """Hub id, folder, .gguf file, or ``demo``."""
    dataset: str | Path | None
    """Hub id (or ``id:subset``), text files or a folder of them, or ``demo``."""
    tokens: int | str | None
    """Tokens per layer, as a number or as ``200k``, ``10M``, ``1B``."""
    context: int | None
    packing: Packing | None
    held_out: float | None
    seed: int | None
    split: str | None
    text_column: str | None
    label_column: str | None
    """The column with each document's label: its topic, say."""
    chat_template: bool | None
    """Whether the column holds messages, which the tokenizer's chat template puts into words."""
    dataset_revision: str | None
    revision: str | None
    gguf_file: str | None
    device: str | None
    dtype: str | None
    device_map: str | None
    """``auto``: a model larger than one GPU is spread over all, the CPU's memory and the disk (accelerate)."""
    load_in: Literal["8bit", "4bit"] | None
    """Quantised weights (bitsandbytes)."""
    batch_size: int | str | None
    """Rows per forward pass, or ``auto``."""
    out: str | Path | None
    compression: Literal["none", "lz4", "zstd"] | None
    shard_bytes: int | str | None
    fresh: bool | None
    workers: int | None
    scheduler: str | None
    plugin: str | Path | Sequence[str | Path] | None
    """Python files that register hook points."""


# Option → field of the model's or the text's record; all other options are fields of ExtractConfig.
MODEL_OPTIONS = {"model": "id", "revision": "revision", "gguf_file": "gguf_file", "device": "device", "dtype": "dtype"}
MODEL_OPTIONS |= {"device_map": "device_map", "load_in": "load_in"}
TEXT_OPTIONS = {"dataset": "dataset", "dataset_revision": "revision"}
TEXT_OPTIONS |= {
    name: name
    for name in ("split", "text_column", "label_column", "chat_template", "packing", "context", "seed", "held_out")
}


def extract_config(**asked: Unpack[ExtractOptions]) -> ExtractConfig:
    """The configuration for these options; an option that is not given has the default of its record.

    Raises:
        UsageError: there is no such option, or a value is impossible.

    """
    given = options.chosen(asked, ExtractOptions, "extract")
    rest = {name: value for name, value in given.items() if name not in {**MODEL_OPTIONS, **TEXT_OPTIONS}}
    rest["layers"] = options.several(rest.get("layers", ()))
    for name in ("site", "plugin"):
        if name in rest:
            rest[f"{name}s"] = options.several(rest.pop(name))
    for name in ("tokens", "shard_bytes"):
        if name in rest:
            rest[name] = parse_count(rest[name])
    size = rest.pop("batch_size", "auto")
    if size != "auto":
        if not str(size).isdigit():
            raise UsageError(f"--batch-size {size} must be a number, or auto")
        rest["batch_size"] = int(size)
    model = ModelSource(**options.fields(given, MODEL_OPTIONS))
    return ExtractConfig(model=model, text=TextSource(**options.fields(given, TEXT_OPTIONS)), **rest)


def model_source(identity: ModelIdentity, *, device: str = "auto") -> ModelSource:
    """The model of a store's manifest, at the recorded commit and in the recorded dtype."""
    known = {"revision": identity.revision, "gguf_file": identity.gguf_file, "load_in": identity.load_in}
    return ModelSource(identity.id, device=device, dtype=identity.dtype, **known)


def text_source(identity: TextIdentity) -> TextSource:
    """The text of a store's manifest, cut and ordered as recorded."""
    return TextSource(**{f.name: getattr(identity, f.name) for f in fields(TextSource)})


def command_line(config: ExtractConfig) -> str:
    """The shell command that continues this extraction: all settings that are not defaults, without ``--fresh``."""
    words = ["pipeline", "extract", "--layers", *map(str, config.layers)]
    words += [word for flag, name in _LISTS.items() for word in _several(flag, getattr(config, name), name)]
    for part, default in ((config.model, ModelSource()), (config.text, TextSource()), (config, ExtractConfig((0,)))):
        for name in (f.name for f in fields(part)):
            value = getattr(part, name)
            if name not in ("layers", "model", "text", "fresh", *_LISTS.values()) and value != getattr(default, name):
                words += [_flag(part, name)] if value is True else [_flag(part, name), _word(value)]
    return shlex.join(words)


_LISTS = {"--site": "sites", "--plugin": "plugins"}


def _several(flag: str, values: tuple[str, ...], name: str) -> list[str]:
    return [] if values == getattr(ExtractConfig, name) else [flag, *values]


def _flag(part: Any, name: str) -> str:
    names = MODEL_OPTIONS if isinstance(part, ModelSource) else TEXT_OPTIONS if isinstance(part, TextSource) else {}
    option = next((option for option, field_name in names.items() if field_name == name), name)
    return f"--{option.replace('_', '-')}"


def _word(value: Any) -> str:
    return "auto" if value is None else str(value)
