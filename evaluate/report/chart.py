"""One description of a chart, drawn twice: as inline SVG in the report (svg.py) and by matplotlib for papers
(figures.py).

A panel is data, axes and words; nothing here knows how a line is drawn. The roles' colours, shapes, dashes and words
are here too, so that a TC-SAE looks the same in every picture, and is told from its twin without colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...sites import RESIDUAL

LIGHT, DARK = "#fffefb", "#15171a"  # the page's two backgrounds; every colour below has contrast >= 4.5 on its own


@dataclass(frozen=True)
class RoleStyle:
    """How one role looks: name, colour on a light and on a dark background, marker (by name), dash lengths."""

    name: str
    light: str
    dark: str
    marker: str
    dash: tuple[float, ...]


ROLES = {
    "tc": RoleStyle("TC-SAE", "#0a5fa5", "#6cb6f2", "circle", ()),
    "twin": RoleStyle("twin (λ2 = 0)", "#b34700", "#f0995c", "square", (7, 3)),
    "pruned": RoleStyle("pruned", "#1d6f42", "#74c69a", "diamond", (10, 3, 2, 3)),
    "finetuned": RoleStyle("fine-tuned", "#0b6b72", "#6bc7cf", "diamond", (12, 3)),
    "external": RoleStyle("other SAE", "#7a3f98", "#cf9fe8", "triangle", (2, 2)),
    "reference": RoleStyle("reference row", "#5c5f66", "#a4a8b0", "cross", (1, 3)),
}
TERMS = {  # the loss terms, when one panel shows the shares of a single run
    "reconstruction": RoleStyle("reconstruction", "#0a5fa5", "#6cb6f2", "circle", ()),
    "sparsity": RoleStyle("sparsity", "#b34700", "#f0995c", "square", (7, 3)),
    "temporal": RoleStyle("temporal", "#7a3f98", "#cf9fe8", "triangle", (2, 2)),
    "auxiliary": RoleStyle("auxiliary", "#5c5f66", "#a4a8b0", "cross", (8, 3, 2, 3)),
}
_SERIES = (  # colours with contrast >= 4.5 on both backgrounds, told apart by marker and dashes too
    ("#0a5fa5", "#6cb6f2", "circle", ()),
    ("#b34700", "#f0995c", "square", (7, 3)),
    ("#1d6f42", "#74c69a", "diamond", (10, 3, 2, 3)),
    ("#7a3f98", "#cf9fe8", "triangle", (2, 2)),
    ("#5c5f66", "#a4a8b0", "cross", (1, 3)),
    ("#a01f4f", "#ee8fb0", "circle", (4, 2, 1, 2)),
    ("#0b6b72", "#6bc7cf", "square", (12, 3)),
    ("#7a5200", "#d8b06a", "triangle", (5, 5)),
    ("#556b00", "#b5c95a", "diamond", (3, 3)),
    ("#4b3fa0", "#a79df0", "cross", (6, 2, 2, 2)),
)
SERIES = {f"series{n}": RoleStyle(f"series {n}", *look) for n, look in enumerate(_SERIES, 1)}
"""Lines that are no roles, such as a study's variants: named by their labels."""
_RAMP = (  # from dark violet to light green on a light ground, the other way round on a dark one: order without names
    ("#56147a", "#b786db", "circle", (1, 2)),
    ("#393096", "#979df7", "diamond", (3, 2)),
    ("#024e86", "#6bb6ff", "triangle", (5, 2)),
    ("#025d71", "#36ccf1", "circle", (8, 2)),
    ("#086964", "#38ddd2", "diamond", (12, 2)),
    ("#047549", "#79e5ab", "triangle", (18, 2)),
    ("#537800", "#bbe586", "circle", ()),
)
RAMP = {f"step{n}": RoleStyle(f"step {n}", *look) for n, look in enumerate(_RAMP, 1)}
"""Values in order, such as λ2: the higher the value, the longer the dashes."""
STYLES = ROLES | TERMS | SERIES | RAMP
APART = 0.032
"""Of an axis' length, between marks that would hide one another."""
_MARGIN = 0.015  # of the other axis, half a marker
_ALIKE = 1e-5  # of the larger of two values: what is no difference on an axis


