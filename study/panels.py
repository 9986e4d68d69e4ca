"""The charts of a study: an effect with its controls, seeds and margin per outcome; cost; curves of the training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..evaluate.report.chart import SERIES, Axis, Line, Mark, Panel, Rule
from ..evaluate.report.wording import ARROWS, capitalised
from .alone import in_processes
from .findings import Analysis, VariantRow
from .statistics.decision import figures
from .statistics.effects import ComparisonEffects, OutcomeEffect
from .statistics.resampling import Estimate

_SERIES_NAMES = {
    "loss": "total loss (log scale)",
    "reconstruction": "reconstruction loss (log scale)",
    "temporal_share": "temporal share of the loss (%)",
    "l0": "L0",
    "explained_variance": "explained variance",
    "dead_share": "share of dead features (%)",
    "grad_norm": "gradient norm (log scale)",
}
_LOG, _PERCENT = {"loss", "reconstruction", "grad_norm"}, {"temporal_share", "dead_share"}
DOTS = 0.3
"""How far below an effect the dots of its seeds are, in rows."""

_ASCII = str.maketrans({"λ": "lambda", "η": "eta", "θ": "theta", "−": "-"})


def slug(text: str) -> str:
    """A text as the name of a file and of a place in a page: ASCII letters and digits, with single dashes between."""
    plain = text.lower().translate(_ASCII)
    return "-".join(re.findall(r"[a-z0-9.]+", plain)).strip(".")


def effect_panels(comparison: ComparisonEffects, analysis: Analysis) -> list[Panel]:
    """One per outcome: the effect, the same at every place, what controls do, what remains beyond untrained twins."""
    found = (_effect_panel(comparison, one, analysis) for one in comparison.outcomes)
    return [panel for panel in found if panel is not None]


def summary_panel(comparison: ComparisonEffects, analysis: Analysis) -> Panel | None:
    """All outcomes of a question in one picture: gains in units of what matters, so that right is better everywhere.

    The unit is an outcome's margin, or what the study file calls negligible. None where an outcome has neither.
    """
    marks: list[Mark] = []
    names: list[str] = []
    for one in comparison.outcomes:
        unit = one.margin or one.negligible
        if unit is None:
            return None
        if one.effect is None or one.effect.value is None:
            continue
        y, factor = len(names), one.sign / unit
        names.append(f"{one.label} {ARROWS[one.better]}")
        marks += _scaled(one.effect, factor, y, "tc", f"{one.label}: {figures(one.effect, one.unit)}")
        for each in one.controls:
            if each.effect is not None and each.effect.value is not None:
                name = analysis.labels.get(each.control, each.control)
                said = f"{one.label}, control {name}: {figures(each.effect)}"
                marks.append(Mark(each.effect.value * factor, y - DOTS, "external", "", said, small=True))
    if not names:
        return None
    label = analysis.labels
    pair = f"{label.get(comparison.treatment, '')} − {label.get(comparison.baseline, '')}"
    return Panel(
        key=slug(f"{comparison.name}-all" + (f"-{comparison.model}" if comparison.model else "")),
        title=pair,
        x=Axis("gain, in units of what matters"),
        y=Axis("", categories=tuple(names)),
        marks=tuple(marks),
        rules=(Rule("", x=0.0), Rule("matters", x=1.0), Rule("harms", x=-1.0)),
        caption="Right of zero is better, whichever way the outcome goes. 1 is the margin of a fidelity outcome, or "
        "the difference that the study file calls negligible of another. Dots below: seeds. Dots above: controls.",
    )


def _scaled(effect: Estimate, factor: float, y: int, role: str, said: str) -> Iterable[Mark]:
    ends = _ends(effect)
    scaled = None if ends is None else (min(e * factor for e in ends), max(e * factor for e in ends))
    yield Mark((effect.value or 0.0) * factor, y, role, "", said, x_interval=scaled)
    for seed, value in zip(effect.seeds, effect.by_seed, strict=True):
        if value is not None:
            yield Mark(value * factor, y + DOTS, role, "", f"seed {seed}: {value:.4g}", small=True)


def _effect_panel(comparison: ComparisonEffects, one: OutcomeEffect, analysis: Analysis) -> Panel | None:
    if one.effect is None or one.effect.value is None:
        return None
    label = analysis.labels
    several = len({place.model for place in one.places}) > 1
    rows: list[tuple[str, str, Estimate | None]] = [(label.get(comparison.treatment, ""), "tc", one.effect)]
    rows += [(_at(place.model, place.place, several), "twin", place.effect) for place in one.places]
    rows += [(label.get(each.control, each.control), "external", each.effect) for each in one.controls]
    if one.wants_untrained:
        rows.append(("beyond untrained", "reference", one.untrained))
    shown = [(name, role, estimate) for name, role, estimate in rows if estimate is not None]
    marks = [mark for y, row in enumerate(shown) for mark in _marks(y, *row, one.unit)]
    rules = [Rule("", x=0.0)]
    if one.margin is not None:
        rules.append(Rule(f"margin {-one.sign * one.margin:+g}".replace("-", "−"), x=-one.sign * one.margin))
    unit = "" if one.unit in ("", "1") else f" ({one.unit})"
    return Panel(
        key=slug(f"{comparison.name}-{one.metric}" + (f"-{comparison.model}" if comparison.model else "")),
        title=f"{one.label} {ARROWS[one.better]}",
        x=Axis(f"difference from {label.get(comparison.baseline, comparison.baseline)}{unit}"),
        y=Axis("", categories=tuple(name for name, *_ in shown)),
        marks=tuple(marks),
        rules=tuple(rules),
        caption=_caption(one),
    )


def _caption(one: OutcomeEffect) -> str:
    good = "right" if one.better == "higher" else "left"
    parts = [f"Better is to the {good}."]
    if one.effect is not None:
        parts.append(f"{capitalised(one.effect.levels)}.")
    if lacking := [each.control for each in one.controls if each.effect is None]:
        parts.append(f"No numbers of control {', '.join(lacking)}.")
    if one.wants_untrained and one.untrained is None:
        parts.append("Untrained twins were not measured on it.")
    return " ".join(parts)


def _at(model: str, place: str, several: bool) -> str:
    return f"{model.rsplit('/', 1)[-1]} {place}" if several else place


def _marks(y: int, name: str, role: str, estimate: Estimate, unit: str, *, signed: bool = True) -> Iterable[Mark]:
    if estimate.value is None:
        return
    ends, said = _ends(estimate), figures(estimate, unit, signed=signed)
    yield Mark(estimate.value, y, role, said.split(" ")[0], f"{name}: {said}", x_interval=ends)
    for seed, value in zip(estimate.seeds, estimate.by_seed, strict=True):
        if value is not None:
            yield Mark(value, y + DOTS, role, "", f"{name}, seed {seed}: {value:.4g}", small=True)


def level_panels(analysis: Analysis) -> list[Panel]:
    """Fidelity against sparsity, then every outcome of every variant, at the deepest place of the first model."""
    model, place = _shown_place(analysis)
    rows = [row for row in analysis.variants if (row.model, row.place) == (model, place)]
    outcomes = list(dict.fromkeys(one.metric for each in analysis.comparisons for one in each.outcomes))
    keys = [key for key in [*outcomes, *_LEVELS] if any(key in row.metrics for row in rows)]
    found = [_plane(rows, analysis)] + [_level_panel(key, rows, analysis) for key in dict.fromkeys(keys)]
    return [panel for panel in found if panel is not None]


_LEVELS = ("explained_variance", "l0", "alive", "temporal_variation")


def metric_name(key: str, analysis: Analysis) -> str:
    """What the study calls it as an outcome, else its definition's label, else its key in words."""
    named = (one.label for each in analysis.comparisons for one in each.outcomes if one.metric == key)
    definition = analysis.definitions.get(key)
    return next(named, "") or (definition.label if definition else "") or key.replace("_", " ")


