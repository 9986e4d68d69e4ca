"""A panel as inline SVG: no script, no font, no colour of its own (classes ``ink-ROLE`` take theirs from the page's style).

Drawn 400 units wide, so that on a phone it shrinks by a fifth at most and its text stays readable; shapes and dashes carry
what colour carries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup, escape

from .chart import STYLES, Line, Mark, Panel, Rule, number

WIDTH, HEIGHT = 400, 270
ROW = 24  # height of one named category
GLYPH = 6.3  # mean width of a character at the 12-unit label size


@dataclass(frozen=True)
class _Frame:
    """Where the panel's data area lies, and how values become coordinates."""

    panel: Panel
    left: float
    top: float
    right: float
    bottom: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]

    def x(self, value: float) -> float:
        return self.left + self.panel.x.fraction(value, self.x_ends) * (self.right - self.left)

    def y(self, value: float) -> float:
        share = self.panel.y.fraction(value, self.y_ends)
        return self.top + (share if self.panel.y.categories else 1 - share) * (self.bottom - self.top)


def render(panel: Panel) -> Markup:
    """The panel as an ``<svg>`` element, with its title and a description for those who hear the page."""
    frame = _frame(panel)
    height = frame.bottom + 40
    body = [*_grid(frame), *_rules(frame), *_links(frame)]
    for line in panel.lines:
        body += _line(frame, line)
    body += _marks(frame)
    name, title = escape(f"chart-{panel.key}"), escape(panel.title)
    head = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{title}</title><desc id="{name}-d">{escape(describe(panel))}</desc>'
    )
    return Markup(head + "".join(body) + "</svg>")  # noqa: S704 - every piece of text above and below went through escape()


def swatch(role: str) -> Markup:
    """A legend's sample of a role: its line and its marker."""
    dash = " ".join(str(d) for d in STYLES[role].dash)
    return Markup(  # noqa: S704 - made of constants
        f'<svg class="swatch ink-{role}" viewBox="0 0 28 12" aria-hidden="true">'
        f'<path class="stroke" d="M1 6H27" stroke-dasharray="{dash}"/>{_marker(role, 14, 6)}</svg>'
    )


def describe(panel: Panel) -> str:
    """The panel in a few sentences of plain text."""
    parts = [f"{panel.y.label or 'Rows'} against {panel.x.label}."]
    if panel.marks:
        parts.append(" ".join((mark.title or mark.label) + "." for mark in panel.marks[:24] if mark.title or mark.label))
    if panel.lines:
        parts.append("Lines: " + "; ".join(line.label for line in panel.lines[:24]) + ".")
    return " ".join(part for part in parts if part)


def _frame(panel: Panel) -> _Frame:
    x_ends, y_ends = panel.ends()
    if panel.y.categories:
        left = 12 + max(len(name) for name in panel.y.categories) * GLYPH
        return _Frame(panel, min(left, 190), 8, WIDTH - 14, 8 + ROW * len(panel.y.categories), x_ends, y_ends)
    left = 14 + max((len(text) for _, text in panel.y.ticks(y_ends)), default=3) * GLYPH
    return _Frame(panel, max(left, 34), 24, WIDTH - 14, HEIGHT - 40, x_ends, y_ends)


def _grid(frame: _Frame) -> Iterator[str]:
    panel = frame.panel
    for value, text in panel.y.ticks(frame.y_ends):
        y = frame.y(value)
        yield f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{frame.right}"/>'
        yield f'<text class="tick" x="{frame.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(_short(text))}</text>'
    yield f'<path class="axis" d="M{frame.left:.1f} {frame.bottom}H{frame.right}"/>'
    last = -99.0
    for value, text in panel.x.ticks(frame.x_ends):
        x = frame.x(value)
        yield f'<path class="axis" d="M{x:.1f} {frame.bottom}v4"/>'
        half = len(text) * GLYPH / 2
        if x - half > last:
            yield f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 17}" text-anchor="middle">{escape(text)}</text>'
            last = x + half + 4
    middle = (frame.left + frame.right) / 2
    yield f'<text class="name" x="{middle:.1f}" y="{frame.bottom + 34}" text-anchor="middle">{escape(panel.x.label)}</text>'
    if not panel.y.categories:
        yield f'<text class="name" x="2" y="13">{escape(panel.y.label)}</text>'