@dataclass(frozen=True)
class Axis:
    """One axis: label with unit, scale, ends (None: from the data), or named categories at 0, 1, 2 …"""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    categories: tuple[str, ...] = ()
    at: tuple[float, ...] = ()
    """Where its ticks are; empty: at round numbers."""

    def range(self, values: list[float]) -> tuple[float, float]:
        """The ends shown for these values: the fixed ones, else the data's with a margin of 6 %."""
        if self.categories:
            return -0.6, len(self.categories) - 0.4
        usable = [v for v in values if math.isfinite(v) and (v > 0 or not self.log)]
        if not usable:
            return (0.1, 1.0) if self.log else (0.0, 1.0)
        low, high = min(usable), max(usable)
        if not self.log:  # a fixed end counts when the margin at the other is measured
            low = low if self.low is None else min(low, self.low)
            high = high if self.high is None else max(high, self.high)
        if self.log:
            pad = max(0.06 * (math.log(high) - math.log(low)), 0.3)  # wide enough for a tick
            low, high = low * math.exp(-pad), high * math.exp(pad)
        else:
            size = max(abs(low), abs(high))
            alike = high - low <= _ALIKE * size  # the same but for rounding, such as the L0 of TopK
            pad = (0.05 * size or 1.0) if alike else 0.06 * (high - low)
            low, high = low - pad, high + pad
        low = low if self.low is None else self.low
        high = high if self.high is None else self.high
        return low, high if high > low else low + 1.0

    def fraction(self, value: float, ends: tuple[float, float]) -> float:
        """Where a value lies between the ends, 0 … 1; the nearer end for what is outside (or zero on a log axis)."""
        low, high = ends
        if self.log:
            if value <= 0:
                return 0.0
            low, high, value = math.log(low), math.log(high), math.log(value)
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def value(self, fraction: float, ends: tuple[float, float]) -> float:
        """The inverse of :meth:`fraction`."""
        low, high = ends
        return low * (high / low) ** fraction if self.log else low + fraction * (high - low)

    def ticks(self, ends: tuple[float, float], about: int = 5) -> list[tuple[float, str]]:
        """(value, label) of the ticks inside the ends."""
        if self.categories:
            return [(float(i), name) for i, name in enumerate(self.categories)]
        if self.at:
            return [(value, power_label(value) if self.log else f"{value:g}") for value in self.at]
        return _log_ticks(*ends) if self.log else _linear_ticks(*ends, about)


@dataclass(frozen=True)
class Mark:
    """One point, with its interval where it has one, a short label beside it and a sentence when pointed at."""

    x: float
    y: float
    role: str
    label: str = ""
    title: str = ""
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    small: bool = False
    """A dot in its role's colour, such as one seed of several."""