_WIDE = 4
"""How many times the smallest L0 the largest is, from which their axis is logarithmic."""
_NAMES = {"tc": "treatment", "twin": "baseline", "external": "other"}


def _role(variant: str, analysis: Analysis) -> str:
    """Treatments, baselines and all others look different."""
    if any(one.treatment == variant for one in analysis.comparisons):
        return "tc"
    return "twin" if any(one.baseline == variant for one in analysis.comparisons) else "external"


def _ends(estimate: Estimate) -> tuple[float, float] | None:
    return None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)


def _plane(rows: Sequence[VariantRow], analysis: Analysis) -> Panel | None:
    marks = []
    for row in rows:
        x, y = row.metrics.get("l0"), row.metrics.get("ce_score_mean")
        if x is not None and y is not None and x.value is not None and y.value is not None:
            said = f"{row.label}: L0 {figures(x, signed=False)}, CE recovered {figures(y, signed=False)}"
            marks.append(Mark(x.value, y.value, _role(row.variant, analysis), row.label, said, _ends(x), _ends(y)))
    if not marks:
        return None
    sizes = [mark.x for mark in marks]
    wide = min(sizes) > 0 and max(sizes) > _WIDE * min(sizes)
    axes = Axis("L0: active features per token" + " (log scale)" * wide, log=wide), Axis("CE recovered")
    caption = f"At {rows[0].place} of {rows[0].model}."
    return Panel("level-plane", "Fidelity against sparsity", *axes, tuple(marks), caption=caption, names=_NAMES)


