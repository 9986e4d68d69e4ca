"""The plan of an extraction, made before anything is written: identities, rows, bytes, and what is already stored.

Settings that the command does not give (commit, dtype, batch size, threads) are taken from an existing store.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ..cache.format.commit_log import agreed, execution_of
from ..cache.format.layout import RowBlock, StoreLayout, plan_layout
from ..cache.format.manifest import (
    PLUGIN,
    Execution,
    ModelIdentity,
    StoreManifest,
    TextIdentity,
    first_difference,
    identity_difference,
    installed_versions,
)
from ..cache.resume import check_space, other_rows, uneven, wiped_bytes
from ..cache.storage.open_place import place_of
from ..cache.store import ActivationStore
from ..console import format_bytes, format_count, format_duration, note
from ..errors import StoreError
from ..plugins import changed_plugin, load_plugins
from ..sites import HOOK_POINTS, Location
from .config import ExtractConfig, command_line
from .model.files import weights_in
from .model.forward import ForwardPass, choose_batch_size, until_it_fits
from .model.hooks import deepest_block
from .model.load import (
    LanguageModel,
    ModelOutline,
    check_context,
    check_layers,
    identify_model,
    load_language_model,
    outline_model,
)
from .text.documents import Documents
from .text.open import open_documents, resolve_text
from .text.rows import Cursor, read_rows


@dataclass(frozen=True)
class Stored:
    """What the stores at the configured paths hold now."""

    manifests: tuple[StoreManifest, ...]
    execution: Execution
    """Execution of the last commit."""
    rows: int
    """Rows in the shortest store; 0 if a store is missing."""
    finished: bool
    cursor: Cursor
    """Text position after the last commit."""


@dataclass(frozen=True)
class Plan:
    """A complete plan."""

    config: ExtractConfig
    """The configuration with all automatic choices made, except for the batch size."""
    outline: ModelOutline
    documents: Documents
    text: TextIdentity
    layout: StoreLayout
    stored: Stored | None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do, provided that the stores hold the requested rows (see :meth:`check_same`)."""
        stored = self.stored
        return stored is not None and stored.finished and (stored.rows >= self.config.rows or stored.cursor.end)

    def check_same(self, model: ModelIdentity) -> None:
        """Check that the stores hold what is requested.

        Raises:
            StoreError: they hold other rows; the first differing field is named.

        """
        for stored in self.stored.manifests if self.stored else ():
            asked = self.manifests(model, stored.execution)[stored.location]
            if difference := first_difference(stored, asked):
                raise StoreError(other_rows(self.config.paths[stored.location], difference))

    @property
    def store_bytes(self) -> int:
        """Bytes of one finished store, uncompressed."""
        return self.layout.store_bytes(self.config.rows)

    @property
    def bytes_free(self) -> int | None:
        """Bytes free on the disk of the first store; None on object storage."""
        free = place_of(next(iter(self.config.paths.values()))).free_bytes()
        return free[1] if free else None

    def manifests(self, model: ModelIdentity, execution: Execution) -> dict[Location, StoreManifest]:
        """Location → manifest of its store."""
        versions = installed_versions()
        return {
            at: StoreManifest(
                layer=at.layer,
                hook_name=at.hook_name,
                d_model=self.layout.d_model,
                model=model,
                text=self.text,
                execution=execution,
                layout=self.layout,
                planned_rows=self.config.rows,
                versions=versions | _plugin_version(at),
            )
            for at in self.config.locations
        }


def _plugin_version(at: Location) -> dict[str, str]:
    """The manifest's entry for the plug-in of the location's hook point: name and SHA-256 of the file."""
    return {f"{PLUGIN}{name}": sha for name, sha in _plugin_of(at).items()}


def _plugin_of(at: Location) -> dict[str, str]:
    owner = HOOK_POINTS.owner(at.site)
    return {} if owner is None else load_plugins([owner])


def make_plan(config: ExtractConfig, *, elsewhere: bool = False) -> Plan:
    """Open model and text, read what is stored, and check that the remaining rows fit on the disk. Loads no weights.

    ``elsewhere``: the forward passes run on other machines, whose device and dtype the configuration names.

    Raises:
        ModelError, TextError: as ``outline_model`` and ``open_documents``; or there is no such layer.
        StoreError: a path holds something that is not a store.
        ResourceError: the disk is too small; the message gives the bytes needed and free.

    """
    asked, stores = config, {} if config.fresh else _open_stores(config)
    stored = _stored(stores, config)
    config = _recall(config, stored)
    outline = outline_model(config.model, elsewhere=elsewhere)
    check_layers(outline, config.layers)
    _check_plugins(config, stored)
    check_context(outline.config, outline.files.name, config.text.context)
    documents = open_documents(config.text)
    config = replace(config, model=outline.source, text=replace(config.text, revision=documents.revision))
    layout = _layout(config, outline, stored)
    plan = Plan(config, outline, documents, resolve_text(config.text, outline, documents), layout, stored)
    rows = stored.rows if stored else 0
    announce(plan)
    _check_together(asked, plan, stores)
    check_space(
        {at: place_of(path) for at, path in config.paths.items()},
        dict.fromkeys(config.paths, layout),
        config.rows,
        min(rows, config.rows),
        fresh=config.fresh,
    )
    if not rows:
        next(read_rows(config.text, outline, documents, Cursor()))  # fail on bad text before a store is created
    return plan


