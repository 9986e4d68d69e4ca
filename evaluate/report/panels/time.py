"""Time: how much the features vary from token to token, at what cost, and how both depend on the term's weight."""

from __future__ import annotations

from dataclasses import replace

from ...results import EvaluationReport, Record
from ..chart import Axis, Panel
from .parts import axis_from_zero, curve_panel, links, mark_of, records_of, row_panel, saes_of, scatter
from .registry import panel

VARIATION = "temporal variation, Σ(zₜ − zₜ₊₁)² / Σ z²"
FEWEST = 3
"""Different weights, the twin's zero included: with fewer the table of differences says as much."""


@panel("time")
def time_plane(report: EvaluationReport, layer: int) -> Panel | None:
    """Temporal variation against CE recovered: is less variation paid for with fidelity?"""
    marks, _ = scatter(report, saes_of(report, layer), "temporal_variation", "ce_score_mean")
    if not marks:
        return None
    return Panel(
        f"time-plane-{layer}",
        f"Fidelity against temporal variation, layer {layer}",
        axis_from_zero(VARIATION, [mark.x for mark in marks]),
        Axis("share of CE recovered"),
        marks,
        links=links(report, layer, marks),
        caption="Further left: features vary less from token to token; further up: more of the model's predictions is "
        "kept. The temporal term is trained to go left; the question is how much fidelity that loses.",
    )


@panel("time")
def weight_fidelity(report: EvaluationReport, layer: int) -> Panel | None:
    """λ2 against CE recovered."""
    caption = "How much fidelity is lost as λ2 grows. One point per seed; 0 is the twin."
    return _weight_panel(report, layer, "ce_score_mean", "share of CE recovered", "Fidelity by λ2", caption)


@panel("time")
def weight_variation(report: EvaluationReport, layer: int) -> Panel | None:
    """λ2 against temporal variation."""
    caption = "Lower: features vary less. This is what the term is trained for; by itself it is evidence of nothing."
    return _weight_panel(report, layer, "temporal_variation", VARIATION, "Temporal variation by λ2", caption)


def _weight_panel(report: EvaluationReport, layer: int, key: str, label: str, title: str, caption: str) -> Panel | None:
    found = [
        (weight, record, metric)
        for record in records_of(report, layer)
        if (weight := _weight(record)) is not None
        and (metric := record.metrics.get(key)) is not None
        and metric.value is not None
    ]
    weights = sorted({weight for weight, *_ in found})
    if len(weights) < FEWEST:
        return None
    marks = []
    for weight, record, metric in found:
        column = metric.model_copy(update={"value": float(weights.index(weight)), "low": None, "high": None})
        mark = mark_of(report, record, column, metric, (key, key))
        marks.append(replace(mark, label="", title=f"{record.name}, λ2 = {weight:g}"))
    axis = Axis("λ2, weight of the temporal term", categories=tuple(f"{weight:g}" for weight in weights))
    name = f"weight-{key.replace('_', '-')}-{layer}"
    return Panel(name, f"{title}, layer {layer}", axis, Axis(label), tuple(marks), caption=caption)


def _weight(record: Record) -> float | None:
    """λ2 of a TC-SAE, 0 of a twin."""
    if record.role not in ("tc", "twin") or record.sae is None:
        return None
    if record.role == "twin":
        return 0.0
    weight = record.sae.settings.get("temporal.weight")
    return float(weight) if isinstance(weight, int | float) else None


@panel("time")
def lag_curves(report: EvaluationReport, layer: int) -> Panel | None:
    """Autocorrelation by lag."""
    return curve_panel(
        report,
        layer,
        "lag_autocorrelation",
        f"Autocorrelation by lag, layer {layer}",
        "How much of a feature's activation is still there some tokens later, means removed, averaged over features.",
    )


@panel("time")
def variation_rows(report: EvaluationReport, layer: int) -> Panel | None:
    """Temporal variation after the gains are refitted: what shrinking features cannot lower."""
    caption = (
        "Shrinking a feature lowers the plain metric and means nothing; here one gain per feature is refitted first."
    )
    key = "temporal_variation_refit"
    found = [m.value for r in saes_of(report, layer) if (m := r.metrics.get(key)) and m.value is not None]
    axis = axis_from_zero("temporal variation, gains refitted", found)
    title = f"Variation that is not shrinkage, layer {layer}"
    return row_panel(report, saes_of(report, layer), key, title, axis, caption)
