"""docs/RESULTS.md and its figures: what studies that were run found, in plain language. Generated, never typed."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ..evaluate.report.chart import Panel
from ..evaluate.report.figures import write_figures
from ..evaluate.report.wording import ARROWS, REFERENCE_NAMES, decimals, listed, show
from ..system.atomic_files import write_file
from .findings import Analysis
from .page import command, provenance, question_panels, told
from .panels import alone_caption, cost_panels, curve_panels, level_panels, metric_name, sweep_panels
from .statistics.decision import figures
from .statistics.effects import ComparisonEffects, OutcomeEffect
from .statistics.resampling import Estimate

_WORDS = {
    "better": "**better**",
    "worse": "**worse**",
    "lost": "**lost**",
    "kept": "kept",
    "open": "open",
    "unclear": "unclear",
}


def write_document(analyses: Sequence[Analysis], path: Path) -> Path:
    """Write the document, and its figures into a folder ``results/`` beside it; returns its path.

    Args:
        analyses: of the studies that were run, in the order in which they are told.
        path: of the document, such as docs/RESULTS.md.

    Raises:
        RunError, ResourceError: the files cannot be written.

    """
    path = Path(path)
    for analysis in analyses:
        write_figures(_shown(analysis), path.parent / _figures_folder(analysis))
    return write_file(path, document(analyses))


def document(analyses: Sequence[Analysis]) -> str:
    """The document as text."""
    parts = ["# Results", ""]
    parts += [
        "This file is written by `pipeline study`: every number in it is measured, none is typed by hand. "
        "[METHOD.md](METHOD.md) defines the metrics and the statistics.",
        "",
    ]
    for analysis in analyses:
        parts += [f"- {_title(analysis)} {analysis.headline}"]
    parts += ["", *_verdicts(analyses)]
    for analysis in analyses:
        parts += ["", *_study(analysis)]
    lines = re.sub("\n{3,}", "\n\n", "\n".join(parts)).rstrip().split("\n")
    return "\n".join(map(_wrapped, lines)) + "\n"


def _wrapped(line: str) -> str:
    """A line of prose within the width of the other documents; tables and pictures are lines by nature."""
    if line.startswith(("|", "![", "#")):
        return line
    behind = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=behind, break_long_words=False, break_on_hyphens=False)


def _title(a: Analysis) -> str:
    return f"**{a.study}, scale {a.scale}: {a.question}**"


def _figures_folder(a: Analysis) -> str:
    """Relative to the document. A study may have been run at several scales."""
    return f"results/{a.study}-{a.scale}"


def _verdicts(analyses: Sequence[Analysis]) -> list[str]:
    """Every comparison of every study in one table, so that the reader sees all of them before the first number."""
    rows = [
        [analysis.study, analysis.scale, one.comparison, f"**{one.verdict}**"]
        for analysis in analyses
        for one in analysis.decisions
        if one.model is None
    ]
    return _table(["study", "scale", "comparison", "verdict"], rows) if rows else []


def _study(a: Analysis) -> list[str]:
    parts = [f"## {a.study}, scale {a.scale}: {a.question}", "", a.headline, ""]
    parts += [f"```\n{command(a)}\n```", ""]
    for one in a.comparisons:
        if one.model is None:
            parts += _comparison(one, a)
    parts += _models(a) + _claims(a) + _published(a) + _pictures(a) + _cost(a) + _levels(a)
    parts += ["### Limits", "", *(f"- {limit}" for limit in [*a.limits, *(f"{note}." for note in a.notes)])]
    parts += [
        f"- Without numbers: {one.variant}, seed {one.seed}, {one.model} {one.place}: {one.message}"
        for one in a.failures
    ]
    parts += ["", "### How it was run", "", "| | |", "|---|---|"]
    parts += [f"| {_cell(name)} | {_cell(value)} |" for name, value in provenance(a)]
    return parts + _larger(a)


def _comparison(one: ComparisonEffects, a: Analysis) -> list[str]:
    decision = next(each for each in a.decisions if (each.comparison, each.model) == (one.name, one.model))
    words = {reason.metric: reason.word for reason in decision.reasons}
    parts = [f"### {one.name}: {decision.verdict}", "", decision.sentence, ""]
    panels = question_panels(one, a)
    parts += [f"![{panel.title}]({_figures_folder(a)}/{panel.key}.png)" for panel in panels]
    header = ["outcome", "effect", "finding", "seeds, least … most", "signs", "p", "p, Holm", "less each control"]
    parts += ["", *_table([*header, "beyond untrained"], [_outcome(each, words[each.metric]) for each in one.outcomes])]
    parts += [f"- **{reason.word}**: {reason.sentence}." for reason in decision.reasons]
    return [*parts, *(f"- {note}." for note in one.notes), ""]


def _outcome(one: OutcomeEffect, word: str) -> list[str]:
    effect = one.effect
    shown = _WORDS.get(word, word)
    if effect is None or effect.value is None:
        return [one.label, "—", shown, *["—"] * 6]
    controls = "; ".join(f"{each.control} {figures(each.advantage)}" for each in one.controls if each.advantage)
    return [
        f"{one.label} {ARROWS[one.better]}",
        figures(effect, one.unit),
        shown,
        _range(effect),
        f"{effect.positive} +, {effect.negative} −",
        "—" if effect.p is None else f"{effect.p:.2g}",
        "—" if one.p_worse_holm is None else f"{one.p_worse_holm:.2g}",
        controls or "—",
        figures(one.untrained) if one.untrained else "—",
    ]


def _range(estimate: Estimate) -> str:
    if estimate.least is None or estimate.most is None:
        return "—"
    digits = decimals(estimate.value or 0.0, estimate.low, estimate.high)
    return f"{show(estimate.least, digits)} … {show(estimate.most, digits)}"


def _models(a: Analysis) -> list[str]:
    alone = [one for one in a.decisions if one.model is not None]
    if not alone:
        return []
    return ["### Model by model", "", *(f"- **{one.verdict}**: {one.sentence}" for one in alone), ""]


def _claims(a: Analysis) -> list[str]:
    if not a.claims:
        return []
    rows = [
        [
            one.claimed,
            one.measured,
            f"**{one.verdict}**",
            one.meaning,
            ", ".join(map(str, one.estimate.seeds)) if one.estimate else "—",
        ]
        for one in a.claims
    ]
    header = ["claimed", "measured", "verdict", "what the number is", "seeds"]
    return ["### The paper's claims", "", *_table(header, rows)]


def _published(a: Analysis) -> list[str]:
    table = a.published
    if table is None:
        return []
    names = [REFERENCE_NAMES.get(name, name) for name in table.forensic]
    header = ["quantity", "published “baseline”", "published “TC-SAE”", "baseline, trained", "TC-SAE, trained", *names]
    rows = [
        [
            row.quantity,
            row.paper_baseline or "—",
            row.paper_tc or "—",
            _level(row.baseline),
            _level(row.tc),
            *("—" if value is None else show(value, decimals(value)) for value in row.forensic),
        ]
        for row in table.rows
    ]
    about = (
        f"Published: Gemma-2-2b, layer 19, width 2304. Here: {table.model}, {table.place}, width {table.width or '—'}, "
        f"ln V = {table.ln_vocabulary:.2f}. The columns on the right are of rows that nothing was trained for."
    )
    return ["### The paper's table", "", about, "", *_table(header, rows)]


def _cost(a: Analysis) -> list[str]:
    rows = [
        [
            one.label,
            "—" if one.microseconds_per_token is None else f"{one.microseconds_per_token:.3g}",
            "—" if one.memory_bytes is None else f"{one.memory_bytes / 1e9:.3g}",
            str(one.trained_together),
            "—" if one.flops_per_token is None else f"{one.flops_per_token:.3g}",
        ]
        for one in a.costs
    ]
    header = ["variant", "training, µs per token", "peak memory of the process, GB", "SAEs in it", "FLOP per token"]
    return ["### Cost", "", *_table(header, rows), *_alone(a)] if rows else []


def _alone(a: Analysis) -> list[str]:
    """What training takes in a process of its own."""
    if not a.alone:
        return []
    rows = [
        [one.label, *(f"{value:.3g}" for value in (time, memory / 1e6, peak / 1e6))]
        for one in a.costs
        if (time := one.alone_microseconds_per_token) is not None
        and (memory := one.alone_memory_bytes) is not None
        and (peak := one.alone_peak_bytes) is not None
    ]
    header = ["variant, trained alone", "µs per token", "memory that training adds, MB", "peak of the process, MB"]
    return [alone_caption(a), "", *_table(header, rows)]


def _levels(a: Analysis) -> list[str]:
    header = ["variant", "preset", "over the preset and the study's training", "SAEs with numbers"]
    parts = ["### Every variant", "", *_table(header, [list(row) for row in told(a)])]
    for model, place in dict.fromkeys((row.model, row.place) for row in a.variants):
        rows = [row for row in a.variants if (row.model, row.place) == (model, place)]
        keys = list(dict.fromkeys(key for row in rows for key in row.metrics))
        labels = [metric_name(key, a) for key in keys]
        body = [[row.label, *(_level(row.metrics.get(key)) for key in keys)] for row in rows]
        parts += [f"{model}, {place}; seeds {listed(map(str, rows[0].seeds))}:", ""]
        parts += _table(["variant", *labels], body)
    return parts


def _level(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return "—"
    digits = decimals(estimate.value, estimate.low, estimate.high)
    ends = ""
    if estimate.low is not None and estimate.high is not None and estimate.low < estimate.high:
        ends = f" [{show(estimate.low, digits)}, {show(estimate.high, digits)}]"
    return show(estimate.value, digits) + ends


def _larger(a: Analysis) -> list[str]:
    """The lines that would run it at the other scales."""
    others = [name for name in a.scales if name != a.scale]
    if not others:
        return []
    parts = ["", "At the other scales:", ""]
    for name in others:
        estimate = f" ({a.scales[name]})" if a.scales[name] else ""
        on = " on Gemma-2-2b" if name == "gemma" else ""
        parts.append(f"- `{command(a, name)}`{on}{estimate}")
    return parts


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *rows]
    return [*("| " + " | ".join(map(_cell, line)) + " |" for line in lines), ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _shown(analysis: Analysis) -> list[Panel]:
    """The figures that the document shows."""
    effects = [panel for one in analysis.comparisons if one.model is None for panel in question_panels(one, analysis)]
    return [*effects, *_beside(analysis)]


def _beside(analysis: Analysis) -> list[Panel]:
    """Those that belong to no comparison."""
    found = [one for one in level_panels(analysis) if one.key == "level-plane"] + sweep_panels(analysis)[:4]
    found += [one for one in cost_panels(analysis) if one.key == "cost-time"]
    return found + [one for one in curve_panels(analysis) if one.key in _CURVES]


_CURVES = ("curve-loss", "curve-temporal-share")


def _pictures(analysis: Analysis) -> list[str]:
    found = [f"![{panel.title}]({_figures_folder(analysis)}/{panel.key}.png)" for panel in _beside(analysis)]
    return ["### Across variants", "", *found, ""] if found else []
