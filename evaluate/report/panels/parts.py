"""What panels are made of: records as points of two metrics, one row per record, curves. Plug-ins use the same.

Of many runs, those of one series (all but their seeds alike) are one point, row or line with dots or a band for the
seeds; more series than one chart can show are small charts with common axes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ...results import MADE_OF_ANOTHER, Curve, EvaluationReport, Metric, Record
from ..chart import Axis, Line, Mark, Panel, Rule
from ..sweep import Series, Sweep
from ..wording import decimals, metric_label, show, show_interval

MOST_CHARTS = 12
"""Small charts of one panel."""
MOST_LABELS = 8
"""Points with words beside them; more are told by the legend."""


@dataclass(frozen=True)
class Drawn:
    """Marks and lines, each with the series it belongs to; None: to all."""

    marks: tuple[tuple[Series | None, Mark], ...] = ()
    lines: tuple[tuple[Series | None, Line], ...] = ()
    rules: tuple[Rule, ...] = ()


def records_of(report: EvaluationReport, layer: int) -> list[Record]:
    """All rows of a layer, the reference rows included."""
    return [record for record in report.records if record.layer == layer]


def saes_of(report: EvaluationReport, layer: int) -> list[Record]:
    """The SAEs of a layer."""
    return [record for record in records_of(report, layer) if record.kind == "sae"]


def scatter(
    report: EvaluationReport, records: Iterable[Record], x_key: str, y_key: str
) -> tuple[tuple[Mark, ...], tuple[Rule, ...]]:
    """Records as points of two metrics; a reference row without the first one as a level of the second.

    Of many runs, the mean of every series and a dot for each of its seeds.
    """
    drawn = scattered(report, list(records), x_key, y_key)
    return tuple(mark for _, mark in drawn.marks), drawn.rules


def scattered(report: EvaluationReport, records: Sequence[Record], x_key: str, y_key: str) -> Drawn:
    """The same, with the series of every point, for :func:`charts`."""
    sweep = Sweep(report)
    saes = [record for record in records if record.kind == "sae"]
    found = [(r, x, y) for r in records if (x := r.metrics.get(x_key)) and (y := r.metrics.get(y_key))]
    found = [(r, x, y) for r, x, y in found if x.value is not None and y.value is not None]
    marks: list[tuple[Series | None, Mark]] = []
    large = sweep.is_large(saes)
    for series, group in sweep.groups([record for record, *_ in found]):
        points = [(r, x, y) for r, x, y in found if r in group]
        each = [mark_of(report, r, x, y, (x_key, y_key), sweep) for r, x, y in points]
        if large and len(each) > 1 and series is not None:
            marks += [(series, replace(m, label="", x_interval=None, y_interval=None, small=True)) for m in each]
            middle = Mark(fmean(m.x for m in each), fmean(m.y for m in each), each[0].role, series.label)
            each = [replace(middle, title=f"{series.label}: mean of {len(each)} seeds")]
        marks += [(series, mark) for mark in each]
    labelled = sum(bool(mark.label) for series, mark in marks if series is not None)
    if labelled > MOST_LABELS:
        marks = [(series, replace(mark, label="") if series is not None else mark) for series, mark in marks]
    apart = {id(record) for record, *_ in found}
    levels = [r for r in records if r.kind == "reference" and id(r) not in apart]
    rules = [
        Rule(sweep.label(r), y=y.value)
        for r in levels
        if (y := r.metrics.get(y_key)) is not None and y.value is not None
    ]
    return Drawn(tuple(marks), rules=tuple(rules))


def charts(report: EvaluationReport, drawn: Drawn, chart: Panel) -> list[Panel]:
    """The chart with what was drawn in it: one, or a small one for each part of a sweep, with common axes.

    A baseline, and what is no run, is in each.
    """
    sweep = Sweep(report)
    whole = _filled(chart, drawn, sweep)
    owners = [series for series, _ in (*drawn.marks, *drawn.lines)]
    facets = list(
        dict.fromkeys(one.facet for one in sorted((o for o in owners if o), key=lambda o: o.order) if one.facet)
    )
    if len(facets) < 2:
        return [whole]
    x_ends, y_ends = whole.ends()
    x, y = (replace(a, low=e[0], high=e[1]) for a, e in ((chart.x, x_ends), (chart.y, y_ends)))
    found = []
    for facet in facets[:MOST_CHARTS]:
        part = replace(
            drawn,
            marks=tuple((s, m) for s, m in drawn.marks if s is None or s.facet in ("", facet)),
            lines=tuple((s, line) for s, line in drawn.lines if s is None or s.facet in ("", facet)),
        )
        key = f"{chart.key}-{re.sub('[^a-z0-9.]+', '-', facet.lower()).strip('-')}"
        cut = f" The first {MOST_CHARTS} of {len(facets)} charts." if len(facets) > MOST_CHARTS else ""
        one = replace(chart, key=key, x=x, y=y, part=facet, caption=chart.caption + cut, links=())
        found.append(_filled(one, part, sweep))
    return found


def _filled(chart: Panel, drawn: Drawn, sweep: Sweep) -> Panel:
    marks, lines = tuple(m for _, m in drawn.marks), tuple(line for _, line in drawn.lines)
    return replace(chart, marks=marks, lines=lines, rules=(*chart.rules, *drawn.rules), names=sweep.names)


def mark_of(
    report: EvaluationReport, record: Record, x: Metric, y: Metric, keys: tuple[str, str], sweep: Sweep | None = None
) -> Mark:
    """A record as a point, with its intervals and a sentence for the pointer; both metrics have values."""
    assert x.value is not None  # noqa: S101 - callers looked
    assert y.value is not None  # noqa: S101
    sweep = sweep or Sweep(report)
    words = [f"{metric_label(k, report)} {_said(m)}" for k, m in zip(keys, (x, y), strict=True)]
    title = f"{record.name}: {', '.join(words)}"
    return Mark(x.value, y.value, sweep.style(record), sweep.label(record), title, _interval(x), _interval(y))


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
    :func:`mark_of`; none in a sweep, whose members have one twin.
    """
    if Sweep(report).several:
        return ()
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
    """One metric, one row per record, with intervals; of many runs one row per series, its mean, and its seeds as dots.
    None where no SAE has it.
    """
    sweep = Sweep(report)
    found = {id(r): (r, m) for r in records if (m := r.metrics.get(key)) and m.value is not None}
    shown = [record for record, _ in found.values()]
    saes = [record for record in shown if record.kind == "sae"]
    if not saes:
        return None
    digits = max(decimals(m.value or 0.0, m.low, m.high) for record, m in found.values() if record.kind == "sae")
    large = sweep.is_large(saes)
    rows = sweep.groups(shown) if large else [(sweep.of(record), [record]) for record in shown]
    marks, names = [], []
    for i, (series, group) in enumerate(rows):
        values = [found[id(record)][1] for record in group]
        first, middle = group[0], fmean(m.value or 0.0 for m in values)
        text = show(middle, decimals(middle) if axis.log else digits)
        if len(group) == 1 or series is None:
            names.append(sweep.label(first))
            said, ends = f"{first.name}: {_said(values[0])}", _interval(values[0])
        else:
            names.append(series.label)
            said, ends = f"{series.label}: {text}, mean of {len(group)} seeds", None
            dots = zip(group, values, strict=True)
            marks += [Mark(m.value or 0.0, i, sweep.style(r), "", f"{r.name}: {_said(m)}", small=True) for r, m in dots]
        marks.append(Mark(middle, i, sweep.style(first), text, said, x_interval=ends))
    panel_key = f"{key.replace('_', '-')}-{shown[0].layer}"
    if large:
        caption += " Means over seeds; a dot for each seed."
    y = Axis("", categories=tuple(names))
    return Panel(panel_key, title, axis, y, tuple(marks), rules=tuple(rules), caption=caption, names=sweep.names)


