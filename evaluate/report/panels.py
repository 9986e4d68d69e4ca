"""What a report's charts show: pure functions from an evaluation to panels.

A panel is left out where its numbers are missing; nothing is drawn from a null. Layers get panels of their own, since
neither reference rows nor losses are comparable across layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ..results import Curve, EvaluationReport, Metric, Record, TrainingCurves
from .chart import Axis, Line, Mark, Panel, Rule
from .wording import decimals, metric_label, role_of, short_name, show, show_interval


def plane(report: EvaluationReport, layer: int) -> Panel | None:
    """L0 against CE recovered, the reference rows included."""
    marks, rules = _plane(report, "ce_score_mean", _records(report, layer))
    if not marks:
        return None
    return Panel(
        f"plane-{layer}",
        f"Fidelity against sparsity, layer {layer}",
        Axis("L0: active features per token", low=0),
        Axis("CE recovered (1: the model, 0: mean ablation)"),
        marks,
        rules=rules,
        links=_links(report, layer, marks),
        caption="Every row. A reference without features has no L0 and is drawn as a level.",
    )


def plane_zoomed(report: EvaluationReport, layer: int) -> Panel | None:
    """The same without the reference rows, so that SAEs can be told apart."""
    marks, _ = _plane(report, "ce_score_mean", _saes(report, layer))
    if not marks:
        return None
    return Panel(
        f"plane-zoomed-{layer}",
        f"The SAEs alone, layer {layer}",
        _l0_axis(marks),
        Axis("share of CE recovered"),
        marks,
        links=_links(report, layer, marks),
        caption="The same, enlarged. A thin line joins a pair; where two coincide they are drawn apart.",
    )


def variance_plane(report: EvaluationReport, layer: int) -> Panel | None:
    """L0 against explained variance, SAEs alone: an untrained one lies far below."""
    marks, _ = _plane(report, "explained_variance", _saes(report, layer))
    if not marks:
        return None
    return Panel(
        f"variance-{layer}",
        f"Explained variance, layer {layer}",
        _l0_axis(marks),
        Axis("explained variance"),
        marks,
        links=_links(report, layer, marks),
        caption="What is explained of the activations need not be what matters to the model: compare "
        "the planes beside.",
    )


def _l0_axis(marks: Sequence[Mark]) -> Axis:
    sizes = [mark.x for mark in marks]
    label = "L0: active features per token"
    if min(sizes) > 0 and max(sizes) > 4 * min(sizes):
        return Axis(label + " (log scale)", log=True)
    return Axis(label) if max(sizes) > 1.3 * min(sizes) else Axis(label, low=0, high=1.5 * max(sizes) or 1.0)


def _from_zero(label: str, values: Sequence[float]) -> Axis:
    """An axis that begins at zero, unless all values would then crowd at its other end."""
    return Axis(label, low=0) if not values or max(values) > 1.3 * min(values) else Axis(label)


def _plane(report: EvaluationReport, key: str, records: Iterable[Record]) -> tuple[tuple[Mark, ...], tuple[Rule, ...]]:
    marks, rules = [], []
    for record in records:
        value, size = record.metrics.get(key), record.metrics.get("l0")
        if value is None or value.value is None:
            continue
        if size is None or size.value is None:
            rules.append(Rule(short_name(record, report), y=value.value))
            continue
        marks.append(mark_of(report, record, size, value, ("l0", key)))
    return tuple(marks), tuple(rules)


def mark_of(report: EvaluationReport, record: Record, x: Metric, y: Metric, keys: tuple[str, str]) -> Mark:
    """A record as a point, with its intervals and a sentence for the pointer; both metrics have values."""
    assert x.value is not None  # noqa: S101 - callers looked
    assert y.value is not None  # noqa: S101
    words = [f"{metric_label(k, report)} {_said(m)}" for k, m in zip(keys, (x, y), strict=True)]
    title = f"{record.name}: {', '.join(words)}"
    return Mark(x.value, y.value, role_of(record), short_name(record, report), title, _interval(x), _interval(y))


def _said(metric: Metric) -> str:
    if metric.value is None:
        return "undefined"
    digits = decimals(metric.value, metric.low, metric.high)
    interval = show_interval(metric, digits)
    return show(metric.value, digits) + (f" ({interval})" if interval else "")


def _interval(metric: Metric) -> tuple[float, float] | None:
    if metric.low is None or metric.high is None or metric.low == metric.high:
        return None
    return metric.low, metric.high


def _links(report: EvaluationReport, layer: int, marks: Sequence[Mark]) -> tuple[tuple[int, int], ...]:
    """Index pairs of each TC-SAE and its twin, each pruned SAE and its original among the marks."""
    index = {mark.title.split(":")[0]: i for i, mark in enumerate(marks)}
    pairs = [(r.name, r.pair) for r in _saes(report, layer) if r.role in ("tc", "pruned")]
    return tuple((index[a], index[b]) for a, b in pairs if a in index and b in index)


def _records(report: EvaluationReport, layer: int) -> list[Record]:
    return [record for record in report.records if record.layer == layer]


def _saes(report: EvaluationReport, layer: int) -> list[Record]:
    return [record for record in _records(report, layer) if record.kind == "sae"]


def ce_rows(report: EvaluationReport, layer: int) -> Panel | None:
    """Cross-entropy of every row between the clean model and a uniform guess."""
    uniform = Rule(
        f"uniform guess, ln V = {math.log(report.model.vocab_size):.2f}", x=math.log(report.model.vocab_size)
    )
    clean = next(
        (m.value for r in _records(report, layer) if (m := r.metrics.get("ce_clean")) and m.value is not None), None
    )
    rules = [uniform] if clean is None else [Rule(f"clean model {clean:.2f}", x=clean), uniform]
    caption = "Lower is better. Intervals are of the level: texts differ more among themselves than SAEs do."
    axis = Axis("cross-entropy, nats per token")
    return _rows(report, _records(report, layer), "ce", f"Cross-entropy, layer {layer}", axis, caption, rules)


def kl_rows(report: EvaluationReport, layer: int) -> Panel | None:
    """KL of every row, on a log scale, with the floor that rounding sets."""
    floors = [m.value for r in _saes(report, layer) if (m := r.metrics.get("kl_noise_floor")) and m.value]
    rules = [Rule("bf16 rounding", x=floors[0])] if floors else []
    caption = "Lower is better. Zero, which no log scale has, is drawn at the left edge."
    axis = Axis("KL, nats per token (log scale)", log=True)
    return _rows(report, _records(report, layer), "kl", f"KL divergence, layer {layer}", axis, caption, rules)


def variation_rows(report: EvaluationReport, layer: int) -> Panel | None:
    """Temporal variation after the gains are refitted: what shrinking cannot buy."""
    caption = "Shrinking a feature lowers the plain measure for nothing; here one gain per feature is refitted first."
    found = [
        m.value
        for r in _saes(report, layer)
        if (m := r.metrics.get("temporal_variation_refit")) and m.value is not None
    ]
    axis = _from_zero("temporal variation, gains refitted", found)
    title = f"Variation that is not shrinkage, layer {layer}"
    return _rows(report, _saes(report, layer), "temporal_variation_refit", title, axis, caption)


def specific_rows(report: EvaluationReport, layer: int) -> Panel | None:
    """Share of features that are position-specific."""
    caption = (
        "Features whose firing depends on position more than rotated rows allow, at a false-discovery rate of 5 %."
    )
    axis = Axis("share of position-specific features", low=0)
    return _rows(
        report,
        _saes(report, layer),
        "position_specific_share",
        f"Position-specific features, layer {layer}",
        axis,
        caption,
    )


def _rows(
    report: EvaluationReport,
    records: Sequence[Record],
    key: str,
    title: str,
    axis: Axis,
    caption: str,
    rules: Sequence[Rule] = (),
) -> Panel | None:
    found = [(r, m) for r in records if (m := r.metrics.get(key)) and m.value is not None]
    if not any(record.kind == "sae" for record, _ in found):
        return None
    marks = []
    digits = max(decimals(m.value or 0.0, m.low, m.high) for record, m in found if record.kind == "sae")
    for i, (record, metric) in enumerate(found):
        value = metric.value or 0.0
        text = show(value, decimals(value) if axis.log else digits)
        title_ = f"{record.name}: {_said(metric)}"
        marks.append(Mark(value, i, role_of(record), text, title_, x_interval=_interval(metric)))
    names = tuple(short_name(record, report) for record, _ in found)
    panel_key = f"{key.replace('_', '-')}-{found[0][0].layer}"
    return Panel(panel_key, title, axis, Axis("", categories=names), tuple(marks), rules=tuple(rules), caption=caption)


def time_plane(report: EvaluationReport, layer: int) -> Panel | None:
    """Temporal variation against CE recovered: does steadiness cost fidelity?"""
    keys = ("temporal_variation", "ce_score_mean")
    marks = []
    for record in _saes(report, layer):
        x, y = (record.metrics.get(key) for key in keys)
        if x and y and x.value is not None and y.value is not None:
            marks.append(mark_of(report, record, x, y, keys))
    if not marks:
        return None
    return Panel(
        f"time-plane-{layer}",
        f"Steadiness against fidelity, layer {layer}",
        _from_zero("temporal variation, Σ(zₜ − zₜ₊₁)² / Σ z²", [mark.x for mark in marks]),
        Axis("share of CE recovered"),
        tuple(marks),
        links=_links(report, layer, marks),
        caption="Left is steadier, up is more faithful. The temporal term is trained to go left; the "
        "question is the cost.",
    )


def lag_curves(report: EvaluationReport, layer: int) -> Panel | None:
    """Autocorrelation by lag."""
    return _curves(
        report,
        layer,
        "lag_autocorrelation",
        f"Autocorrelation by lag, layer {layer}",
        "How much of a feature's activation is still there some tokens later, means removed, averaged over features.",
    )


def norm_by_position(report: EvaluationReport, layer: int) -> Panel | None:
    """Size by position."""
    title = f"By position in the row, layer {layer}"
    caption = "A level line means that position does not matter; the first tokens after the start are usually special."
    return _curves(report, layer, "norm_by_position", title, caption) or _curves(
        report, layer, "position_profile", title, caption
    )


def eta_histogram(report: EvaluationReport, layer: int) -> Panel | None:
    """How much of each feature's variance its position explains."""
    return _curves(
        report,
        layer,
        "eta_squared",
        f"Dependence on position, layer {layer}",
        "Share of each feature's variance that position explains, corrected for bias. Counts on a log scale.",
        log_y=True,
    )


