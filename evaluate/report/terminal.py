"""The closing table of ``pipeline evaluate``: one line per record, and where to look further."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...console import format_bytes, format_duration, summary
from ..results import OUTLIERS, EvaluationReport, Paired, Record

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
    """Fits 80 columns: the layer is said once, names are folded rather than numbers cut."""
    from rich import box
    from rich.table import Table

    one_place = len(report.locations) == 1
    title = f"{report.model.id}, {report.text.dataset}" + (f", layer {report.locations[0]}" if one_place else "")
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    table.add_column("", overflow="fold", min_width=14)
    columns = _columns(report)
    for key in columns:
        definition = report.definitions.get(key)
        table.add_column(definition.label or key if definition else key, justify="right", no_wrap=True)
    for at in report.locations:
        if not one_place:
            table.add_row(f"layer {at}", style="bold")
        for record in sorted((one for one in report.records if one.location == at), key=lambda one: one.kind):
            name = record.name.removeprefix(f"{at.short}-")
            cells = [_cell(record, key) for key in columns]
            table.add_row(name, *cells, style="dim" if record.kind == "reference" else "")
            for pair in report.paired:
                if (pair.first, pair.location) == (record.name, at):
                    other = "its twin" if pair.kind == "twin" else "the original"
                    table.add_row(f"  − {other}", *(_difference(pair, key) for key in columns))
        table.add_section()
    return table


def _difference(pair: Paired, key: str) -> Text:
    """Signed; dim where the interval includes zero."""
    from rich.text import Text

    metric = pair.metrics.get(key)
    if metric is None or metric.value is None:
        return Text("")
    said = f"{metric.value:+.1f}" if key == "l0" else f"{metric.value:+.4f}"
    told = metric.low is not None and metric.high is not None and not metric.low <= 0 <= metric.high
    return Text(said.replace("-", "−"), style="" if told else "dim")


def _columns(report: EvaluationReport) -> list[str]:
    """Those that some record has: without a language model there is no CE."""
    return [key for key in COLUMNS if any(key in record.metrics for record in report.records)]


def _cell(record: Record, key: str) -> str:
    metric = record.metrics.get(key)
    if metric is None or metric.value is None:
        return "–"
    if key == "l0":
        return f"{metric.value:.1f}"
    said = f"{metric.value:.0e}" if 0 < abs(metric.value) < 5e-4 else f"{metric.value:.3f}"
    return said.replace("-", "−")


def _facts(outcome: Outcome) -> dict[str, Any]:
    report = outcome.report
    return {
        "name": report.name,
        "folder": str(outcome.folder),
        "page": str(outcome.page) if outcome.page else None,
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
