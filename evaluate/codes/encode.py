"""``pipeline encode``: the sparse codes of a run's SAE over a store of activations, without the language model.

Shapes: B rows at a time, T positions, D model width, F features, E entries: codes that are not zero.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch

from ... import options
from ...cache.format.layout import PADDING, SPECIAL
from ...cache.format.manifest import identity_difference
from ...cache.storage.open_place import place_of
from ...cache.store import ActivationStore
from ...console import format_bytes, format_count, format_duration, note, parse_count, progress
from ...errors import ResourceError, RunError, UsageError
from ...plugins import changed_plugin, load_plugins
from ...system.allocator import keeping_freed_memory
from ...system.checksums import file_hash
from ...system.device import resolve_device
from ...train.formats.saelens import WEIGHTS
from ...train.run_folder.record import RunRecord, load_run
from ...train.sae.protocol import RowTokens, SparseAutoencoder
from .format import DEFAULT_NAME, OUTLIER, CodesManifest, read_manifest
from .store import CodeStore
from .writer import CodesWriter, Encoded, joined, worth_a_commit

ROWS = ("all", "unseen")
_DENSE_BYTES = 64_000_000  # of the codes that are in memory before their zeros are dropped
_SAMPLE_ROWS = 16  # of the estimate
SPARE = 1.1
"""How much more disk is asked for than is expected to be needed."""


@dataclass(frozen=True)
class EncodeConfig:
    """Whose codes are written, of which rows, and where to.

    Raises:
        UsageError: a value that cannot be.

    """

    run: str
    """Folder of a finished run."""
    store: str | None = None
    """Activation store; None: the one the run was trained on."""
    rows: Literal["all", "unseen"] = "all"
    """``unseen``: only the rows behind those the run was trained on."""
    tokens: int | None = None
    """Encode no more than the rows that hold so many; None: all."""
    part: Literal["all", "sparse"] = "all"
    """``sparse``: of an architecture whose codes are not all sparse, only the part that is."""
    out: str | None = None
    """Folder or URL of the codes; None: ``codes.zarr`` in the run's folder."""
    device: str = "auto"
    plugins: tuple[str, ...] = ()
    """Python files that the run was trained with."""
    fresh: bool = False
    """Begin anew whatever is there."""

    def __post_init__(self) -> None:
        for name, value, known in (("rows", self.rows, ROWS), ("part", self.part, ("all", "sparse"))):
            if value not in known:
                raise UsageError(f"--{name} {value} is unknown: choose one of {', '.join(known)}")
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"--tokens {self.tokens} is no text: use 200k, say")

    @property
    def path(self) -> str:
        """Where the codes are written."""
        return self.out or str(Path(self.run) / DEFAULT_NAME)


class EncodeOptions(TypedDict, total=False):
    """The options of ``pipeline encode`` under their names in Python."""

    store: str | Path | None
    rows: Literal["all", "unseen"] | None
    tokens: int | str | None
    part: Literal["all", "sparse"] | None
    out: str | Path | None
    device: str | None
    plugin: str | Path | list[str | Path] | None
    fresh: bool | None


def encode_config(run: str | Path, **asked: Unpack[EncodeOptions]) -> EncodeConfig:
    """The configuration that options mean.

    Raises:
        UsageError: no such option, or a value that cannot be.

    """
    given = options.chosen(asked, EncodeOptions, "encode")
    if "tokens" in given:
        given["tokens"] = parse_count(given["tokens"])
    if "plugin" in given:
        given["plugins"] = options.several(given.pop("plugin"))
    return EncodeConfig(run=str(run), **given)


@dataclass(frozen=True)
class CodesEstimate:
    """What encoding will take, measured on a few rows."""

    path: str
    rows: int
    tokens: int
    l0: float
    """Codes that are not zero, per token that counts."""
    n_features: int
    n_bytes: int
    seconds: float

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the summary."""
        plain = {"path": self.path, "rows": self.rows, "tokens": self.tokens, "l0": round(self.l0, 2)}
        if as_json:
            return plain | {"bytes": self.n_bytes, "seconds": round(self.seconds, 1)}
        shown = {"tokens": format_count(self.tokens), "disk": format_bytes(self.n_bytes)}
        return plain | shown | {"time": f"about {format_duration(self.seconds)}"}


@dataclass(frozen=True)
class EncodeSummary:
    """What is written."""

    path: str
    rows: int
    entries: int
    n_bytes: int
    seconds: float
    already_complete: bool

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the summary."""
        plain: dict[str, Any] = {"path": self.path, "rows": self.rows, "entries": self.entries}
        if as_json:
            return plain | {"bytes": self.n_bytes, "seconds": round(self.seconds, 1)}
        shown = {"entries": format_count(self.entries), "disk": format_bytes(self.n_bytes)}
        return plain | shown | {"time": format_duration(self.seconds)}