def density_histogram(report: EvaluationReport, layer: int) -> Panel | None:
    """How often features fire."""
    return _curves(
        report,
        layer,
        "density",
        f"Feature density, layer {layer}",
        "A lump at the far right are features that are nearly always on; dead features are not in it.",
    )


def _curves(
    report: EvaluationReport, layer: int, key: str, title: str, caption: str, *, log_y: bool = False
) -> Panel | None:
    found = [(record, record.curves[key]) for record in _saes(report, layer) if key in record.curves]
    found.sort(
        key=lambda item: item[0].role != "pruned"
    )  # drawn first: it hardly differs, and must not hide its original
    lines = [line for record, curve in found if (line := _line(curve, role_of(record), short_name(record, report)))]
    if not lines:
        return None
    first = found[0][1]
    histogram = first.kind == "histogram"
    low = (0.8 if log_y else 0.0) if histogram else None
    x = Axis(first.x_label + (" (log scale)" if first.x_scale == "log" else ""), log=first.x_scale == "log")
    y = Axis(first.y_label + (" (log scale)" if log_y else ""), log=log_y, low=low)
    return Panel(f"{key.replace('_', '-')}-{layer}", title, x, y, lines=tuple(lines), caption=caption)


def _line(curve: Curve, role: str, label: str) -> Line | None:
    """A curve without its nulls; a histogram's null bin is an empty one. None where nothing is left."""
    if curve.kind == "histogram":
        edges = tuple(x for x in curve.x if x is not None)
        heights = tuple(y or 0.0 for y in curve.y)
        if len(edges) != len(heights) + 1 or not any(heights):
            return None
        used = [i for i, height in enumerate(heights) if height]  # empty bins at either end only make the rest small
        return Line(edges[used[0] : used[-1] + 2], heights[used[0] : used[-1] + 1], role, label, step=True)
    rows = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if x is not None and y is not None]
    if not rows:
        return None
    low, high = tuple(curve.low or ()), tuple(curve.high or ())
    banded = len(rows) == len(curve.x) and None not in low and None not in high and len(low) == len(high) == len(rows)
    xs, ys = zip(*rows, strict=True)
    return Line(xs, ys, role, label, low if banded else (), high if banded else ())  # pyright: ignore[reportArgumentType]