def _level_panel(key: str, rows: Sequence[VariantRow], analysis: Analysis) -> Panel | None:
    definition, label = analysis.definitions.get(key), metric_name(key, analysis)
    shown = [(row, one) for row in rows if (one := row.metrics.get(key)) is not None and one.value is not None]
    marks = [
        mark
        for y, (row, one) in enumerate(shown)
        for mark in _marks(
            y, row.label, _role(row.variant, analysis), one, definition.unit if definition else "", signed=False
        )
    ]
    names = [row.label for row, _ in shown]
    for one in analysis.references:
        value = one.metrics.get(key)
        if (
            (one.model, one.place) == (rows[0].model, rows[0].place)
            and one.name.startswith("untrained:")
            and value is not None
        ):
            marks.append(Mark(value, len(names), "reference", "", f"{one.name}: {value:.4g}"))
            names.append(one.name)
    if not shown:
        return None
    unit = "" if definition is None or definition.unit in ("", "1") else f" ({definition.unit})"
    better = f" {ARROWS[definition.better]}" if definition and definition.better else ""
    caption = (
        f"At {rows[0].place} of {rows[0].model}. Intervals are of the level, which differs between texts more than "
    )
    caption += "between variants: an effect's own interval is narrower."
    axes = Axis(label + unit), Axis("", categories=tuple(names))
    return Panel(f"level-{slug(key)}", label + better, *axes, tuple(marks), caption=caption, names=_NAMES)


def sweep_panels(analysis: Analysis) -> list[Panel]:
    """Metrics over λ2, where three variants or more differ in nothing else; one line per place."""
    found = []
    for key in (*_SWEPT, *(one.metric for each in analysis.comparisons[:1] for one in each.outcomes)):
        if any(panel.key == f"sweep-{slug(key)}" for panel in found):
            continue
        panel = _sweep_panel(key, analysis)
        if panel is not None:
            found.append(panel)
    return found


_SWEPT = ("kl", "explained_variance", "alive", "temporal_variation", "near_duplicate_share")
_OF_A_RUN = ("temporal.weight", "seed", "cost.", "data.store", "tokens", "steps", "run.")


def swept(analysis: Analysis) -> dict[str, float]:
    """The largest group of variants that differ in λ2 alone: variant → λ2, rising."""
    groups: dict[str, dict[str, float]] = {}
    for variant, settings in analysis.settings.items():
        weight = settings.get("temporal.weight")
        if isinstance(weight, int | float) and weight > 0 and settings.get("temporal.form") != "none":
            rest = {name: value for name, value in settings.items() if not name.startswith(_OF_A_RUN)}
            groups.setdefault(repr(sorted(rest.items())), {})[variant] = float(weight)
    largest = max(groups.values(), key=len, default={})
    return dict(sorted(largest.items(), key=lambda item: item[1])) if len(set(largest.values())) >= 3 else {}


def _sweep_panel(key: str, analysis: Analysis) -> Panel | None:
    weights = swept(analysis)
    places = list(dict.fromkeys((row.model, row.place) for row in analysis.variants))
    lines, rules = [], []
    for role, (model, place) in zip(SERIES, places, strict=False):
        rows = {row.variant: row for row in analysis.variants if (row.model, row.place) == (model, place)}
        points = [
            (weight, one)
            for variant, weight in weights.items()
            if variant in rows and (one := rows[variant].metrics.get(key)) is not None and one.value is not None
        ]
        if len(points) < 3:
            continue
        name = _at(model, place, len({model for model, _ in places}) > 1)
        banded = [ends for _, one in points if (ends := _ends(one)) is not None]
        low, high = (tuple(each[end] for each in banded) for end in (0, 1))
        xs, ys = tuple(weight for weight, _ in points), tuple(one.value or 0.0 for _, one in points)
        whole = len(banded) == len(points)
        lines.append(Line(xs, ys, role, name, low if whole else (), high if whole else ()))
        if len(places) == 1:
            baseline = next((one.baseline for one in analysis.comparisons if one.baseline in rows), None)
            level = rows[baseline].metrics.get(key) if baseline else None
            rules += [Rule(analysis.labels.get(baseline or "", ""), y=level.value)] if level and level.value else []
    if not lines:
        return None
    label = metric_name(key, analysis)
    axes = Axis("λ2 (log scale)", log=True), Axis(label)
    return Panel(f"sweep-{slug(key)}", f"{label} over λ2", *axes, lines=tuple(lines), rules=tuple(rules))