@keeping_freed_memory()
def encode_run(config: EncodeConfig) -> EncodeSummary:
    """Write the codes; go on with what was begun.

    Raises:
        RunError: no such run, not finished, or of another layer, width or model than the store.
        StoreError: another process writes them, or other codes are there.
        ResourceError: the disk does not suffice.

    """
    started = time.perf_counter()
    encoder = _Encoder(config)
    if not config.fresh and place_of(config.path).exists("zarr.json"):
        there = read_manifest(config.path)
        if there.finished and there.difference(encoder.manifest) is None:
            return _summary(config.path, started, already_complete=True)
    estimate = encoder.estimate()
    _check_space(estimate)
    note(
        f"{format_count(estimate.tokens)} tokens × {estimate.l0:.3g} of {estimate.n_features} codes: "
        f"{format_bytes(estimate.n_bytes)}, about {format_duration(estimate.seconds)}"
    )
    with CodesWriter.open(config.path, encoder.manifest, fresh=config.fresh) as writer:
        total, done = encoder.n_rows * encoder.context, writer.n_rows * encoder.context
        with progress("encode", total, done=done) as bar:
            for text, count_N, feature_E, value_E in encoder.parts(writer.n_rows):
                writer.append(text, count_N, feature_E, value_E)
                bar.advance(len(count_N))
        writer.finish()
    return _summary(config.path, started, already_complete=False)


def estimate_encoding(config: EncodeConfig) -> CodesEstimate:
    """What :func:`encode_run` would take; writes nothing."""
    return _Encoder(config).estimate()


def _summary(path: str, started: float, *, already_complete: bool) -> EncodeSummary:
    codes = CodeStore.open(path)
    place = place_of(path)
    n_bytes = sum(
        place.size(f"{folder}/{name}")
        for folder in ("tokens", "documents", "flags", "indptr", "features", "values")
        for name in place.names(folder)
    )
    seconds = time.perf_counter() - started
    return EncodeSummary(path, codes.n_rows, codes.n_entries, n_bytes, seconds, already_complete)


def _check_space(estimate: CodesEstimate) -> None:
    found = place_of(estimate.path).free_bytes()
    if found is not None and estimate.n_bytes * SPARE > found[1]:
        needed, free = format_bytes(estimate.n_bytes), format_bytes(found[1])
        raise ResourceError(
            f"{estimate.path} needs about {needed} and {free} are free: free some space, or ask for fewer --tokens"
        )


