"""Training: the total loss and the share of each of its terms, step by step."""

from __future__ import annotations

import math

from ...results import EvaluationReport, Record, TrainingCurves
from ..chart import Axis, Line, Panel
from ..wording import role_of, short_name
from .registry import panel

LOSS_POINTS = 160
"""Points of a curve: a panel has pixels for no more."""
SHARE_PANELS = 6
"""TC-SAEs of a report whose loss is shown term by term: the first ones."""
TERM_WORDS = {
    "reconstruction": ("reconstruction", "mse"),
    "sparsity": ("sparsity", "l1"),
    "temporal": ("temporal",),
    "auxiliary": ("aux",),
}


@panel("training")
def total_loss(report: EvaluationReport, layer: int) -> Panel | None:
    """The total loss of every run."""
    lines = []
    for record in report.records:
        if record.layer != layer:
            continue
        curves = report.training.get(record.name)
        total = _total(curves) if curves else None
        points = [(s, t) for s, t in zip(curves.steps, total, strict=True) if t and t > 0] if curves and total else []
        if points:
            xs, ys = zip(*points[:: math.ceil(len(points) / LOSS_POINTS)], strict=True)
            lines.append(Line(tuple(map(float, xs)), ys, role_of(record), short_name(record, report)))
    if not lines:
        return None
    return Panel(
        f"loss-{layer}",
        f"Training loss, layer {layer}",
        Axis("step", low=0),
        Axis("total loss (log scale)", log=True),
        lines=tuple(lines),
        caption="A TC-SAE's total holds one term more than its twin's, so their levels do not compare.",
    )


def _total(curves: TrainingCurves) -> list[float | None] | None:
    for name in ("total", "loss"):
        if name in curves.series:
            return curves.series[name]
    terms = list(_terms(curves).values())
    return [sum(v or 0.0 for v in values) for values in zip(*terms, strict=True)] if terms else None


def _terms(curves: TrainingCurves) -> dict[str, list[float | None]]:
    """Term → its series, by the words in the names of what was logged."""
    found = {}
    for term, words in TERM_WORDS.items():
        close = [name for name in curves.series if any(word in name.lower() for word in words)]
        name = term if term in curves.series else next(iter(close), None)
        if name and any(curves.series[name]):
            found[term] = curves.series[name]
    return found


@panel("training")
def loss_shares(report: EvaluationReport, layer: int) -> list[Panel]:
    """Each term's share of the loss, one panel for each of the first few TC-SAEs."""
    tc = [record for record in report.records if record.role == "tc" and record.name in report.training]
    return [found for one in tc[:SHARE_PANELS] if one.layer == layer if (found := _shares(report, one)) is not None]


def _shares(report: EvaluationReport, record: Record) -> Panel | None:
    curves = report.training[record.name]
    terms = _terms(curves)
    if len(terms) < 2:
        return None
    keep = range(0, len(curves.steps), math.ceil(len(curves.steps) / LOSS_POINTS))
    sums = {i: sum(values[i] or 0.0 for values in terms.values()) for i in keep}
    used = [i for i in keep if sums[i] > 0]
    lines = tuple(
        Line(
            tuple(float(curves.steps[i]) for i in used),
            tuple(100 * (values[i] or 0.0) / sums[i] for i in used),
            term,
            term,
        )
        for term, values in terms.items()
    )
    final = "; ".join(f"{line.label} {line.y[-1]:.1f} %" for line in lines if line.y)
    return Panel(
        f"shares-{record.name}",
        f"Share of each loss term: {short_name(record, report)}, layer {record.layer}",
        Axis("step", low=0),
        Axis("share of the total loss (%)", low=0, high=100),
        lines=lines,
        caption=f"At the end: {final}.",
    )
