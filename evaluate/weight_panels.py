"""The charts of a sweep over λ2: what the temporal term costs and what it buys, one column of seeds per weight."""

from __future__ import annotations

from dataclasses import replace

from .chart import Axis, Panel
from .panels import mark_of
from .results import EvaluationReport, Record

FEWEST = 3  # weights, the twin's zero included: with fewer the paired table says it all


def weight_fidelity(report: EvaluationReport, layer: int) -> Panel | None:
    """λ2 against CE recovered."""
    caption = "What the temporal term costs. One point per seed; 0 is the twin."
    return _weight_panel(report, layer, "ce_score_mean", "share of CE recovered", "What λ2 costs", caption)


def weight_variation(report: EvaluationReport, layer: int) -> Panel | None:
    """λ2 against temporal variation."""
    caption = "What it buys: lower is steadier. The term is trained to go down; alone this is evidence of nothing."
    return _weight_panel(
        report, layer, "temporal_variation", "temporal variation, Σ(zₜ − zₜ₊₁)² / Σ z²", "What λ2 buys", caption
    )


def _weight_panel(report: EvaluationReport, layer: int, key: str, label: str, title: str, caption: str) -> Panel | None:
    found = [(weight, record) for record in report.records if (weight := _weight(record, layer)) is not None]
    weights = sorted({weight for weight, _ in found})
    if len(weights) < FEWEST:
        return None
    marks = []
    for weight, record in found:
        metric = record.metrics.get(key)
        if metric is not None and metric.value is not None:
            column = metric.model_copy(update={"value": float(weights.index(weight)), "low": None, "high": None})
            marks.append(
                replace(mark_of(report, record, column, metric, (key, key)), label="", title=f"{record.name}, λ2 = {weight:g}")
            )
    axis = Axis("λ2, weight of the temporal term", categories=tuple(f"{weight:g}" for weight in weights))
    name = f"weight-{key.replace('_', '-')}-{layer}"
    return Panel(name, f"{title}, layer {layer}", axis, Axis(label), tuple(marks), caption=caption)


def _weight(record: Record, layer: int) -> float | None:
    if record.layer != layer or record.role not in ("tc", "twin") or record.sae is None:
        return None
    if record.role == "twin":
        return 0.0
    weight = record.sae.settings.get("temporal.weight")
    return float(weight) if isinstance(weight, int | float) else None
