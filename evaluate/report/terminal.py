"""The closing table of ``pipeline evaluate``: one line per record, and where to look further."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...console import format_bytes, format_duration, summary
from ..config import CODES_FOLDER
from ..results import MADE_OF_ANOTHER, OUTLIERS, EvaluationReport, Paired, Record

if TYPE_CHECKING:
    from rich.text import Text

    from ..finished import Outcome

COLUMNS = ("l0", "explained_variance" + OUTLIERS, "ce_score_mean", "ce", "kl", "cosine")


def print_outcomes(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    """A table per report on standard output, or one line of JSON for all."""
    if as_json:
        summary("evaluated", {"reports": [_facts(one) for one in outcomes]}, as_json=True)
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for outcome in outcomes:
        report = outcome.report
        for sentence in _sentences(outcome):
            console.print(sentence, highlight=False)
        console.print(_table(report))
        page = outcome.page or outcome.folder / "results.json"
        facts: dict[str, Any] = {
            "text": f"{report.n_tokens:,} tokens of {report.n_documents} documents",
            "intervals": f"95 %, resampling {report.resampling}",
            "took": f"{format_duration(report.seconds)}, {format_bytes(report.peak_memory_bytes or 0)} of memory at "
            "most",
            "report": page,
        }
        if any(record.codes for record in report.records):
            facts["codes"] = f"{outcome.folder / CODES_FOLDER}: pipeline features RUN --report {outcome.folder}"
        if "ce" in _columns(report):
            facts["uniform guess"] = f"CE = ln V = {math.log(report.model.vocab_size):.2f}"
        if report.failures:
            facts["failed"] = "; ".join(failure.path for failure in report.failures)
        summary("* without tokens of outlying norm", facts, as_json=False)


def _sentences(outcome: Outcome) -> Sequence[str]:
    if outcome.sentences is not None:
        return outcome.sentences
    from .verdict import first_sentences, verdicts

    return first_sentences(verdicts(outcome.report))


def _table(report: EvaluationReport) -> Any:
    """Fits 80 columns: the layer is said once, names are folded rather than numbers cut. Of many runs, the seeds of a
    series are one row with their means.
    """
    from rich import box
    from rich.table import Table

    from .sweep import Sweep, in_reading_order

    report = in_reading_order(report)
    sweep, one_place = Sweep(report), len(report.locations) == 1
    title = f"{report.model.id}, {report.text.dataset}" + (f", layer {report.locations[0]}" if one_place else "")
    large = {
        at: sweep.is_large([r for r in report.records if (r.location, r.kind) == (at, "sae")])
        for at in report.locations
    }
    if any(large.values()):
        title += "; ×n: mean of n seeds"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    table.add_column("", overflow="fold", min_width=14)
    columns = _columns(report)
    for key in columns:
        definition = report.definitions.get(key)
        table.add_column(definition.label or key if definition else key, justify="right", no_wrap=True)
    for at in report.locations:
        if not one_place:
            table.add_row(f"layer {at}", style="bold")
        here = [record for record in report.records if record.location == at]
        saes = [record for record in here if record.kind == "sae"]
        groups = sweep.groups(saes) if large[at] else [(None, [record]) for record in saes]
        for series, group in groups:
            many = series is not None and len(group) > 1
            name = f"{series.label} ×{len(group)}" if many and series else sweep.label(group[0])
            table.add_row(name, *(_cell(group, key) for key in columns))
            names = [record.name for record in group]
            for kind in ("twin", *MADE_OF_ANOTHER):
                other = "its twin" if kind == "twin" else "the original"
                pairs = [p for p in report.paired if p.kind == kind and p.location == at and p.first in names]
                if pairs:
                    table.add_row(f"  − {other}", *(_difference(pairs, key) for key in columns))
        for record in here:
            if record.kind == "reference":
                table.add_row(sweep.label(record), *(_cell([record], key) for key in columns), style="dim")
        table.add_section()
    return table


def _difference(pairs: Sequence[Paired], key: str) -> Text:
    """Signed, the mean of the pairs; dim unless all have one sign and intervals without zero."""
    from rich.text import Text

    found = [metric for pair in pairs if (metric := pair.metrics.get(key)) is not None]
    values = [metric.value for metric in found if metric.value is not None]
    if len(values) < len(pairs):
        return Text("")
    mean = fmean(values)
    said = f"{mean:+.1f}" if key == "l0" else f"{mean:+.4f}"
    told = all(m.low is not None and m.high is not None and not m.low <= 0 <= m.high for m in found)
    told = told and len({value > 0 for value in values}) == 1
    return Text(said.replace("-", "−"), style="" if told else "dim")


def _columns(report: EvaluationReport) -> list[str]:
    """Those that some record has: without a language model there is no CE."""
    return [key for key in COLUMNS if any(key in record.metrics for record in report.records)]


def _cell(records: Sequence[Record], key: str) -> str:
    values = [m.value for one in records if (m := one.metrics.get(key)) is not None and m.value is not None]
    if not values or len(values) < len(records):
        return "–"
    value = fmean(values)
    if key == "l0":
        return f"{value:.1f}"
    said = f"{value:.0e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"
    return said.replace("-", "−")


def _facts(outcome: Outcome) -> dict[str, Any]:
    report = outcome.report
    return {
        "name": report.name,
        "folder": str(outcome.folder),
        "page": str(outcome.page) if outcome.page else None,
        "codes": {record.name: str(outcome.folder / record.codes) for record in report.records if record.codes},
        "model": report.model.id,
        "tokens": report.n_tokens,
        "documents": report.n_documents,
        "seconds": report.seconds,
        "records": [
            {"layer": record.layer, "site": record.site, "name": record.name, "kind": record.kind}
            | {key: record.metrics[key].value if key in record.metrics else None for key in _columns(report)}
            for record in report.records
        ],
        "failures": [failure.model_dump() for failure in report.failures],
    }
