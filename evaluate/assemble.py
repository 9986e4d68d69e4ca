"""From measured rows to the report: scores against the references, intervals, paired differences, training curves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.format.manifest import TextIdentity
from ..errors import TcsaeError
from ..sites import Location
from ..train.run_folder.metrics_log import read_metrics
from .config import ACTIVATIONS
from .cost import DEFINITIONS as COST
from .cost import cost_metrics
from .intervals.bootstrap import Resampler
from .intervals.jackknife import Jackknifed
from .metrics.fidelity import OUTLIERS
from .metrics.fidelity import definitions as fidelity_definitions
from .metrics.saebench import SAEBenchSums
from .model.heldout_text import HeldOutText
from .protocol import UnitSums
from .results import MADE_OF_ANOTHER, Definition, EvaluationReport, Metric, Paired, Record, TextFacts, TrainingCurves
from .table_row import MeasuredRow

L0_TOLERANCE = 0.05
"""A pair whose L0 differs by a larger share is not compared at equal sparsity."""
_OF_THE_MODEL = (
    *("ce_clean", "kl_noise_floor", "activation_", "same_token_activation", "prefix_shift_activation"),
    *("probe_activation_", "boundary_activation"),
)
"""Metrics whose names begin so depend on model and text alone: they are the same for both sides of a pair."""
_TERMS = ("reconstruction", "sparsity", "temporal", "auxiliary")


def compose(
    rows: Sequence[MeasuredRow], text: HeldOutText, *, identity: TextIdentity, seed: int, **facts: Any
) -> EvaluationReport:
    """The report of these rows, all measured on ``text``; ``facts`` are its remaining fields."""
    resampler = Resampler.of(text.unit_documents, seed)
    records = [record_of(row, rows, resampler) for row in rows]
    known: dict[str, Definition] = fidelity_definitions() | COST
    for row in rows:
        known |= row.definitions
    used = {metric.definition for record in records for metric in record.metrics.values()}
    used |= {curve.definition for record in records for curve in record.curves.values()}
    return EvaluationReport(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        text=TextFacts(
            labels=list(text.label_names),
            **{name: getattr(identity, name) for name in TextFacts.model_fields if name != "labels"},
        ),
        n_documents=text.n_documents,
        n_rows=len(text),
        n_tokens=text.n_tokens,
        seed=seed,
        resampling=resampler.what,
        definitions={key: one for key, one in sorted(known.items()) if key in used},
        records=records,
        paired=paired(rows, resampler),
        training={row.name: curves for row in rows if (curves := training_curves(row)) is not None},
        features={row.name: row.cards for row in rows if row.cards},
        **facts,
    )


def scored(row: MeasuredRow, others: Sequence[MeasuredRow]) -> dict[str, UnitSums]:
    """A row's sums with its scores against the ``mean`` and ``zero`` references of its place, and what is measured of
    the activations themselves there: the noise floor and the ceilings.
    """
    sums = dict(row.sums)
    floor = _reference(others, row.location, ACTIVATIONS)
    if "ce" in row.sums:
        sums |= _scores(row, others, floor)
    if floor is not None:  # and the ceilings
        sums |= {name: one for name, one in floor.sums.items() if name in row.definitions and name not in sums}
    return sums


def _scores(row: MeasuredRow, others: Sequence[MeasuredRow], floor: MeasuredRow | None) -> dict[str, UnitSums]:
    sums: dict[str, UnitSums] = {}
    for suffix in ("", OUTLIERS):
        own = {name: row.sums[name + suffix] for name in ("ce", "ce_clean", "kl")}
        for reference in ("mean", "zero"):
            other = _reference(others, row.location, reference)
            if other is None:
                continue
            both_U, n_U = _both(own["ce"], other.sums["ce" + suffix]), own["ce"].denominator_U
            if not both_U.any():
                continue
            n = round(float(n_U.sum()))
            ce_U, kl_U = (_within(other.sums[name + suffix].numerator_U, both_U) for name in ("ce", "kl"))
            gaps = {"ce": ce_U - _within(own["ce_clean"].numerator_U, both_U), "kl": kl_U}
            lost = {"ce": own["ce"].numerator_U - own["ce_clean"].numerator_U, "kl": own["kl"].numerator_U}
            for name, gap_U in gaps.items():
                key = f"{name}_score_{reference}{suffix}"
                if both_U[n_U > 0].all():
                    sums[key] = UnitSums(gap_U - lost[name], gap_U, "1", key, n=n)
                elif gap := float(gap_U.sum() / n_U[both_U].sum()):
                    # The reference was spliced into a share of the rows: what it loses per token there, as known.
                    sums[key] = UnitSums(lost[name], n_U, "1", key, 1.0, -1 / gap, n)
        if floor is not None:
            key = "kl_noise_floor" + suffix
            sums[key] = replace(floor.sums["kl" + suffix], definition=key)
    return sums


def _reference(rows: Sequence[MeasuredRow], at: Location, name: str) -> MeasuredRow | None:
    return next((row for row in rows if row.kind == "reference" and row.location == at and row.name == name), None)


def record_of(row: MeasuredRow, rows: Sequence[MeasuredRow], resampler: Resampler) -> Record:
    """The finished record, with intervals."""
    metrics: dict[str, Metric] = {name: resampler.metric(sums) for name, sums in scored(row, rows).items()}
    zero_all = _reference(rows, row.location, "zero_all")
    return Record(
        name=row.name,
        kind=row.kind,
        layer=row.layer,
        site=row.site,
        role=row.role,
        pair=row.pair,
        sae=row.facts,
        metrics=metrics
        | (cost_metrics(row.facts.settings) if row.facts else {})
        | {name: one.plain() if isinstance(one, Jackknifed) else one for name, one in row.metrics.items()},
        curves=row.curves,
        saebench_compat=_compat(row, zero_all),
        notes=[*row.subject_notes, *row.notes],
        kept=row.file,
        codes=row.codes,
    )


def _both(one: UnitSums, other: UnitSums) -> np.ndarray:
    """Bool [U]: the units of the first in which both have something."""
    n = len(one.denominator_U)
    other_U = np.zeros(n)
    other_U[: len(other.denominator_U)] = other.denominator_U[:n]
    return (one.denominator_U > 0) & (other_U > 0)


def _within(values_U: np.ndarray, units_U: np.ndarray) -> np.ndarray:
    """Sums of some units [U], zero in the others."""
    found = np.zeros(len(units_U))
    n = min(len(values_U), len(units_U))
    found[:n] = np.where(units_U[:n], values_U[:n], 0.0)
    return found


def _compat(row: MeasuredRow, zero_all: MeasuredRow | None) -> dict[str, float | None]:
    if not row.compat:  # fidelity was not asked for
        return {}
    own = SAEBenchSums.from_state(row.compat)
    ablated = SAEBenchSums.from_state(zero_all.compat) if zero_all is not None else None
    return own.result(ablated if ablated is not None and ablated.n_losses == own.n_losses else None)


def paired(rows: Sequence[MeasuredRow], resampler: Resampler) -> list[Paired]:
    """TC-SAE − twin, and pruned or fine-tuned − original, for every pair that is there whole, on whatever both were
    measured by.
    """
    found = []
    for first in rows:
        second = next(
            (row for row in rows if row.name == first.pair and row.location == first.location and row.kind == "sae"),
            None,
        )
        if first.role not in ("tc", *MADE_OF_ANOTHER) or second is None:
            continue
        a, b = scored(first, rows), scored(second, rows)
        differences = {name: resampler.difference(a[name], b[name]) for name in a if name in b}
        for name, one in first.metrics.items():
            other = second.metrics.get(name)
            if isinstance(one, Jackknifed) and isinstance(other, Jackknifed):
                differences[name] = one.minus(other)
        differences = {name: one for name, one in differences.items() if not name.startswith(_OF_THE_MODEL)}
        kind = first.role if first.role in MADE_OF_ANOTHER else "twin"
        warning = _unequal(a, b, kind)
        names = {"first": first.name, "second": second.name, "layer": first.layer, "site": first.site}
        found.append(Paired(kind=kind, **names, metrics=differences, warning=warning))
    return found


def _unequal(a: dict[str, UnitSums], b: dict[str, UnitSums], kind: str) -> str | None:
    l0 = [float(np.sum(one["l0"].numerator_U) / max(1.0, np.sum(one["l0"].denominator_U))) for one in (a, b)]
    if abs(l0[0] - l0[1]) <= L0_TOLERANCE * max(l0):
        return None
    if kind == "pruned":
        return f"pruning took L0 from {l0[1]:.1f} to {l0[0]:.1f}: part of every difference is sparsity"
    if kind == "finetuned":
        return f"fine-tuning took L0 from {l0[1]:.1f} to {l0[0]:.1f}: part of every difference is sparsity"
    return f"L0 differs ({l0[0]:.1f} against {l0[1]:.1f}): part of every difference is sparsity, not the temporal term"


def training_curves(row: MeasuredRow) -> TrainingCurves | None:
    """What the run logged; the terms of the loss weighted as in their total."""
    if row.facts is None or row.facts.source != "run":
        return None
    try:
        entries = read_metrics(Path(row.facts.path))
    except (OSError, TcsaeError):
        return None
    if not entries:
        return None
    names = [name for name in dict.fromkeys(key for entry in entries for key in entry) if name != "step"]
    series: dict[str, list[float | None]] = {name: [_number(entry.get(name)) for entry in entries] for name in names}
    if "loss" in series:
        series["total"] = series.pop("loss")
        for term in _TERMS:
            if term in series and f"{term}_share" in series:
                pairs = zip(series[f"{term}_share"], series["total"], strict=True)
                series[term] = [None if share is None or total is None else share * total for share, total in pairs]
    return TrainingCurves(steps=[int(entry["step"]) for entry in entries], series=series)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