def look(config: ExtractConfig) -> Stored | None:
    """What is stored at the configured paths; None if there is no store at any of them."""
    return _stored(_open_stores(config), config)


def _open_stores(config: ExtractConfig) -> dict[Location, ActivationStore]:
    present = {at: path for at, path in config.paths.items() if place_of(path).exists("zarr.json")}
    stores = {at: ActivationStore.open(path, allow_unfinished=True) for at, path in present.items()}
    for at, store in stores.items():
        if store.location != at:
            raise StoreError(other_rows(store.path, f"it holds layer {store.location}, you asked for layer {at}"))
    return stores


def _check_plugins(config: ExtractConfig, stored: Stored | None) -> None:
    """Check that the plug-ins of stored hook points are given again and unchanged.

    Raises:
        StoreError: a plug-in has changed, or is another one.

    """
    for manifest in stored.manifests if stored else ():
        if difference := changed_plugin(manifest.plugins, _plugin_of(manifest.location)):
            path = config.paths[manifest.location]
            raise StoreError(f"{path} cannot go on: {difference}; or begin it anew with --fresh")


def _stored(present: Mapping[Location, ActivationStore], config: ExtractConfig) -> Stored | None:
    if not present:
        return None
    stores = list(present.values())
    shortest = min(stores, key=lambda store: store.n_rows)
    last = shortest.commits[-1] if shortest.commits else None
    execution = execution_of(last, shortest.manifest) if last else shortest.manifest.execution
    whole = len(present) == len(config.paths)
    return Stored(
        manifests=tuple(store.manifest for store in stores),
        execution=execution,
        rows=shortest.n_rows if whole else 0,
        finished=whole and all(store.finished for store in stores),
        cursor=Cursor.read(last.cursor if last else None),
    )


def _check_together(asked: ExtractConfig, plan: Plan, stores: Mapping[Location, ActivationStore]) -> None:
    """Refuse stores that hold different rows; it is checked here, before the weights are loaded.

    Raises:
        StoreError: the stores differ; the message has the command that extracts what is missing.

    """
    rows = {at: stores[at].n_rows if at in stores else 0 for at in asked.paths}
    logs = {at: stores[at].commits if at in stores else [] for at in asked.paths}
    finished = [at for at, store in stores.items() if store.finished]
    shard_rows = {store.layout.shard_rows for store in stores.values()}
    apart = len(stores) < len(rows) or agreed(logs, finished) is None
    if plan.complete or not any(rows.values()) or not (apart or len(shard_rows) > 1):
        return
    paths = {asked.paths[at]: n for at, n in rows.items()}
    behind = [at for at, n in rows.items() if n < max(rows.values())]
    if len(shard_rows) > 1 or not behind:
        raise StoreError(uneven(paths, shard_rows))
    for store in stores.values():
        if difference := identity_difference(store.manifest.text, plan.text):
            raise StoreError(other_rows(store.path, f"text.{difference}"))
    planned = max(store.manifest.planned_rows for store in stores.values())
    tokens = asked.tokens if asked.rows == planned else planned * asked.text.context
    commands = [command_line(each) for each in _covering(replace(asked, tokens=tokens), behind)]
    raise StoreError(f"{uneven(paths, shard_rows)}; the same rows, by itself: {'; then '.join(commands)}")


def _covering(config: ExtractConfig, locations: Sequence[Location]) -> list[ExtractConfig]:
    """Extractions that together fill exactly these locations, one for all layers that lack the same sites."""
    lacking: dict[tuple[str, ...], list[int]] = {}
    for layer in dict.fromkeys(at.layer for at in locations):
        lacking.setdefault(tuple(at.site for at in locations if at.layer == layer), []).append(layer)
    return [replace(config, layers=tuple(layers), sites=sites) for sites, layers in lacking.items()]


def _recall(config: ExtractConfig, stored: Stored | None) -> ExtractConfig:
    if stored is None:
        return config
    model, text = stored.manifests[0].model, stored.manifests[0].text
    dtype = model.dtype if config.model.dtype == "auto" else config.model.dtype
    return replace(
        config,
        model=replace(config.model, dtype=dtype, revision=config.model.revision or model.revision),
        text=replace(config.text, revision=config.text.revision or text.revision),
        batch_size=config.batch_size or stored.execution.batch_size,
    )


def _layout(config: ExtractConfig, outline: ModelOutline, stored: Stored | None) -> StoreLayout:
    existing = stored.manifests[0].layout if stored else None
    if existing and (existing.d_model, existing.context) == (outline.d_model, config.text.context):
        return replace(existing, compression=config.compression)
    return plan_layout(
        outline.d_model,
        config.text.context,
        compression=config.compression,
        shard_bytes=config.shard_bytes,
        planned_rows=config.rows,
    )


