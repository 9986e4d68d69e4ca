"""What panels are made of: records as points of two metrics, one row per record, curves. Plug-ins use the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...results import MADE_OF_ANOTHER, Curve, EvaluationReport, Metric, Record
from ..chart import Axis, Line, Mark, Panel, Rule
from ..wording import decimals, metric_label, role_of, short_name, show, show_interval


def records_of(report: EvaluationReport, layer: int) -> list[Record]:
    """All rows of a layer, the reference rows included."""
    return [record for record in report.records if record.layer == layer]


def saes_of(report: EvaluationReport, layer: int) -> list[Record]:
    """The SAEs of a layer."""
    return [record for record in records_of(report, layer) if record.kind == "sae"]


def scatter(
    report: EvaluationReport, records: Iterable[Record], x_key: str, y_key: str
) -> tuple[tuple[Mark, ...], tuple[Rule, ...]]:
    """Records as points of two metrics; a reference row without the first one as a level of the second."""
    marks, rules = [], []
    for record in records:
        x, y = record.metrics.get(x_key), record.metrics.get(y_key)
        if y is None or y.value is None:
            continue
        if x is not None and x.value is not None:
            marks.append(mark_of(report, record, x, y, (x_key, y_key)))
        elif record.kind == "reference":
            rules.append(Rule(short_name(record, report), y=y.value))
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


def links(report: EvaluationReport, layer: int, marks: Sequence[Mark]) -> tuple[tuple[int, int], ...]:
    """Index pairs of each TC-SAE and its twin, each pruned or fine-tuned SAE and its original, among the marks of
    :func:`mark_of`.
    """
    index = {
        r.name: i for r in saes_of(report, layer) for i, m in enumerate(marks) if m.title.startswith(f"{r.name}: ")
    }
    pairs = [(r.name, r.pair) for r in saes_of(report, layer) if r.role in ("tc", *MADE_OF_ANOTHER)]
    return tuple((index[a], index[b]) for a, b in pairs if a in index and b in index)


def axis_from_zero(label: str, values: Sequence[float]) -> Axis:
    """An axis that begins at zero, unless all values would then crowd at its other end."""
    return Axis(label, low=0) if not values or max(values) > 1.3 * min(values) else Axis(label)


def row_panel(
    report: EvaluationReport,
    records: Sequence[Record],
    key: str,
    title: str,
    axis: Axis,
    caption: str,
    rules: Sequence[Rule] = (),
) -> Panel | None:
    """One metric, one row per record, with intervals; None where no SAE has it."""
    found = [(r, m) for r in records if (m := r.metrics.get(key)) and m.value is not None]
    if not any(record.kind == "sae" for record, _ in found):
        return None
    marks = []
    digits = max(decimals(m.value or 0.0, m.low, m.high) for record, m in found if record.kind == "sae")
    for i, (record, metric) in enumerate(found):
        value = metric.value or 0.0
        text = show(value, decimals(value) if axis.log else digits)
        shown = f"{record.name}: {_said(metric)}"
        marks.append(Mark(value, i, role_of(record), text, shown, x_interval=_interval(metric)))
    names = tuple(short_name(record, report) for record, _ in found)
    panel_key = f"{key.replace('_', '-')}-{found[0][0].layer}"
    return Panel(panel_key, title, axis, Axis("", categories=names), tuple(marks), rules=tuple(rules), caption=caption)


def curve_panel(
    report: EvaluationReport, layer: int, key: str, title: str, caption: str, *, log_y: bool = False
) -> Panel | None:
    """One curve (or histogram) of every SAE that has it; None where none has."""
    found = [(record, record.curves[key]) for record in saes_of(report, layer) if key in record.curves]
    # What was made of another SAE is drawn first: it hardly differs from its original and must not hide it.
    found.sort(key=lambda item: item[0].role not in MADE_OF_ANOTHER)
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
