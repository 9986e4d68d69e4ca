"""The report's tables, cell by cell: records × metrics, pair by pair, and the paper's table beside the reference rows.

Digits are chosen per column, so that numbers of one metric line up; undefined is a dash with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from markupsafe import Markup

from ...sites import RESIDUAL, Location
from ..metrics.all import definitions
from ..results import EvaluationReport, Metric, Paired, Record
from .svg import interval_glyph
from .sweep import Sweep
from .wording import ARROWS, PAIRS, better_of, decimals, metric_label, role_of, show, show_interval, verdict

GROUPS = ("sparsity", "fidelity", "features", "time", "position")
"""Groups of columns in the main table, from left to right; those of plug-ins follow."""
NOT_MEASURED, UNDEFINED = "a", "b"
REASONS = {
    NOT_MEASURED: "does not apply to this row: a reference without features has none, or the measurement was left out",
    UNDEFINED: "undefined: nothing to average over, or zero divided by zero",
}


@dataclass(frozen=True)
class Cell:
    """One number of a table, its interval, and the letter of the reason where there is no number."""

    text: str
    interval: str = ""
    reason: str = ""
    title: str = ""


@dataclass(frozen=True)
class Column:
    """One metric as a table's column."""

    key: str
    label: str
    arrow: str
    better: str
    title: str
    group: str = ""