class _Encoder:
    """The SAE, the store and the rows of it that are encoded."""

    def __init__(self, config: EncodeConfig):
        record = load_run(config.run)
        if not record.finished:
            raise RunError(
                f"{config.run} has trained {record.steps} of {record.planned_steps} steps: finish it with `pipeline "
                "train` first"
            )
        changed = changed_plugin(record.plugins, load_plugins(config.plugins))
        if changed:
            raise RunError(f"{config.run}: {changed}; give --plugin with the file as it was")
        self._store = ActivationStore.open(config.store or record.store, allow_unfinished=True)
        sae = SparseAutoencoder.load(config.run)
        _check_fits(config.run, record, self._store, sae)
        self._device = resolve_device(config.device)
        self._coder = sae.to(self._device, torch.float32).token_coder()
        self._part, self._path = config.part, config.path
        self.context = self._store.context
        seen = _rows_seen(record, self._store)
        self._first, stop = (seen if config.rows == "unseen" else 0), self._store.n_rows
        if config.tokens is not None:
            stop = min(stop, self._first + -(-config.tokens // self.context))
        if self._first >= stop:
            raise RunError(
                f"{config.run} was trained on all {stop} rows of {self._store.path}: say --rows all, or name a store "
                "with more rows"
            )
        self.n_rows = stop - self._first
        self._limit = self._store.statistics().norm_limit
        self.manifest = CodesManifest(
            run=record.name,
            weights=weights_hash(config.run),
            architecture=sae.label,
            n_features=sae.n_features,
            part=config.part,
            store=config.store or record.store,
            store_fingerprint=self._store.fingerprint(stop),
            store_manifest=self._store.manifest.model_dump(mode="json"),
            first_row=self._first,
            planned_rows=self.n_rows,
            trained_rows=max(0, min(seen, stop) - self._first),
            norm_limit=self._limit,
        )
        self._step = max(1, _DENSE_BYTES // (4 * sae.n_features * self.context * max(1, _window(sae))))

    def estimate(self) -> CodesEstimate:
        """Bytes and seconds, from a few rows in the middle of the store."""
        rows = min(_SAMPLE_ROWS, self.n_rows)
        start = (self.n_rows - rows) // 2
        began = time.perf_counter()
        found = [self._encode(at, min(at + self._step, start + rows)) for at in range(start, start + rows, self._step)]
        seconds = (time.perf_counter() - began) / rows * self.n_rows
        valid = sum(int((text["flags"] == 0).sum()) for text, *_ in found)
        entries = sum(len(feature_E) for _, _, feature_E, _ in found)
        tokens = self.n_rows * self.context
        n_bytes = round(tokens * (9 + 8 + 8 * entries / (rows * self.context)))
        l0 = entries / max(valid, 1)
        return CodesEstimate(self._path, self.n_rows, tokens, l0, self.manifest.n_features, n_bytes, seconds)

    def parts(self, start: int) -> Iterator[Encoded]:
        """All rows from ``start`` on, in parts that are worth a commit."""
        kept: list[Encoded] = []
        for at in range(start, self.n_rows, self._step):
            kept.append(self._encode(at, min(at + self._step, self.n_rows)))
            if worth_a_commit(kept):
                yield joined(kept)
                kept = []
        if kept:
            yield joined(kept)

    @torch.no_grad()
    def _encode(self, start: int, stop: int) -> Encoded:
        first, last = start + self._first, stop + self._first
        x_BTD = self._store.rows(first, last, dtype=torch.float32).to(self._device)
        documents_BT = self._store.documents(first, last)
        flags_BT = self._store.flags(first, last) & (SPECIAL | PADDING)  # whose message a token is of is left out
        outlier_BT = (x_BTD.norm(dim=2) > self._limit).cpu().numpy() & (flags_BT == 0)
        flags_BT[outlier_BT] |= OUTLIER
        valid_BT = torch.from_numpy(flags_BT == 0)
        rows = RowTokens.of(valid_BT, torch.from_numpy(documents_BT.astype(np.int64)), self._device)
        out = self._coder.on_rows(x_BTD, rows)
        z_NF = (out.features if self._part == "all" else out.counted).float().flatten(0, 1)
        z_NF = torch.where(valid_BT.reshape(-1, 1).to(self._device), z_NF, 0.0)
        token_E, feature_E = z_NF.nonzero(as_tuple=True)
        value_E = z_NF[token_E, feature_E].cpu().numpy()
        if not np.isfinite(value_E).all():
            bad = int((~np.isfinite(value_E)).nonzero()[0][0])
            row, position = divmod(int(token_E[bad]), self.context)
            raise RunError(
                f"feature {int(feature_E[bad])} is {value_E[bad]} in row {row + first}, position {position}: the SAE "
                "or the store is damaged"
            )
        text = {"tokens": self._store.tokens(first, last), "documents": documents_BT, "flags": flags_BT}
        count_N = torch.bincount(token_E, minlength=len(z_NF)).cpu().numpy()
        return text, count_N, feature_E.cpu().numpy().astype(np.int32), value_E


def weights_hash(run: str | Path) -> str:
    """The hash of a run's weights file, which says whose codes a store holds.

    Raises:
        RunError: there is none, or it cannot be read.

    """
    return file_hash(Path(run) / WEIGHTS)


def _window(sae: SparseAutoencoder) -> int:
    """How many activations a token's code is computed from at once."""
    return int(getattr(sae, "window", 1)) if sae.sees == "window" else 1


def _rows_seen(record: RunRecord, store: ActivationStore) -> int:
    """Rows at the store's beginning that the run was trained on; none of a store whose rows are others."""
    same = store.n_rows >= record.store_rows and store.fingerprint(record.store_rows) == record.store_fingerprint
    return record.store_rows if same else 0


def _check_fits(run: str, record: RunRecord, store: ActivationStore, sae: SparseAutoencoder) -> None:
    theirs, ours = (store.location, store.d_model), (record.location, sae.d_model)
    if theirs != ours:
        raise RunError(
            f"{store.path} holds layer {theirs[0]}, width {theirs[1]}; {run} is of layer {ours[0]}, width {ours[1]}: "
            "name a store of its layer with --store"
        )
    trained_on = type(store.manifest).model_validate(record.store_manifest).model
    difference = identity_difference(trained_on, store.manifest.model, leave_out=("id", "revision", "gguf_file"))
    if difference:
        raise RunError(
            f"{store.path} is of another language model than {run} ({difference}): name a store of its model"
        )
