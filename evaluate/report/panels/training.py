"""Training: the total loss, the share of each of its terms, and the weights λ1 and λ2 that change, step by step."""

from __future__ import annotations

import math

from ...results import EvaluationReport, Record, TrainingCurves
from ..chart import Axis, Line, Panel
from ..sweep import Sweep
from .parts import first_of_series, line_charts
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
def total_loss(report: EvaluationReport, layer: int) -> list[Panel]:
    """The total loss of every run."""

    def line_of(record: Record) -> Line | None:
        curves = report.training.get(record.name)
        total = _total(curves) if curves else None
        points = [(s, t) for s, t in zip(curves.steps, total, strict=True) if t and t > 0] if curves and total else []
        if not points:
            return None
        xs, ys = zip(*points[:: math.ceil(len(points) / LOSS_POINTS)], strict=True)
        return Line(tuple(map(float, xs)), ys, "", "")

    chart = Panel(
        f"loss-{layer}",
        f"Training loss, layer {layer}",
        Axis("step", low=0),
        Axis("total loss (log scale)", log=True),
        caption="A TC-SAE's total holds one term more than its twin's, so their levels do not compare.",
    )
    return line_charts(report, layer, line_of, chart)


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
        values = [name for name in curves.series if "_weight" not in name]
        close = [name for name in values if any(word in name.lower() for word in words)]
        name = term if term in curves.series else next(iter(close), None)
        if name and any(curves.series[name]):
            found[term] = curves.series[name]
    return found


@panel("training")
def loss_shares(report: EvaluationReport, layer: int) -> list[Panel]:
    """Each term's share of the loss, one panel for each of the first few TC-SAEs."""
    tc = [record for record in report.records if record.role == "tc" and record.name in report.training]
    tc = first_of_series(report, tc)
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
        f"Share of each loss term: {Sweep(report).label(record)}, layer {record.layer}",
        Axis("step", low=0),
        Axis("share of the total loss (%)", low=0, high=100),
        lines=lines,
        caption=f"At the end: {final}.",
    )


@panel("training")
def sparsity_weights(report: EvaluationReport, layer: int) -> list[Panel]:
    """λ1 of every run that has one, or the aim for L0 that a target changes in its place."""
    sweep = Sweep(report)

    def line_of(record: Record) -> Line | None:
        curves = report.training.get(record.name)
        aimed = curves is not None and "l0_aim" in curves.series
        line = _line(curves, "l0_aim" if aimed else "sparsity_weight") if curves else None
        label = f"{sweep.label(record)}, aim for L0" if aimed else ""
        return Line(*line, "", label) if line else None

    chart = Panel(
        f"sparsity-weights-{layer}",
        f"Weight of sparsity, layer {layer}",
        Axis("step", low=0),
        Axis("λ1, or the aim for L0 (log scale)", log=True),
        caption="With a target for L0, λ1 (or the aim of a quadratic penalty) changes until L0 is there.",
    )
    return line_charts(report, layer, line_of, chart)


@panel("training")
def feature_weights(report: EvaluationReport, layer: int) -> list[Panel]:
    """Deciles over features of λ2, one panel for each of the first few runs in which every feature has its own."""
    curves = report.training
    with_deciles = [r for r in report.records if r.name in curves and "temporal_weight_median" in curves[r.name].series]
    found = first_of_series(report, with_deciles)[:SHARE_PANELS]
    return [_feature_weights(report, one, curves[one.name]) for one in found if one.layer == layer]


def _feature_weights(report: EvaluationReport, record: Record, curves: TrainingCurves) -> Panel:
    styles = {
        "temporal_weight_p90": ("temporal", "a tenth of the features is above"),
        "temporal_weight_median": ("reconstruction", "median feature"),
        "temporal_weight_p10": ("auxiliary", "a tenth of the features is below"),
        "temporal_weight": ("sparsity", "mean over active entries"),
    }
    lines = [Line(*line, *style) for name, style in styles.items() if (line := _line(curves, name))]
    return Panel(
        f"feature-weights-{record.name}",
        f"λ2 of single features: {Sweep(report).label(record)}, layer {record.layer}",
        Axis("step", low=0),
        Axis("λ2 of a feature (log scale)", log=True),
        lines=tuple(lines),
        caption="How far λ2 differs between features, by their own correlation with the next token or by density.",
        names={line.role: line.label for line in lines},
    )


@panel("training")
def temporal_weights(report: EvaluationReport, layer: int) -> list[Panel]:
    """λ2 of every TC-SAE step by step; and once, by layer, where several layers have not the same."""

    def line_of(record: Record) -> Line | None:
        curves = report.training.get(record.name)
        line = _line(curves, "temporal_weight") if curves else None
        return Line(*line, "", "") if line else None

    lines = [(record.layer, line) for record in report.records if (line := line_of(record)) is not None]
    ends = [(at, line.y[-1]) for at, line in lines]
    chart = Panel(
        f"temporal-weights-{layer}",
        f"λ2, layer {layer}",
        Axis("step", low=0),
        Axis("λ2, weight of the temporal term", low=0),
        caption="It grows where it has a warm-up.",
    )
    found = line_charts(report, layer, line_of, chart)
    layers = sorted({at for at, _ in ends})
    weights_of = [{weight for at, weight in ends if at == one} for one in layers]
    if found and layer == layers[0] and any(each != weights_of[0] for each in weights_of):
        xs, ys = zip(*sorted(ends), strict=True)
        found.append(
            Panel(
                f"temporal-weights-by-layer-{layer}",
                "λ2 by layer",
                Axis("layer"),
                Axis("λ2, weight of the temporal term", low=0),
                lines=(Line(tuple(map(float, xs)), ys, "tc", "TC-SAE"),),
                caption="λ2 at the end of training.",
            )
        )
    return found


def _line(curves: TrainingCurves, name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The positive points of a series, thinned; None where there are none."""
    if name not in curves.series:
        return None
    points = [(float(s), v) for s, v in zip(curves.steps, curves.series[name], strict=True) if v and v > 0]
    if not points:
        return None
    xs, ys = zip(*points[:: math.ceil(len(points) / LOSS_POINTS)], strict=True)
    return xs, ys