def _short(text: str, length: int = 28) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _rules(frame: _Frame) -> Iterator[str]:
    taken: list[float] = []
    for rule in frame.panel.rules:
        yield from _rule(frame, rule, taken)


def _rule(frame: _Frame, rule: Rule, taken: list[float]) -> Iterator[str]:
    if rule.y is not None:
        y = frame.y(rule.y)
        yield f'<path class="rule" d="M{frame.left:.1f} {y:.1f}H{frame.right}"/>'
        text_y = y - 4 if y - 4 > frame.top + 8 else y + 13
        while any(abs(text_y - other) < 12 for other in taken):
            text_y += 12
        taken.append(text_y)
        yield f'<text class="note" x="{frame.right - 2}" y="{text_y:.1f}" text-anchor="end">{escape(rule.label)}</text>'
    if rule.x is not None:
        x = frame.x(rule.x)
        yield f'<path class="rule" d="M{x:.1f} {frame.top}V{frame.bottom}"/>'
        side, shift = ("end", -4) if x > (frame.left + frame.right) / 2 else ("start", 4)
        yield f'<text class="note" x="{x + shift:.1f}" y="{frame.top + 10}" text-anchor="{side}">{escape(rule.label)}</text>'


def _links(frame: _Frame) -> Iterator[str]:
    for a, b in frame.panel.links:
        one, two = frame.panel.marks[a], frame.panel.marks[b]
        start, stop = f"{frame.x(one.x):.1f} {frame.y(one.y):.1f}", f"{frame.x(two.x):.1f} {frame.y(two.y):.1f}"
        yield f'<path class="link" d="M{start}L{stop}"/>'