@dataclass(frozen=True)
class Row:
    """One record of a table."""

    name: str
    full_name: str
    role: str
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Records × metrics at one layer and site, SAEs first, reference rows apart."""

    at: Location
    columns: tuple[Column, ...]
    saes: tuple[Row, ...]
    references: tuple[Row, ...]
    series: tuple[Row, ...] = ()
    """Of many runs, a row for each series: means over its seeds. Empty where there are few, or one seed each."""

    def reasons(self) -> dict[str, str]:
        """The footnotes that this table needs."""
        return reasons_of(cell for row in (*self.saes, *self.references) for cell in row.cells)


def reasons_of(cells: Iterable[Cell]) -> dict[str, str]:
    """The footnotes that these cells need, by letter."""
    used = {cell.reason for cell in cells}
    return {letter: text for letter, text in REASONS.items() if letter in used}


def main_tables(report: EvaluationReport) -> list[Table]:
    """The headline metrics, one table per layer and site."""
    groups = headline(report)
    keys = [key for key in groups if any(key in record.metrics for record in report.records)]
    return [table(report, at, keys, groups) for at in report.locations]


def headline(report: EvaluationReport) -> dict[str, str]:
    """The metrics of the main table, from left to right, and the group of each.

    A report that was written before definitions said their group is shown by what they say today.
    """
    known = definitions()
    groups = {
        key: group
        for key, one in (known | report.definitions).items()
        if (group := one.group or (known[key].group if key in known else ""))
    }
    order = list(dict.fromkeys([*GROUPS, *groups.values()]))
    return dict(sorted(groups.items(), key=lambda item: order.index(item[1])))


def full_tables(report: EvaluationReport) -> list[Table]:
    """Every metric of every record, in order of first appearance, one table per layer and site."""
    keys = list(dict.fromkeys(key for record in report.records for key in record.metrics))
    return [table(report, at, keys) for at in report.locations]


def table(
    report: EvaluationReport, at: Location, keys: Sequence[str], groups: Mapping[str, str] = MappingProxyType({})
) -> Table:
    """The records of a layer and site by the given metrics; ``groups`` say which columns stand together."""
    records = [record for record in report.records if record.location == at]
    columns = [column(report, key, groups.get(key, "")) for key in keys]
    digits = {key: _digits(records, key) for key in keys}
    sweep = Sweep(report)
    rows = {
        kind: tuple(_row(r, keys, digits, sweep) for r in records if r.kind == kind) for kind in ("sae", "reference")
    }
    return Table(at, tuple(columns), rows["sae"], rows["reference"], _series_rows(records, keys, digits, sweep))


def _series_rows(
    records: Sequence[Record], keys: Sequence[str], digits: dict[str, int], sweep: Sweep
) -> tuple[Row, ...]:
    saes = [record for record in records if record.kind == "sae"]
    if not sweep.is_large(saes):
        return ()
    rows = []
    for series, group in sweep.groups(saes):
        if series is None or len(group) == 1:
            rows += [_row(record, keys, digits, sweep) for record in group]
            continue
        cells = tuple(_mean_cell([_applicable(record, key) for record in group], digits[key]) for key in keys)
        names = ", ".join(record.name for record in group)
        rows.append(Row(f"{series.label} ({len(group)} seeds)", names, series.style, cells))
    return tuple(rows)


def difference_tables(report: EvaluationReport) -> list[Table]:
    """Where there are many pairs: the differences TC-SAE − twin of every series, means over its seeds, in one table per
    layer and site. Empty where there are few, or one seed each.
    """
    pairs, sweep = [pair for pair in report.paired if pair.kind == "twin"], Sweep(report)
    of = {id(record): pair for pair in pairs if (record := report.record(pair.first, *pair.location)) is not None}
    records = [record for record in report.records if id(record) in of]
    if not sweep.is_large(records):
        return []
    keys = [key for key in headline(report) if any(key in pair.metrics for pair in pairs)]
    columns, found = tuple(column(report, key) for key in keys), []
    for at in report.locations:
        here = [record for record in records if record.location == at]
        metrics = {key: [of[id(record)].metrics.get(key) for record in here] for key in keys}
        digits = {
            key: max([decimals(m.value, m.low, m.high) for m in metrics[key] if m and m.value is not None], default=3)
            for key in keys
        }
        rows = []
        for series, group in sweep.groups(here):
            cells = [_mean_cell([of[id(r)].metrics.get(key) for r in group], digits[key], signed=True) for key in keys]
            label, style = (series.label, series.style) if series else (group[0].name, "tc")
            seeds = f" ({len(group)} seeds)" if len(group) > 1 else ""
            rows.append(Row(label + seeds, ", ".join(record.name for record in group), style, tuple(cells)))
        found.append(Table(at, columns, (), (), tuple(rows)))
    return [table for table in found if table.series]


def _mean_cell(metrics: Sequence[Metric | None], digits: int, *, signed: bool = False) -> Cell:
    """The mean over seeds, and from the least to the most of them."""
    values = [metric.value for metric in metrics if metric is not None and metric.value is not None]
    if len(values) < len(metrics):
        return cell(next((m for m in metrics if m is None or m.value is None), None), digits)
    low, high = show(min(values), digits), show(max(values), digits)
    mean = sum(values) / len(values)
    plus = "+" if signed and mean > 0 else ""
    return Cell(plus + show(mean, digits), "" if low == high else f"{low} … {high}")


def column(report: EvaluationReport, key: str, group: str = "") -> Column:
    """How a metric heads its column."""
    found = report.definitions.get(key)
    better = better_of(key, report)
    title = f"{found.text} [{found.unit}]" if found else key
    return Column(
        key,
        metric_label(key, report),
        ARROWS.get(better or "", ""),
        f"{better} is better" if better else "",
        title,
        group,
    )


def _digits(records: Sequence[Record], key: str) -> int:
    """What the SAEs' rows ask for at most; the references' where no SAE has the metric."""
    found = [r for r in records if key in r.metrics and r.metrics[key].value is not None]
    asked = [
        decimals(m.value, m.low, m.high) for r in found if r.kind == "sae" and (m := r.metrics[key]).value is not None
    ]
    asked = asked or [decimals(m.value, m.low, m.high) for r in found if (m := r.metrics[key]).value is not None]
    return max(asked, default=3)


def _row(record: Record, keys: Sequence[str], digits: dict[str, int], sweep: Sweep) -> Row:
    cells = tuple(cell(_applicable(record, key), digits[key]) for key in keys)
    return Row(sweep.label(record), record.name, sweep.style(record), cells, tuple(record.notes))


def _applicable(record: Record, key: str) -> Metric | None:
    """The metric, or None where a reference without features reports the size of none as undefined."""
    found = record.metrics.get(key)
    featureless = (
        found is not None and found.value is None and record.kind == "reference" and key.startswith(("l0", "l1"))
    )
    return None if featureless else found


def cell(metric: Metric | None, digits: int) -> Cell:
    """A metric as a cell."""
    if metric is None:
        return Cell("—", reason=NOT_MEASURED, title=REASONS[NOT_MEASURED])
    if metric.value is None:
        return Cell("—", reason=UNDEFINED, title=REASONS[UNDEFINED])
    unit = "" if metric.unit == "1" else f" {metric.unit}"
    return Cell(
        show(metric.value, digits), show_interval(metric, digits), title=f"{metric.value:.6g}{unit}, n = {metric.n:,}"
    )


@dataclass(frozen=True)
class Difference:
    """One metric of a pair."""

    column: Column
    first: Cell
    second: Cell
    difference: str
    interval: str
    glyph: Markup
    word: str  # what may be said, in the terms of the metric: better, worse, lower, higher, undecided …
    tone: str  # good, bad or plain: never the only carrier of the meaning


@dataclass(frozen=True)
class Comparison:
    """All differences of one pair."""

    at: Location
    first: Side
    second: Side
    differences: tuple[Difference, ...]
    others: tuple[Difference, ...]
    warning: str


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: its record's name, the role it is drawn in, its part in the comparison, and
    what it is called among the others.
    """

    name: str
    role: str
    label: str
    short: str


