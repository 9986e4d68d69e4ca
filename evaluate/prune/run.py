"""``pipeline prune``: a run's SAE without near-duplicate and position-locked features, as a run of its own beside it.

Shapes: B rows, T positions, D model width, F features. What is redundant is decided on the store the run was trained
on; the evaluation of the new run beside the old one then uses held-out text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ...cache.store import ActivationStore
from ...console import progress
from ...errors import RunError
from ...system.allocator import keeping_freed_memory
from ...system.atomic_files import PARTIAL, remove_partials, write_json
from ...system.device import resolve_device
from ...train.run_folder.record import RECORD, RunRecord, load_run
from ...train.sae.protocol import SparseCoder
from ...train.sae.temporal_sae import TemporalSAE
from ..metrics.active_entries import ActiveEntries
from ..metrics.position import PositionStatistics
from ..protocol import TokenBatch
from .config import PruneConfig
from .elimination import Elimination, GainFit, eliminate, plan_elimination

PRUNE_RECORD = "prune.json"
_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Quality:
    """How an SAE does on the tokens looked at."""

    n_features: int
    mse_per_token: float
    explained_variance: float | None
    l0: float


@dataclass(frozen=True)
class PruneSummary:
    """What was eliminated and what it cost."""

    folder: str | None
    """The new run; None where nothing was redundant, and nothing written."""
    run: str
    tokens: int
    before: Quality
    after: Quality
    merged: dict[int, list[int]] = field(default_factory=dict)
    """Surviving feature (its old number) → the features merged into it."""
    dropped: list[int] = field(default_factory=list)
    """Position-locked features, old numbers."""


@keeping_freed_memory()
def prune_run(config: PruneConfig) -> PruneSummary:
    """Write the pruned run and say what it cost; see :mod:`elimination` for the rules.

    Raises:
        RunError: no such run, not finished, its store does not fit, or the new folder exists.

    """
    folder = Path(config.run)
    record = load_run(folder)
    if not record.finished:
        raise RunError(
            f"{folder} has trained {record.steps} of {record.planned_steps} steps: finish it with `pipeline train` "
            "first"
        )
    out = Path(config.out) if config.out else folder.with_name(folder.name + "-pruned")
    if out.exists() and not _cut_short(out):
        raise RunError(f"{out} exists already: remove it or choose another folder with --out")
    sae = TemporalSAE.load(folder).to(resolve_device(config.device))
    batches = _Batches(_open(config, record, sae), config.tokens, sae.W_dec.device)
    plan, mean_F = _survey(sae, batches, config)
    if len(plan.kept_K) == 0:
        raise RunError(f"every feature of {folder} is position-locked: raise --min-eta-squared")
    if len(plan.kept_K) == sae.n_features:
        same = _compare(sae, sae, batches)
        return PruneSummary(None, str(folder), batches.n_tokens, *same)
    new = eliminate(sae, plan, mean_F)
    _fit_gains(sae, new, plan, batches)
    before, after = _compare(sae, new, batches)
    summary = PruneSummary(str(out), str(folder), batches.n_tokens, before, after, *_names(plan))
    _write(new, record, config, summary, out)
    return summary


def _cut_short(out: Path) -> bool:
    """Whether a folder holds nothing, or what an elimination that was stopped left there."""
    if not out.is_dir() or (out / RECORD).exists():
        return False
    return (out / PRUNE_RECORD).exists() or all(file.name.endswith(PARTIAL) for file in out.iterdir())


def _open(config: PruneConfig, record: RunRecord, sae: TemporalSAE) -> ActivationStore:
    store = ActivationStore.open(config.store or record.store, allow_unfinished=True)
    if (store.location, store.d_model) != (record.location, sae.d_model):
        theirs = f"{store.path} holds layer {store.location}, width {store.d_model}"
        raise RunError(
            f"{theirs}; the run is of layer {record.location}, width {sae.d_model}: name its own store with --store"
        )
    return store


class _Batches:
    """The first rows of a store as token batches, again and again."""

    def __init__(self, store: ActivationStore, tokens: int, device: torch.device):
        self._store, self._device = store, device
        self._rows = min(store.n_rows, -(-tokens // store.context))
        self._limit = store.statistics().norm_limit
        self.context, self.n_tokens = store.context, 0

    def __call__(self, label: str) -> Iterator[TokenBatch]:
        step = max(1, _TOKENS_AT_ONCE // self.context)
        self.n_tokens = 0
        with progress(label, total=self._rows * self.context, unit="tokens") as bar:
            for start in range(0, self._rows, step):
                batch = self._batch(start, min(start + step, self._rows))
                self.n_tokens += int(batch.valid_BT.sum())
                yield batch
                bar.advance(batch.valid_BT.numel())

    def _batch(self, start: int, stop: int) -> TokenBatch:
        x_BTD = self._store.rows(start, stop, dtype=torch.float32).to(self._device)

        def text(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.int64)).to(self._device)

        real_BT = text(self._store.flags(start, stop)) == 0
        row_B = torch.arange(start, stop, device=self._device)
        nothing_BT = torch.full(real_BT.shape, -1, device=self._device)
        return TokenBatch(
            x_BTD=x_BTD,
            tokens_BT=text(self._store.tokens(start, stop)),
            documents_BT=text(self._store.documents(start, stop)),
            units_BT=row_B[:, None].expand(-1, self.context),
            valid_BT=real_BT & (x_BTD.norm(dim=2) <= self._limit),
            real_BT=real_BT,
            rows_B=row_B,
            labels_BT=nothing_BT,
            classes_BT=nothing_BT,
        )


@torch.no_grad()
def _survey(sae: TemporalSAE, batches: _Batches, config: PruneConfig) -> tuple[Elimination, Tensor]:
    """What to eliminate, and the mean activation of every feature."""
    position = PositionStatistics(cast(SparseCoder, sae), context=batches.context, seed=config.seed)
    sum_F, square_F = (torch.zeros(sae.n_features, dtype=torch.float64, device=sae.W_dec.device) for _ in range(2))
    for batch in batches("looking for redundant features"):
        active = ActiveEntries.from_dense(sae.encode(batch.x_BTD), batch.valid_BT)
        position.update(batch, active, batch.x_BTD)
        sum_F += active.per_feature(active.value_E)
        square_F += active.per_feature(active.value_E**2)
    found = position.result().per_feature
    locked = (found["position_q"] <= config.false_discovery_rate) & (found["eta_squared"] >= config.min_eta_squared)
    W_dec = sae.W_dec.detach()
    energy_F = square_F * W_dec.double().square().sum(1)
    dropped_F = torch.from_numpy(locked).to(W_dec.device)
    plan = plan_elimination(W_dec, energy_F, dropped_F, min_cosine=config.min_cosine)
    return plan, sum_F / max(batches.n_tokens, 1)


@torch.no_grad()
def _fit_gains(old: TemporalSAE, new: TemporalSAE, plan: Elimination, batches: _Batches) -> None:
    if not plan.n_merged:
        return
    fit = GainFit(old, new, plan)
    for batch in batches("fitting merged features"):
        x_ND = batch.x_BTD[batch.valid_BT]
        fit.update(old.encode(x_ND), new.encode(x_ND))
    fit.apply()


@torch.no_grad()
def _compare(old: TemporalSAE, new: TemporalSAE, batches: _Batches) -> tuple[Quality, Quality]:
    """Both SAEs on the same tokens."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    total_D, square = torch.zeros(old.d_model, dtype=torch.float64), 0.0
    for batch in batches("measuring the effect"):
        x_ND = batch.x_BTD[batch.valid_BT]
        for at, sae in enumerate((old, new)):
            out = sae(x_ND)
            sums[at, 0] += float((x_ND - out.reconstruction).double().square().sum())
            sums[at, 1] += float((out.features != 0).sum())
        total_D += x_ND.double().sum(0).cpu()
        square += float(x_ND.double().square().sum())
    n = max(batches.n_tokens, 1)
    variance = square / n - float((total_D / n).square().sum())
    return tuple(  # pyright: ignore[reportReturnType] - of two
        Quality(
            sae.n_features, float(error) / n, 1 - float(error) / n / variance if variance > 0 else None, float(l0) / n
        )
        for sae, (error, l0) in zip((old, new), sums, strict=True)
    )


def _names(plan: Elimination) -> tuple[dict[int, list[int]], list[int]]:
    merged: dict[int, list[int]] = {}
    for feature, leader in enumerate(plan.leader_F.tolist()):
        if leader != feature and not bool(plan.dropped_F[feature]):
            merged.setdefault(leader, []).append(feature)
    return merged, plan.dropped_F.nonzero().squeeze(1).tolist()


def _write(new: TemporalSAE, record: RunRecord, config: PruneConfig, summary: PruneSummary, out: Path) -> None:
    """What was done, which says whose folder this is, then weights, then the record that makes it a finished run."""
    # The record describes the new SAE: what reads it (a model card, a report) must not find the old width.
    sizes = {"width": new.n_features} | ({} if new.activation.k is None else {"k": new.activation.k})
    settings = {**record.config, "sae": {**record.config["sae"], **sizes}}
    new.metadata = {**new.metadata, "tcsae_run": out.name, "pruned_from": record.name}
    write_json(out / PRUNE_RECORD, {"config": asdict(config), **asdict(summary)}, indent=1)
    new.cpu().save(out)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    record.model_copy(
        update={"name": out.name, "twin": None, "config": settings, "metrics": {}, "created": created}
    ).save(out)
    remove_partials(out)
