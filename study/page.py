"""A study's page: the verdict first, then a chart per question and outcome, cost, and every table. It loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..console import format_bytes, format_duration
from ..evaluate.report.chart import Panel
from ..evaluate.report.figures import write_figures
from ..evaluate.report.page import asset, colours, page_environment
from ..evaluate.report.svg import interval_glyph, render, swatch
from ..evaluate.report.wording import ARROWS, REFERENCE_NAMES, decimals, show
from ..system.atomic_files import write_file
from .findings import Analysis, VariantRow, write_analysis
from .panels import (
    alone_caption,
    cost_panels,
    curve_panels,
    effect_panels,
    level_panels,
    metric_name,
    slug,
    summary_panel,
    sweep_panels,
)
from .statistics.decision import Decision, figures
from .statistics.effects import ComparisonEffects, OutcomeEffect
from .statistics.resampling import Estimate

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "index.html"
STYLES_SHOWN = {
    "tc": "the treatment, all places",
    "twin": "the treatment, one place",
    "external": "a control",
    "reference": "beyond what untrained twins show",
}

_HOLM = ("Holm", "at the margin, Holm")


def write_page(analysis: Analysis, folder: Path) -> Path:
    """Write ``index.html``, ``analysis.json`` and ``figures/*.png|svg`` into the folder; returns the page's path.

    Raises:
        RunError, ResourceError: the folder cannot be written.

    """
    folder = Path(folder)
    write_analysis(analysis, folder)
    write_figures(all_panels(analysis), folder / "figures")
    return write_file(folder / PAGE, render_page(analysis))


def question_panels(comparison: ComparisonEffects, analysis: Analysis) -> list[Panel]:
    """The one picture of a question; where its outcomes have no common scale, one for each."""
    summary = summary_panel(comparison, analysis)
    return effect_panels(comparison, analysis) if summary is None else [summary]


def all_panels(analysis: Analysis) -> list[Panel]:
    """Every chart that gets files of its own: all of the page but those that a question has for its single outcomes."""
    effects = [panel for one in analysis.comparisons for panel in question_panels(one, analysis)]
    levels = [*level_panels(analysis), *sweep_panels(analysis)]
    return [*effects, *levels, *cost_panels(analysis), *curve_panels(analysis)]


def render_page(analysis: Analysis) -> str:
    """The page as text."""
    first, _, rest = analysis.headline.partition(". ")
    return (
        page_environment(TEMPLATES)
        .get_template("study.html.j2")
        .render(
            a=analysis,
            css=asset("report.css"),
            colours=colours(),
            verdict=first.rstrip(".") + ".",
            rest=rest,
            questions=[_question(one, analysis) for one in analysis.comparisons if one.model is None],
            by_model=[_question(one, analysis) for one in analysis.comparisons if one.model is not None],
            legend={role: (swatch(role), name) for role, name in STYLES_SHOWN.items()},
            costs=_costs(analysis),
            alone=_alone_costs(analysis),
            alone_caption=alone_caption(analysis) if analysis.alone else "",
            level_panels=_drawn(level_panels(analysis)),
            sweep_panels=_drawn(sweep_panels(analysis)),
            cost_panels=_drawn(cost_panels(analysis)),
            curve_panels=_drawn(curve_panels(analysis)),
            about=told(analysis),
            tables=_tables(analysis),
            published=_published(analysis),
            provenance=provenance(analysis),
        )
    )


@dataclass(frozen=True)
class OutcomeLine:
    """One outcome of a question's table."""

    label: str
    arrow: str
    kind: str
    effect: str
    glyph: Markup | str
    seeds: str
    signs: str
    p: str
    adjusted: str
    word: str
    tone: str
    nearest: str
    """The effect less that of the control that does most like it."""
    untrained: str


@dataclass(frozen=True)
class Question:
    """A comparison as the page shows it."""

    key: str
    name: str
    decision: Decision
    summary: list[dict[str, Any]]
    panels: list[dict[str, Any]]
    lines: list[OutcomeLine]
    controls: list[str]
    notes: list[str]
    seeds: list[int]
    places: list[str]


def _question(comparison: ComparisonEffects, analysis: Analysis) -> Question:
    decision = next(
        one for one in analysis.decisions if (one.comparison, one.model) == (comparison.name, comparison.model)
    )
    words = {reason.metric: reason.word for reason in decision.reasons}
    name = comparison.name + (f", {comparison.model} alone" if comparison.model else "")
    return Question(
        key=slug(name),
        name=name,
        decision=decision,
        summary=_drawn([one for one in [summary_panel(comparison, analysis)] if one is not None]),
        panels=_drawn(effect_panels(comparison, analysis)),
        lines=[_outcome_line(one, words[one.metric]) for one in comparison.outcomes],
        controls=[analysis.labels.get(each, each) for each in comparison.controls],
        notes=comparison.notes,
        seeds=comparison.seeds,
        places=comparison.places,
    )


def _outcome_line(one: OutcomeEffect, word: str) -> OutcomeLine:
    effect = one.effect
    tone = {"better": "good", "worse": "bad", "lost": "bad"}.get(word, "plain")
    nearest = _nearest_control(one)
    about = {
        "label": one.label,
        "arrow": ARROWS[one.better],
        "kind": one.kind,
        "word": word,
        "tone": tone,
        "nearest": f"{figures(nearest[1])} beyond {nearest[0]}" if nearest else "",
        "untrained": f"{figures(one.untrained)} beyond the untrained" if one.untrained else "",
    }
    if effect is None or effect.value is None:
        missing = dict.fromkeys(("effect", "glyph", "seeds", "p"), "—") | {"signs": "", "adjusted": ""}
        return OutcomeLine(**missing, **about)
    reach = max(abs(v) for v in (effect.value, effect.low or 0.0, effect.high or 0.0))
    return OutcomeLine(
        effect=figures(effect, one.unit),
        glyph=interval_glyph(effect.value, effect.low, effect.high, reach, "tc"),
        seeds=_range(effect),
        signs=f"{effect.positive} above zero, {effect.negative} below",
        p="—" if effect.p is None else f"{effect.p:.2g}",
        adjusted="" if one.p_worse_holm is None else f"{_HOLM[one.kind == 'fidelity']} {one.p_worse_holm:.2g}",
        **about,
    )


def _nearest_control(one: OutcomeEffect) -> tuple[str, Estimate] | None:
    """The control over which the treatment gains least, and by how much."""
    gain = 1 if one.better == "higher" else -1
    found = [(gain * each.advantage.value, each.control, each.advantage)
             for each in one.controls if each.advantage is not None and each.advantage.value is not None]  # fmt: skip
    return min(found, key=lambda each: each[0])[1:] if found else None


def _range(estimate: Estimate) -> str:
    """Least and most of the seeds' values."""
    if estimate.least is None or estimate.most is None:
        return "—"
    digits = decimals(estimate.value or 0.0, estimate.low, estimate.high)
    return f"{show(estimate.least, digits)} … {show(estimate.most, digits)}"


def _drawn(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    return [
        {"panel": panel, "svg": render(panel), "legend": [(swatch(r), r, name) for r, name in panel.legend()]}
        for panel in panels
    ]


def told(analysis: Analysis) -> list[tuple[str, str, str, str]]:
    """Every variant: label, preset, what differs from it, members with numbers."""
    return [
        (one.label, one.preset, ", ".join(f"{k} = {v}" for k, v in one.train.items()) or "—", str(one.members))
        for one in analysis.about
    ]


@dataclass(frozen=True)
class CostLine:
    """A variant's cost in words."""

    label: str
    time: str
    memory: str
    together: str
    flops: str
    parameters: str


def _costs(analysis: Analysis) -> list[CostLine]:
    return [
        CostLine(
            label=one.label,
            time=_plain(one.microseconds_per_token),
            memory="—" if one.memory_bytes is None else format_bytes(one.memory_bytes),
            together=str(one.trained_together),
            flops=_plain(one.flops_per_token),
            parameters="—" if one.parameters is None else f"{one.parameters:,.0f}",
        )
        for one in analysis.costs
    ]


def _alone_costs(analysis: Analysis) -> list[tuple[str, str, str, str]]:
    """Of trainings in processes of their own: label, time per token, memory added, the process's peak."""
    return [
        (
            one.label,
            _plain(one.alone_microseconds_per_token),
            format_bytes(one.alone_memory_bytes),
            format_bytes(one.alone_peak_bytes),
        )
        for one in analysis.costs
        if one.alone_memory_bytes is not None and one.alone_peak_bytes is not None
    ]


def _plain(value: float | None) -> str:
    return "—" if value is None else show(value, decimals(value)) if abs(value) < 1e5 else f"{value:,.0f}"


@dataclass(frozen=True)
class LevelTable:
    """Variants × metrics at one place."""

    title: str
    columns: list[tuple[str, str, str]]
    """Key, label with arrow, definition."""
    rows: list[tuple[str, list[tuple[str, str, str]]]]
    """Variant, and per metric its value, interval, and the values of its seeds."""
    references: list[tuple[str, list[str]]]
    others: list[tuple[str, list[tuple[str, str]]]]
    """All other metrics: key, and per variant the mean and the values of its seeds."""
    variants: list[str]


def _tables(analysis: Analysis) -> list[LevelTable]:
    places = list(dict.fromkeys((row.model, row.place) for row in analysis.variants))
    return [_table(analysis, model, place) for model, place in places]


def _table(analysis: Analysis, model: str, place: str) -> LevelTable:
    rows = [row for row in analysis.variants if (row.model, row.place) == (model, place)]
    keys = list(dict.fromkeys(key for row in rows for key in row.metrics))
    references = [row for row in analysis.references if (row.model, row.place) == (model, place)]
    others = list(dict.fromkeys(key for row in rows for key in row.others))
    return LevelTable(
        title=f"{model}, {place}",
        columns=[_column(key, analysis) for key in keys],
        rows=[(row.label, [_level(row.metrics.get(key)) for key in keys]) for row in rows],
        references=[
            (REFERENCE_NAMES.get(row.name, row.name), [_plain(row.metrics.get(key)) for key in keys])
            for row in references
        ],
        others=[(key, [_by_seed(row, key) for row in rows]) for key in others],
        variants=[row.label for row in rows],
    )


def _column(key: str, analysis: Analysis) -> tuple[str, str, str]:
    definition, name = analysis.definitions.get(key), metric_name(key, analysis)
    if definition is None:
        return key, name, ""
    return key, f"{name} {ARROWS.get(definition.better or '', '')}".strip(), definition.text


def _level(estimate: Estimate | None) -> tuple[str, str, str]:
    if estimate is None or estimate.value is None:
        return "—", "", ""
    digits = decimals(estimate.value, estimate.low, estimate.high)
    ends = ""
    if estimate.low is not None and estimate.high is not None and estimate.low < estimate.high:
        ends = f"{show(estimate.low, digits)} … {show(estimate.high, digits)}"
    seeds = ", ".join(
        f"seed {seed}: {value:.4g}"
        for seed, value in zip(estimate.seeds, estimate.by_seed, strict=True)
        if value is not None
    )
    return show(estimate.value, digits), ends, seeds


def _by_seed(row: VariantRow, key: str) -> tuple[str, str]:
    values = [value for value in row.others.get(key, []) if value is not None]
    if not values:
        return "—", ""
    return _plain(sum(values) / len(values)), ", ".join(f"{value:.4g}" for value in values)


def _published(analysis: Analysis) -> dict[str, Any] | None:
    table = analysis.published
    if table is None:
        return None
    return {
        "table": table,
        "columns": [REFERENCE_NAMES.get(name, name) for name in table.forensic],
        "rows": [
            (
                row.quantity,
                row.paper_baseline,
                row.paper_tc,
                _level(row.baseline),
                _level(row.tc),
                map(_plain, row.forensic),
            )
            for row in table.rows
        ],
    }


def provenance(analysis: Analysis) -> list[tuple[str, str]]:
    """Name and value of everything that says how the study came about."""
    hours = [f"{what} {format_duration(3600 * value)}" for what, value in analysis.hours.items()]
    facts = [
        (
            "study",
            f"{analysis.study}, scale {analysis.scale}, hash {analysis.fingerprint} of all that was fixed before",
        ),
        ("command", command(analysis)),
        ("seeds", ", ".join(map(str, analysis.seeds))),
        ("training", f"{analysis.tokens:,} tokens, {analysis.steps:,} steps per SAE"),
    ]
    facts += [
        (
            "text",
            f"{text.model} on {text.dataset}: {text.tokens:,} held-out tokens of {text.documents:,} documents, rows of "
            f"{text.context}; resampled over {text.resampling}",
        )
        for text in analysis.texts
    ]
    return [
        *facts,
        ("intervals", f"{1 - analysis.alpha:.0%}, {analysis.resamples:,} resamples of the text, Student's t for seeds"),
        (
            "comparisons",
            f"{analysis.tests} tests that decisions rest on, {analysis.estimates} effects estimated in all",
        ),
        ("members", f"{analysis.finished} with numbers, {len(analysis.failures)} without"),
        ("machine", "; ".join(analysis.machines)),
        ("took", ", ".join(hours)),
        ("versions", ", ".join(f"{name} {version}" for name, version in analysis.versions.items())),
        ("last evaluated", analysis.created),
    ]


def command(analysis: Analysis, scale: str | None = None) -> str:
    """What runs the study."""
    return f"pipeline study studies/{analysis.study}.toml --scale {scale or analysis.scale}"
