"""Time: how much the features vary from token to token, at what cost, and how both depend on the term's weight."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from ...results import EvaluationReport, Record
from ..chart import Axis, Line, Mark, Panel, Rule
from ..sweep import COLOURS, Sweep
from .parts import axis_from_zero, charts, curve_panel, links, row_panel, saes_of, scattered
from .registry import panel

VARIATION = "temporal variation, Σ(zₜ − zₜ₊₁)² / Σ z²"
FEWEST = 2
"""Different weights on a line; with fewer the table of differences says as much."""


@panel("time")
def time_plane(report: EvaluationReport, layer: int) -> list[Panel]:
    """Temporal variation against CE recovered: is less variation paid for with fidelity?"""
    drawn = scattered(report, saes_of(report, layer), "temporal_variation", "ce_score_mean")
    if not drawn.marks:
        return []
    marks = [mark for _, mark in drawn.marks]
    chart = Panel(
        f"time-plane-{layer}",
        f"Fidelity against temporal variation, layer {layer}",
        axis_from_zero(VARIATION, [mark.x for mark in marks]),
        Axis("share of CE recovered"),
        links=links(report, layer, marks),
        caption="Further left: features vary less from token to token; further up: more of the model's predictions is "
        "kept. The temporal term is trained to go left; the question is how much fidelity that loses.",
    )
    return charts(report, drawn, chart)


@panel("time")
def weight_fidelity(report: EvaluationReport, layer: int) -> Panel | None:
    """λ2 against CE recovered."""
    caption = "How much fidelity is lost as λ2 grows."
    return _weight_panel(report, layer, "ce_score_mean", "share of CE recovered", "Fidelity by λ2", caption)


@panel("time")
def weight_variation(report: EvaluationReport, layer: int) -> Panel | None:
    """λ2 against temporal variation."""
    caption = "Lower: features vary less. This is what the term is trained for; by itself it is evidence of nothing."
    return _weight_panel(report, layer, "temporal_variation", VARIATION, "Temporal variation by λ2", caption)


def _weight_panel(report: EvaluationReport, layer: int, key: str, label: str, title: str, caption: str) -> Panel | None:
    """A line through the means of those that differ in λ2 alone, a dot for each run; the twin is a level."""
    sweep, lines, marks = Sweep(report), [], []
    weighted = [(r, w) for r in saes_of(report, layer) if (w := _weight(r)) and _has(r, key)]
    rest: dict[tuple[str, Any], list[tuple[float, float]]] = {}
    for record, weight in weighted:
        rest.setdefault(sweep.but(record, "temporal.weight"), []).append((weight, record.metrics[key].value or 0.0))
    curves = {name: points for name, points in rest.items() if len({weight for weight, _ in points}) >= FEWEST}
    styles = ["tc"] if len(curves) == 1 else COLOURS
    for ((name, _), points), style in zip(curves.items(), styles, strict=False):
        xs = sorted({weight for weight, _ in points})
        means = tuple(fmean(value for weight, value in points if weight == x) for x in xs)
        lines.append(Line(tuple(xs), means, style, name))
        dots = [(x, value) for x, value in points if sum(weight == x for weight, _ in points) > 1]
        marks += [Mark(x, value, style, "", f"{name}, λ2 = {x:g}: {value:.4g}", small=True) for x, value in dots]
    if not lines:
        return None
    levels = [r.metrics[key].value or 0.0 for r in saes_of(report, layer) if r.role == "twin" and _has(r, key)]
    rules = [Rule("twin" if len(levels) == 1 else f"mean of {len(levels)} twins", y=fmean(levels))] if levels else []
    cut = f" The first {len(lines)} of {len(curves)} series." if len(lines) < len(curves) else ""
    return Panel(
        f"weight-{key.replace('_', '-')}-{layer}",
        f"{title}, layer {layer}",
        Axis(
            "λ2, weight of the temporal term (log scale)",
            log=True,
            at=tuple(sorted({x for line in lines for x in line.x})),
        ),
        Axis(label),
        tuple(marks),
        tuple(lines),
        tuple(rules),
        caption=caption + (" A dot for each seed." if marks else "") + cut,
        names={line.role: line.label for line in lines},
        own_legend=True,
    )


def _has(record: Record, key: str) -> bool:
    return key in record.metrics and record.metrics[key].value is not None


def _weight(record: Record) -> float | None:
    """λ2 of a run with a temporal term."""
    settings = record.sae.settings if record.sae else {}
    weight = settings.get("temporal.weight")
    on = record.role == "tc" and settings.get("temporal.form") != "none"
    return float(weight) if on and isinstance(weight, int | float) else None


@panel("time")
def lag_curves(report: EvaluationReport, layer: int) -> list[Panel]:
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