def comparisons(report: EvaluationReport, kind: str) -> list[Comparison]:
    """The pairs of a kind, metric by metric: the headline metrics first."""
    return [_comparison(pair, report) for pair in report.paired if pair.kind == kind]


def _comparison(pair: Paired, report: EvaluationReport) -> Comparison:
    first_shown = [key for key in headline(report) if key in pair.metrics]
    order = [*first_shown, *[key for key in pair.metrics if key not in first_shown]]
    records = report.record(pair.first, *pair.location), report.record(pair.second, *pair.location)
    found = [d for key in order if (d := _difference(key, pair, records, report))]
    main, others = (tuple(d for d in found if (d.column.key in first_shown) is wanted) for wanted in (True, False))
    sweep, names = Sweep(report), (pair.first, pair.second)
    roles = [role_of(record) if record else "external" for record in records]
    short = [sweep.label(record) if record else name for record, name in zip(records, names, strict=True)]
    first, second = (Side(*side) for side in zip(names, roles, PAIRS[pair.kind], short, strict=True))
    return Comparison(pair.location, first, second, main, others, pair.warning or _sparsity_warning(records))


def _sparsity_warning(records: tuple[Record | None, Record | None]) -> str:
    """A twin at equal λ1, a pruned SAE: another L0 is said wherever the two differ by more than 2 %."""
    sizes = [r.metrics["l0"].value if r and "l0" in r.metrics else None for r in records]
    if None in sizes or max(sizes) <= 1.02 * min(sizes):  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        return ""
    return (
        f"The two do not have the same L0 ({sizes[0]:.1f} and {sizes[1]:.1f}), so this compares them at unequal "
        "sparsity."
    )


def _difference(
    key: str, pair: Paired, records: tuple[Record | None, Record | None], report: EvaluationReport
) -> Difference | None:
    metric = pair.metrics[key]
    found = verdict(metric)
    if found is None or metric.value is None:
        return None
    values = [r.metrics.get(key) if r else None for r in records]
    digits = max([decimals(v.value, v.low, v.high) for v in values if v and v.value is not None], default=3)
    reach = max(abs(v) for v in (metric.value, metric.low or 0.0, metric.high or 0.0))
    word, tone = _judged(found.word, better_of(key, report))
    role = "tc" if pair.kind == "twin" else pair.kind
    glyph = interval_glyph(metric.value, metric.low, metric.high, reach, role)
    cells = [cell(v, digits) for v in values]
    return Difference(column(report, key), cells[0], cells[1], found.difference, found.interval, glyph, word, tone)


def _judged(word: str, better: str | None) -> tuple[str, str]:
    if word not in {"lower", "higher"} or better is None:
        return word, "plain"
    return (f"{word}: better", "good") if word == better else (f"{word}: worse", "bad")


@dataclass(frozen=True)
class PublishedQuantity:
    """One quantity of the paper's table, and the same of rows here that nothing was trained for."""

    quantity: str
    paper: tuple[str, str]  # its baseline, its TC-SAE
    here: tuple[Cell, ...]  # zero_all, zero_sae, untrained


_PAPER = (  # quantity, the paper's baseline and TC-SAE (Gemma-2-2b, layer 19, width 2304), our metric
    ("CE (nats)", "12.44", "20.38", "ce"),
    ("KL (nats)", "10.06", "17.75", "kl"),
    ("cosine(x, x̂)", "−1.0", "0.012", "cosine"),
    ("L0", "0", "1138.52", "l0"),
    ("L0 / d", "0", "0.494", "l0/d"),
    ("L1", "0", "8256", "l1"),
)
UNTRAINED = ("zero_all", "zero_sae", "untrained")


def published(report: EvaluationReport) -> tuple[Location, list[PublishedQuantity]] | None:
    """The paper's table beside our reference rows at the deepest layer, of the residual stream where that was
    evaluated; None where none of them was, or no language model.
    """
    if not report.model.predicts_tokens:
        return None
    at = max(report.locations, key=lambda one: (one.site == RESIDUAL, one.layer), default=Location(0))
    rows = [report.record(name, *at) for name in UNTRAINED]
    if not any(rows):
        return None
    return at, [
        PublishedQuantity(label, (a, b), tuple(_untrained_cell(r, key, report) for r in rows))
        for label, a, b, key in _PAPER
    ]


def _untrained_cell(record: Record | None, key: str, report: EvaluationReport) -> Cell:
    metric = _applicable(record, key.removesuffix("/d")) if record else None
    if metric is None or metric.value is None:
        return cell(metric, 0)
    if key == "l0/d":
        return Cell(show(metric.value / report.model.d_model, 3))
    return cell(metric, 3 if key == "cosine" else 2 if key in {"ce", "kl"} else 1)