def cost_panels(analysis: Analysis) -> list[Panel]:
    """Time and memory of every variant."""
    found = []
    for key, title, field, label, scale in (
        ("cost-time", "Training time", "microseconds_per_token", "µs per token", 1.0),
        ("cost-memory", "Memory in training", "memory_bytes", "GB, the process's peak", 1e-9),
        ("cost-flops", "Arithmetic of one token's code", "flops_per_token", "MFLOP per token", 1e-6),
        ("cost-alone-memory", "Memory of training alone", "alone_memory_bytes", "MB that it adds to its process", 1e-6),
        ("cost-alone-time", "Time of training alone", "alone_microseconds_per_token", "µs per token", 1.0),
    ):
        rows = [(one, getattr(one, field)) for one in analysis.costs if getattr(one, field) is not None]
        if not rows:
            continue
        marks = tuple(
            Mark(value * scale, y, "external", f"{value * scale:.3g}", f"{one.label}: {value * scale:.4g} {label}")
            for y, (one, value) in enumerate(rows)
        )
        names = tuple(one.label for one, _ in rows)
        caption = ""
        if field == "memory_bytes" and any(one.trained_together > 1 for one, _ in rows):
            caption = "Variants that trained in one process share its peak."
        if field.startswith("alone"):
            caption = alone_caption(analysis)
            marks += tuple(_alone_dots(rows, field, scale, analysis))
        found.append(Panel(key, title, Axis(label, low=0), Axis("", categories=names), marks, caption=caption))
    return found


def alone_caption(analysis: Analysis) -> str:
    """How trainings in processes of their own were made."""
    each = analysis.alone[0]
    return (
        f"Trained once more for {each.steps:,} steps, for this alone: each SAE in {in_processes(each.repeats)}. Memory "
        f"is what the training added to the {each.held_bytes / 1e6:.0f} MB that Python and libraries held before it."
    )


def _alone_dots(rows: Sequence, field: str, scale: float, analysis: Analysis) -> Iterable[Mark]:
    for y, (row, _) in enumerate(rows):
        for one in analysis.alone:
            if one.variant == row.variant:
                value = getattr(one, field.removeprefix("alone_")) * scale
                yield Mark(value, y + DOTS, "external", "", f"{row.label}, seed {one.seed}: {value:.4g}", small=True)


def curve_panels(analysis: Analysis) -> list[Panel]:
    """What training logged, at the deepest place of the first model: the mean over seeds, a band from least to most."""
    if not analysis.curves:
        return []
    model, place = _shown_place(analysis)
    here = [one for one in analysis.curves if (one.model, one.place) == (model, place)]
    variants = [name for name in _in_question(analysis) if any(one.variant == name for one in here)]
    shown = variants[: len(SERIES)]
    panels = []
    for series, label in _SERIES_NAMES.items():
        lines = []
        for role, variant in zip(SERIES, shown, strict=False):
            runs = [one for one in here if (one.variant, one.series) == (variant, series)]
            factor = 100.0 if series in _PERCENT else 1.0
            if line := _line(runs, role, analysis.labels.get(variant, variant), factor, log=series in _LOG):
                lines.append(line)
        if not lines or (series in _PERCENT and not any(any(line.y) for line in lines)):
            continue
        caption = f"At {place} of {model}; bands reach from the least to the most of the seeds."
        if len(variants) > len(shown):
            caption += f" The first {len(shown)} of {len(variants)} variants; all are in analysis.json."
        axis = Axis(label, log=series in _LOG, low=0 if series in _PERCENT else None)
        panels.append(
            Panel(f"curve-{slug(series)}", label, Axis("step", low=0), axis, lines=tuple(lines), caption=caption)
        )
    return panels


def _shown_place(analysis: Analysis) -> tuple[str, str]:
    first = analysis.variants[0].model
    return first, [row.place for row in analysis.variants if row.model == first][-1]


def _in_question(analysis: Analysis) -> list[str]:
    """Variants of the comparisons first, then the others in the file's order."""
    named = [name for one in analysis.comparisons for name in (one.treatment, one.baseline, *one.controls)]
    return list(dict.fromkeys([*named, *analysis.labels]))


def _line(runs: Sequence, role: str, label: str, factor: float, *, log: bool) -> Line | None:
    """Over the steps that all seeds logged."""
    if not runs:
        return None
    by_run = [dict(zip(run.steps, run.values, strict=True)) for run in runs]
    steps = [
        step
        for step in runs[0].steps
        if all((value := each.get(step)) is not None and (value > 0 or not log) for each in by_run)
    ]
    if len(steps) < 2:
        return None
    values = [[each[step] * factor for each in by_run] for step in steps]
    several = len(runs) > 1
    return Line(
        tuple(map(float, steps)),
        tuple(sum(row) / len(row) for row in values),
        role,
        label,
        tuple(map(min, values)) if several else (),
        tuple(map(max, values)) if several else (),
    )