def curve_panel(
    report: EvaluationReport, layer: int, key: str, title: str, caption: str, *, log_y: bool = False
) -> list[Panel]:
    """One curve (or histogram) of every SAE that has it; of many, the mean of every series and a band from the least to
    the most of its seeds. Empty where none has.
    """
    found = [(record, record.curves[key]) for record in saes_of(report, layer) if key in record.curves]
    # What was made of another SAE is drawn first: it hardly differs from its original and must not hide it.
    found.sort(key=lambda item: item[0].role not in MADE_OF_ANOTHER)
    sweep = Sweep(report)
    lines = _merged([(r, line) for r, c in found if (line := _line(c, sweep.style(r), sweep.label(r)))], sweep)
    if not lines:
        return []
    first = found[0][1]
    histogram = first.kind == "histogram"
    low = (0.8 if log_y else 0.0) if histogram else None
    x = Axis(first.x_label + (" (log scale)" if first.x_scale == "log" else ""), log=first.x_scale == "log")
    y = Axis(first.y_label + (" (log scale)" if log_y else ""), log=log_y, low=low)
    chart = Panel(f"{key.replace('_', '-')}-{layer}", title, x, y, caption=caption)
    return charts(report, Drawn(lines=tuple(lines)), chart)


def first_of_series(report: EvaluationReport, records: Iterable[Record]) -> list[Record]:
    """Of the runs of a large sweep the first seed of every series; else all."""
    sweep, found = Sweep(report), []
    for at in report.locations:
        here = [record for record in records if record.location == at]
        groups = sweep.groups(here)
        found += [group[0] for _, group in groups] if sweep.is_large(here) else here
    return found


def line_charts(
    report: EvaluationReport, layer: int, line_of: Callable[[Record], Line | None], chart: Panel
) -> list[Panel]:
    """A chart of one line for every SAE of a layer, or of the mean of every series; empty where there is no line."""
    sweep = Sweep(report)
    drawn = [(record, line) for record in saes_of(report, layer) if (line := line_of(record)) is not None]
    styled = [(r, replace(line, role=sweep.style(r), label=line.label or sweep.label(r))) for r, line in drawn]
    lines = _merged(styled, sweep)
    return charts(report, Drawn(lines=tuple(lines)), chart) if lines else []


def _merged(lines: Sequence[tuple[Record, Line]], sweep: Sweep) -> list[tuple[Series | None, Line]]:
    """Lines by series, those of several seeds of one as their mean where they have common abscissae."""
    of = {id(record): line for record, line in lines}
    if not sweep.is_large([record for record, _ in lines]):
        return [(sweep.of(record), line) for record, line in lines]
    found: list[tuple[Series | None, Line]] = []
    for series, group in sweep.groups([record for record, _ in lines]):
        each = [of[id(record)] for record in group]
        if series is None or len(each) == 1 or any(line.x != each[0].x for line in each):
            found += [(series, line) for line in each]
            continue
        columns = list(zip(*(line.y for line in each), strict=True))
        mean = tuple(fmean(column) for column in columns)
        band = {} if each[0].step else {"low": tuple(map(min, columns)), "high": tuple(map(max, columns))}
        found.append((series, replace(each[0], y=mean, label=series.label, **({"low": (), "high": ()} | band))))
    return found


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