def _line(frame: _Frame, line: Line) -> list[str]:
    dash = " ".join(str(d) for d in STYLES[line.role].dash)
    out = [f'<g class="ink-{line.role}"><title>{escape(line.label)}</title>']
    if line.low and line.high:
        up = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(line.x, line.high, strict=True)]
        down = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(line.x, line.low, strict=True)]
        out.append(f'<path class="band" d="M{"L".join(up + down[::-1])}Z"/>')
    if line.step:
        path = _steps(frame, line)
        base = f"{frame.bottom}"
        out.append(f'<path class="band" d="M{frame.x(line.x[0]):.1f} {base}L{path[1:]}L{frame.x(line.x[-1]):.1f} {base}Z"/>')
    else:
        path = "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
    out.append(f'<path class="stroke" d="{path}" stroke-dasharray="{dash}"/>')
    if not line.step and len(line.x) <= 16:
        out += [_marker(line.role, frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    return [*out, "</g>"]


def _steps(frame: _Frame, line: Line) -> str:
    points = []
    for i, y in enumerate(line.y):
        points += [f"{frame.x(line.x[i]):.1f} {frame.y(y):.1f}", f"{frame.x(line.x[i + 1]):.1f} {frame.y(y):.1f}"]
    return "M" + "L".join(points)


def _marks(frame: _Frame) -> list[str]:
    places = _label_places(frame) if not frame.panel.y.categories else {}
    out = []
    for i, mark in enumerate(frame.panel.marks):
        x, y = frame.x(mark.x), frame.y(mark.y)
        out.append(f'<g class="ink-{mark.role}"><title>{escape(mark.title or mark.label)}</title>')
        if mark.x_interval:
            low, high = (frame.x(v) for v in mark.x_interval)
            out.append(
                f'<path class="whisker" d="M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"/>'
            )
        if mark.y_interval:
            low, high = (frame.y(v) for v in mark.y_interval)
            out.append(
                f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"/>'
            )
        out.append(_marker(mark.role, x, y))
        if i in places:
            text_x, text_y, anchor = places[i]
            out.append(
                f'<text class="label" x="{text_x:.1f}" y="{text_y:.1f}" text-anchor="{anchor}">{escape(mark.label)}</text>'
            )
        elif frame.panel.y.categories and mark.label:
            after = frame.x(mark.x_interval[1]) if mark.x_interval else x
            out.append(_row_label(frame, max(x, after), y, mark))
        out.append("</g>")
    return out


def _row_label(frame: _Frame, x: float, y: float, mark: Mark) -> str:
    """The number at the end of a row's interval, or before it where there is no room."""
    if x + 12 + len(mark.label) * GLYPH < WIDTH:
        return f'<text class="label" x="{x + 8:.1f}" y="{y + 4:.1f}">{escape(mark.label)}</text>'
    before = min(frame.x(mark.x), frame.x(mark.x_interval[0]) if mark.x_interval else frame.x(mark.x))
    return f'<text class="label" x="{before - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(mark.label)}</text>'


def _label_places(frame: _Frame) -> dict[int, tuple[float, float, str]]:
    """Where each point's label goes: right, left, above or below, the first place that is free; crowded labels are left out."""
    boxes = [(frame.x(m.x) - 5, frame.y(m.y) - 5, frame.x(m.x) + 5, frame.y(m.y) + 5) for m in frame.panel.marks]
    places = {}
    for i, mark in enumerate(frame.panel.marks):
        x, y, wide = frame.x(mark.x), frame.y(mark.y), len(mark.label) * 6.0
        choices = [(x + 8, y + 4, "start"), (x - 8, y + 4, "end"), (x, y - 9, "middle"), (x, y + 17, "middle")]
        for text_x, text_y, anchor in choices if mark.label else []:
            start = text_x - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            box = (start, text_y - 10, start + wide, text_y + 2)
            inside = box[0] > frame.left and box[2] < WIDTH and box[1] > frame.top - 6 and box[3] < frame.bottom
            if inside and not any(_overlap(box, other) for j, other in enumerate(boxes) if j != i):
                places[i] = (text_x, text_y, anchor)
                boxes.append(box)
                break
    return places


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _marker(role: str, x: float, y: float) -> str:
    shape = STYLES[role].marker
    if shape == "circle":
        return f'<circle class="solid" cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>'
    if shape == "square":
        return f'<rect class="hollow" x="{x - 3.7:.1f}" y="{y - 3.7:.1f}" width="7.4" height="7.4"/>'
    if shape == "triangle":
        return f'<path class="solid" d="M{x:.1f} {y - 5:.1f}L{x + 4.8:.1f} {y + 3.7:.1f}H{x - 4.8:.1f}Z"/>'
    return f'<path class="stroke" d="M{x - 3.6:.1f} {y - 3.6:.1f}l7.2 7.2m0 -7.2l-7.2 7.2"/>'


def interval_glyph(value: float, low: float | None, high: float | None, reach: float, role: str) -> Markup:
    """A difference and its interval around zero, ``reach`` the distance from zero to either edge: one cell of a table."""

    def at(v: float) -> float:
        return 60 + 54 * max(-1.0, min(1.0, v / reach if reach else 0.0))

    title = escape(f"difference {number(value, 4)}")
    parts = [
        f'<svg class="glyph ink-{role}" viewBox="0 0 120 16" role="img"><title>{title}</title><path class="zero" d="M60 0V16"/>'
    ]
    if low is not None and high is not None:
        parts.append(f'<path class="whisker" d="M{at(low):.1f} 8H{at(high):.1f}M{at(low):.1f} 4v8M{at(high):.1f} 4v8"/>')
    return Markup("".join([*parts, _marker(role, at(value), 8), "</svg>"]))  # noqa: S704 - numbers and escaped text only