def announce(plan: Plan) -> None:
    """Print the plan: rows, bytes per layer, rows already stored, free disk space."""
    config, rows = plan.config, plan.config.rows
    tokens = f"{rows:,} rows of {config.text.context} tokens ({format_count(rows * config.text.context)})"
    layers = f"layers {' '.join(map(str, sorted(config.layers)))} of {plan.outline.n_layers}"
    if config.sites != ExtractConfig.sites:
        layers += f", sites {' '.join(config.sites)}"
    note(f"plan: {tokens} of {plan.text.dataset} through {plan.outline.files.name}, {layers}")
    space = f"; {format_bytes(plan.bytes_free)} free" if plan.bytes_free is not None else ""
    if config.fresh and (freed := sum(wiped_bytes(place_of(path)) for path in config.paths.values())):
        space += f", and {format_bytes(freed)} that --fresh removes"
    total = plan.store_bytes * len(config.paths)
    each = "layer" if len(config.sites) == 1 else "store"
    note(f"      {format_bytes(plan.store_bytes)} per {each}, {format_bytes(total)} together under {config.out}{space}")
    if plan.stored and plan.stored.rows:
        note(f"      {plan.stored.rows:,} rows are there already")


def resolve_execution(plan: Plan, batch_size: int) -> Execution:
    """Device, threads and batch size of this run; the recorded number of threads, if this machine has as many."""
    device = torch.device(plan.outline.source.device)
    threads = torch.get_num_threads()
    if plan.stored and plan.stored.execution.threads <= (os.cpu_count() or 1):
        threads = plan.stored.execution.threads
    return Execution(
        batch_size=batch_size,
        threads=threads,
        device=device.type,
        device_name=describe_execution(device),
        device_map=plan.outline.source.device_map,
    )


def describe_execution(device: torch.device) -> str:
    """The name of the GPU, or of this machine's processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    import platform
    from pathlib import Path

    info: Any = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Estimate:
    """The plan in numbers. The speed is None if the weights are not on this machine yet."""

    rows: int
    tokens: int
    rows_stored: int
    bytes_per_layer: int
    bytes_together: int
    bytes_free: int | None
    batch_size: int | None
    tokens_per_second: float | None

    @property
    def seconds(self) -> float | None:
        """Estimated time for the rows that are not stored yet."""
        left = max(0, self.rows - self.rows_stored) * (self.tokens // self.rows)
        return left / self.tokens_per_second if self.tokens_per_second else None

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """The facts for the closing summary."""
        if as_json:
            return {**asdict(self), "seconds": self.seconds}
        seconds = self.seconds
        speed = (
            f"about {format_duration(seconds)} at {self.tokens_per_second:,.0f} tokens/s"
            if seconds is not None
            else None
        )
        return {
            "rows": f"{self.rows:,} ({format_count(self.tokens)} tokens), {self.rows_stored:,} stored already",
            "disk": f"{format_bytes(self.bytes_per_layer)} per layer, {format_bytes(self.bytes_together)} together",
            "free": format_bytes(self.bytes_free) if self.bytes_free is not None else "not known here",
            "time": speed or "unknown until the weights are downloaded",
        }


def estimate(config: ExtractConfig) -> Estimate:
    """Make the plan and measure the speed of this machine.

    Raises:
        ModelError, TextError, StoreError, ResourceError: as ``make_plan``.

    """
    plan = make_plan(config)
    speed, batch_size = None, config.batch_size
    if plan.outline.files.gguf_file or weights_in(plan.outline.files.folder):
        speed, batch_size = _time_forward(plan)
    return Estimate(
        rows=plan.config.rows,
        tokens=plan.config.rows * plan.config.text.context,
        rows_stored=plan.stored.rows if plan.stored else 0,
        bytes_per_layer=plan.store_bytes,
        bytes_together=plan.store_bytes * len(config.paths),
        bytes_free=plan.bytes_free,
        batch_size=batch_size,
        tokens_per_second=speed,
    )


def _time_forward(plan: Plan) -> tuple[float, int]:
    lm = load_language_model(
        plan.outline, deepest_layer=deepest_block(plan.config.locations), identity=identify_model(plan.outline)
    )
    batch_size = plan.config.batch_size or choose_batch_size(lm, plan.layout, plan.config.rows)
    execution = resolve_execution(plan, batch_size)
    torch.set_num_threads(execution.threads)
    return until_it_fits(lambda now: _time_batch(plan, lm, now.batch_size), execution, lm.identity.id, lambda _: None)


def _time_batch(plan: Plan, lm: LanguageModel, batch_size: int) -> tuple[float, int]:
    shape = (batch_size, plan.config.text.context)
    tokens_BT = np.random.default_rng(0).integers(0, lm.vocab_size, shape).astype(np.int32)
    block = RowBlock(tokens_BT, np.zeros(shape, np.int32), np.zeros(shape, np.uint8))
    forward = ForwardPass(lm, plan.config.locations, batch_size)
    forward.launch(block).result()
    began = time.perf_counter()
    forward.launch(block).result()
    return tokens_BT.size / (time.perf_counter() - began), batch_size