@dataclass(frozen=True)
class Line:
    """A line through points; ``step`` draws a histogram's outline; a band where there is an interval."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    role: str
    label: str
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    step: bool = False


@dataclass(frozen=True)
class Rule:
    """A level to read the data against: horizontal at ``y`` or vertical at ``x``."""

    label: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Panel:
    """One chart. ``key`` names its files, ``caption`` says how to read it."""

    key: str
    title: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...] = ()
    lines: tuple[Line, ...] = ()
    rules: tuple[Rule, ...] = ()
    caption: str = ""
    links: tuple[
        tuple[int, int], ...
    ] = ()  # pairs of marks joined by a thin line: TC-SAE and twin, pruned and original
    layer: int | None = None
    site: str = RESIDUAL
    names: Mapping[str, str] = field(default_factory=dict)
    """What roles are called in its legend, where it is not what they are called in a report."""
    part: str = ""
    """Of a sweep shown in several charts with common axes: what this one shows. They follow one another."""
    own_legend: bool = False
    """Whether its styles mean something else than in the charts beside it, so that it needs a legend of its own."""

    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The ends of both axes."""
        xs = [v for line in self.lines for v in line.x] + [r.x for r in self.rules if r.x is not None]
        ys = [v for line in self.lines for v in (*line.y, *line.low, *line.high)] + [
            r.y for r in self.rules if r.y is not None
        ]
        for mark in self.marks:
            xs += [mark.x, *(mark.x_interval or ())]
            ys += [mark.y, *(mark.y_interval or ())]
        return self.x.range(xs), self.y.range(ys)

    def drawn(self) -> tuple[Mark, ...]:
        """The marks where they are drawn: where they are, but for those with intervals that would hide one another.

        Those are spread along x in the same order, with their intervals, and none further than ``APART``: where many
        coincide they overlap rather than be drawn where they are not. Zero, which no log axis has, is at its low end.
        """
        x_ends, y_ends = self.ends()
        marks = self.marks
        if self.x.log:

            def shown(x: float) -> float:
                return x if x > 0 else x_ends[0]

            spans = [mark.x_interval and (shown(mark.x_interval[0]), shown(mark.x_interval[1])) for mark in marks]
            marks = tuple(
                replace(mark, x=shown(mark.x), x_interval=span) for mark, span in zip(marks, spans, strict=True)
            )
        if self.y.categories:
            return marks
        where = {i: self.x.fraction(mark.x, x_ends) for i, mark in enumerate(marks) if mark.y_interval}
        reach = {
            i: tuple(self.y.fraction(y, y_ends) for y in (marks[i].y, *(marks[i].y_interval or ()))) for i in where
        }
        place = _spread(where, {i: (min(ys) - _MARGIN, max(ys) + _MARGIN) for i, ys in reach.items()})

        def moved(i: int, mark: Mark) -> Mark:
            shift = place.get(i, 0.0) - where.get(i, 0.0)
            if not shift:
                return mark

            def along(x: float) -> float:
                return self.x.value(min(1.0, max(0.0, self.x.fraction(x, x_ends) + shift)), x_ends)

            interval = mark.x_interval and (along(mark.x_interval[0]), along(mark.x_interval[1]))
            return replace(mark, x=along(mark.x), x_interval=interval)

        return tuple(moved(i, mark) for i, mark in enumerate(marks))

    def legend(self) -> list[tuple[str, str]]:
        """(role, name) of the roles that occur; a series goes by its line's label."""
        named = {line.role: line.label for line in self.lines if line.role in SERIES | RAMP} | dict(self.names)
        return [(role, named.get(role, STYLES[role].name)) for role in self.roles()]

    def roles(self) -> list[str]:
        """The roles that occur, in the order of the styles."""
        seen = {item.role for item in (*self.marks, *self.lines)}
        return [role for role in STYLES if role in seen]


def _spread(where: Mapping[int, float], reach: Mapping[int, tuple[float, float]]) -> dict[int, float]:
    """Places along an axis 0 … 1 at which no mark hides another, as far as ``APART`` from its own allows.

    ``reach``: what each covers of the other axis.
    """

    def hide(i: int, j: int) -> bool:
        beside = reach[i][0] < reach[j][1] and reach[j][0] < reach[i][1]
        return beside and abs(place[i] - place[j]) < 0.8 * APART

    runs = [[i] for i in sorted(where, key=lambda i: (where[i], i))]
    place = dict(where)
    while True:
        joined: list[list[int]] = []
        for run in runs:
            near = [one for one in joined if any(hide(i, j) for i in one for j in run)]
            joined = [one for one in joined if one not in near] + [[*(i for one in near for i in one), *run]]
        if len(joined) == len(runs):
            return place
        runs = joined  # a run that was spread may have come near another
        for run in runs:
            run.sort(key=lambda i: (where[i], i))
            room = (len(run) - 1) / 2 * APART
            middle = sum(where[i] for i in run) / len(run)
            middle = min(max(middle, room), 1 - room) if room < 0.5 else middle
            for rank, i in enumerate(run):
                wanted = middle - room + rank * APART
                place[i] = min(max(wanted, where[i] - APART, 0.0), where[i] + APART, 1.0)


def _linear_ticks(low: float, high: float, about: int) -> list[tuple[float, str]]:
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    values = [(first + i) * step for i in range(count)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if abs(step / power - 2.5) < 1e-9 else 0))
    return [(v, number(v, digits)) for v in values]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    steps = (1,) if span > 2.2 else (1, 3) if span > 1.4 else (1, 2, 5) if span > 0.7 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    keep = max(1, math.ceil(span / 6)) if span > 2.2 else 1
    values = [m * 10.0**d for d in decades for m in steps if d % keep == 0]
    return [(v, power_label(v)) for v in values if low <= v <= high]


def power_label(value: float) -> str:
    """A tick of a log axis: 0.001 … 10,000 in full, the rest as a power of ten."""
    if 1e-3 * 0.999 <= value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    head = value / 10.0**exponent
    powered = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return powered if abs(head - 1) < 1e-6 else f"{head:g}·{powered}"


def number(value: float, digits: int) -> str:
    """Fixed digits with a true minus sign and thousands apart; never −0."""
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")