LOSS_POINTS = 160  # more than a panel has pixels for
SHARE_PANELS = 6
TERM_WORDS = {
    "reconstruction": ("reconstruction", "mse"),
    "sparsity": ("sparsity", "l1"),
    "temporal": ("temporal",),
    "auxiliary": ("aux",),
}


def training_panels(report: EvaluationReport) -> list[Panel]:
    """Layer by layer the total loss, then each term's share for the first few TC-SAEs."""
    tc = [record for record in report.records if record.role == "tc" and record.name in report.training][:SHARE_PANELS]
    panels = []
    for layer in report.layers:
        found = [_totals(report, layer), *[_shares(report, record) for record in tc if record.layer == layer]]
        panels += [replace(panel, layer=layer) for panel in found if panel]
    return panels


def _totals(report: EvaluationReport, layer: int) -> Panel | None:
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
                replace(
                    mark_of(report, record, column, metric, (key, key)),
                    label="",
                    title=f"{record.name}, λ2 = {weight:g}",
                )
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


def sections(report: EvaluationReport) -> dict[str, list[Panel]]:
    """Section → its panels, in reading order; a section without panels is an empty list."""
    return {
        "fidelity": _each_layer(report, plane, plane_zoomed, variance_plane, ce_rows, kl_rows),
        "time": _each_layer(report, time_plane, weight_fidelity, weight_variation, lag_curves, variation_rows),
        "position": _each_layer(report, eta_histogram, norm_by_position, specific_rows),
        "features": _each_layer(report, density_histogram),
        "training": training_panels(report),
    }


Builder = Callable[[EvaluationReport, int], Panel | None]


def _each_layer(report: EvaluationReport, *builders: Builder) -> list[Panel]:
    built = [(layer, builder(report, layer)) for layer in report.layers for builder in builders]
    return [replace(panel, layer=layer) for layer, panel in built if panel is not None]
