"""A panel as inline SVG: no script, no font, no colour of its own (classes ``ink-ROLE`` get theirs from the page).

Drawn 320 units wide, the width of a small phone, so that text is never too small to be read; shapes and dashes say
the same as colours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .chart import STYLES, Line, Mark, Panel, number

WIDTH, HEIGHT = 320, 236
ROW, TALL_ROW = 22, 34  # height of one named category, and of one whose name stands above its line
LONG_NAME = 20  # characters of a category's name; with a longer one all names stand above their lines
GLYPH = 6.0  # mean width of a character at the 11.5-unit label size
Box = tuple[float, float, float, float]  # left, top, right, bottom


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
    """The panel as an ``<svg>`` element, with its title and a description for screen readers."""
    frame = _frame(panel)
    height = frame.bottom + 40
    marks = panel.drawn()
    places = [(frame.x(mark.x), frame.y(mark.y)) for mark in marks]
    boxes = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    boxes += [box for mark, place in zip(marks, places, strict=True) for box in _reach(frame, mark, *place)]
    body = [*_grid(frame), *_rules(frame, boxes), *_links(frame, places)]
    for line in panel.lines:
        body += _line(frame, line)
    body += _marks(frame, marks, places, boxes)
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
        parts.append(
            " ".join((mark.title or mark.label) + "." for mark in panel.marks[:24] if mark.title or mark.label)
        )
    if panel.lines:
        parts.append("Lines: " + "; ".join(line.label for line in panel.lines[:24]) + ".")
    return " ".join(part for part in parts if part)


def _frame(panel: Panel) -> _Frame:
    x_ends, y_ends = panel.ends()
    if panel.y.categories:
        above = _names_above(panel)
        left = 12 if above else 17 + max(len(name) for name in panel.y.categories) * GLYPH
        top = 4 + 13 * sum(rule.x is not None for rule in panel.rules)  # a line of words over the rows for each level
        height = (TALL_ROW if above else ROW) * len(panel.y.categories)
        return _Frame(panel, left, top, WIDTH - 8, top + height, x_ends, y_ends)
    left = 10 + max((len(text) for _, text in panel.y.ticks(y_ends)), default=3) * GLYPH
    return _Frame(panel, max(left, 30), 24, WIDTH - 8, HEIGHT - 40, x_ends, y_ends)


def _names_above(panel: Panel) -> bool:
    return max(map(len, panel.y.categories)) > LONG_NAME


def _grid(frame: _Frame) -> Iterator[str]:
    panel = frame.panel
    gap = 10 if panel.y.categories else 6  # a point at the edge must not touch its row's name
    for value, text in panel.y.ticks(frame.y_ends):
        y = frame.y(value)
        yield f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{frame.right}"/>'
        if panel.y.categories and _names_above(panel):
            yield _text("tick", 2, y - 9, "start", text)
        else:
            yield _text("tick", frame.left - gap, y + 4, "end", text)
    yield f'<path class="axis" d="M{frame.left:.1f} {frame.bottom}H{frame.right}"/>'
    last = -99.0
    for value, text in panel.x.ticks(frame.x_ends):
        x = frame.x(value)
        yield f'<path class="axis" d="M{x:.1f} {frame.bottom}v4"/>'
        half = len(text) * GLYPH / 2
        if x - half > last:
            yield f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 17}" text-anchor="middle">{escape(text)}</text>'
            last = x + half + 4
    half = len(panel.x.label) * GLYPH / 2
    middle = max(half, min(WIDTH - half, (frame.left + frame.right) / 2))
    at = f'x="{middle:.1f}" y="{frame.bottom + 34}"'
    yield f'<text class="name" {at} text-anchor="middle">{escape(panel.x.label)}</text>'
    if not panel.y.categories:
        yield f'<text class="name" x="2" y="13">{escape(panel.y.label)}</text>'


def _rules(frame: _Frame, boxes: list[Box]) -> Iterator[str]:
    """The levels, each with its words where they cover no point and no other words; ``boxes`` grows by them."""
    for line, rule in enumerate(rule for rule in frame.panel.rules if rule.x is not None):
        x, wide = frame.x(rule.x or 0.0), len(rule.label) * GLYPH
        text_x = max(0.0, min(WIDTH - wide, x - wide / 2))
        y = 10 + 13 * line if frame.panel.y.categories else frame.top + 10
        yield f'<path class="rule" d="M{x:.1f} {y + 3:.1f}V{frame.bottom}"/>'
        yield f'<text class="note" x="{text_x:.1f}" y="{y:.1f}">{escape(rule.label)}</text>'
    for rule in frame.panel.rules:
        if rule.y is None:
            continue
        y, wide = frame.y(rule.y), len(rule.label) * GLYPH
        yield f'<path class="rule" d="M{frame.left:.1f} {y:.1f}H{frame.right}"/>'
        starts = (frame.right - wide - 2, frame.left + 4, (frame.left + frame.right - wide) / 2)
        places = [(start, start_y) for start_y in (y - 4, y + 11) for start in starts]
        spots = [(x, base, (x, base - 9, x + wide, base + 2)) for x, base in places if frame.top < base < frame.bottom]
        spot = next((s for s in spots if not any(_overlap(s[2], box) for box in boxes)), spots[0] if spots else None)
        if spot:
            boxes.append(spot[2])
            yield f'<text class="note" x="{spot[0]:.1f}" y="{spot[1]:.1f}">{escape(rule.label)}</text>'


def _links(frame: _Frame, places: Sequence[tuple[float, float]]) -> Iterator[str]:
    for a, b in frame.panel.links:
        yield f'<path class="link" d="M{places[a][0]:.1f} {places[a][1]:.1f}L{places[b][0]:.1f} {places[b][1]:.1f}"/>'


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
        out.append(
            f'<path class="band" d="M{frame.x(line.x[0]):.1f} {base}L{path[1:]}L{frame.x(line.x[-1]):.1f} {base}Z"/>'
        )
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


def _marks(frame: _Frame, marks: Sequence[Mark], places: Sequence[tuple[float, float]], boxes: list[Box]) -> list[str]:
    labels = _labels(frame, places, boxes) if not frame.panel.y.categories else {}
    out = []
    for i, (mark, (x, y)) in enumerate(zip(marks, places, strict=True)):
        out.append(f'<g class="ink-{mark.role}"><title>{escape(mark.title or mark.label)}</title>')
        out += [*_whiskers(frame, mark, x, y), _dot(x, y) if mark.small else _marker(mark.role, x, y)]
        if i in labels:
            out.append(_text("label", *labels[i], mark.label))
        elif frame.panel.y.categories and mark.label:
            after = frame.x(mark.x_interval[1]) if mark.x_interval else x
            out.append(_row_label(frame, max(x, after), y, mark))
        out.append("</g>")
    return out


def _whiskers(frame: _Frame, mark: Mark, x: float, y: float) -> Iterator[str]:
    if mark.x_interval:
        low, high = (frame.x(v) for v in mark.x_interval)
        ends = f"M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"
        yield f'<path class="whisker" d="M{low:.1f} {y:.1f}H{high:.1f}{ends}"/>'
    if mark.y_interval:
        low, high = (frame.y(v) for v in mark.y_interval)
        ends = f"M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
        yield f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}{ends}"/>'


def _reach(frame: _Frame, mark: Mark, x: float, y: float) -> Iterator[Box]:
    """Where a mark's whiskers lie, so that no words go there."""
    if mark.x_interval:
        yield (frame.x(mark.x_interval[0]) - 1, y - 3, frame.x(mark.x_interval[1]) + 1, y + 3)
    if mark.y_interval:
        yield (x - 3, frame.y(mark.y_interval[1]), x + 3, frame.y(mark.y_interval[0]))


def _text(kind: str, x: float, y: float, anchor: str, words: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _row_label(frame: _Frame, x: float, y: float, mark: Mark) -> str:
    """The number at the end of a row's interval, or before it; nothing where there is no room for either."""
    if x + 10 + len(mark.label) * GLYPH < WIDTH:
        return _text("label", x + 8, y + 4, "start", mark.label)
    before = min(frame.x(mark.x), frame.x(mark.x_interval[0]) if mark.x_interval else frame.x(mark.x))
    if before - 8 - len(mark.label) * GLYPH < frame.left:
        return ""
    return _text("label", before - 8, y + 4, "end", mark.label)


def _labels(
    frame: _Frame, places: Sequence[tuple[float, float]], boxes: list[Box]
) -> dict[int, tuple[float, float, str]]:
    """Where each point's label goes: the first free place around it; none where labels crowd."""
    found = {}
    for i, (mark, (x, y)) in enumerate(zip(frame.panel.marks, places, strict=True)):
        wide = len(mark.label) * GLYPH
        choices = [(x + 8, y + 4, "start"), (x - 8, y + 4, "end"), (x, y - 9, "middle"), (x, y + 17, "middle")]
        for text_x, text_y, anchor in choices if mark.label else []:
            start = text_x - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            box = (start, text_y - 10, start + wide, text_y + 2)
            inside = box[0] > frame.left and box[2] < WIDTH and box[1] > frame.top - 6 and box[3] < frame.bottom
            if inside and not any(_overlap(box, other) for j, other in enumerate(boxes) if j != i):
                found[i] = (text_x, text_y, anchor)
                boxes.append(box)
                break
    return found


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _dot(x: float, y: float) -> str:
    return f'<circle class="solid dot" cx="{x:.1f}" cy="{y:.1f}" r="2"/>'


def _marker(role: str, x: float, y: float) -> str:
    shape = STYLES[role].marker
    if shape == "circle":
        return f'<circle class="solid" cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>'
    if shape == "square":
        return f'<rect class="hollow" x="{x - 3.7:.1f}" y="{y - 3.7:.1f}" width="7.4" height="7.4"/>'
    if shape == "triangle":
        return f'<path class="solid" d="M{x:.1f} {y - 5:.1f}L{x + 4.8:.1f} {y + 3.7:.1f}H{x - 4.8:.1f}Z"/>'
    if shape == "diamond":
        return f'<path class="hollow" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5Z"/>'
    return f'<path class="stroke" d="M{x - 3.6:.1f} {y - 3.6:.1f}l7.2 7.2m0 -7.2l-7.2 7.2"/>'


def interval_glyph(value: float, low: float | None, high: float | None, reach: float, role: str) -> Markup:
    """A difference and its interval around zero, as a table's cell; ``reach``: from zero to either edge."""

    def at(v: float) -> float:
        return 60 + 54 * max(-1.0, min(1.0, v / reach if reach else 0.0))

    title = escape(f"difference {number(value, 4)}")
    parts = [
        f'<svg class="glyph ink-{role}" viewBox="0 0 120 16" role="img"><title>{title}</title>'
        '<path class="zero" d="M60 0V16"/>'
    ]
    if low is not None and high is not None:
        parts.append(
            f'<path class="whisker" d="M{at(low):.1f} 8H{at(high):.1f}M{at(low):.1f} 4v8M{at(high):.1f} 4v8"/>'
        )
    return Markup("".join([*parts, _marker(role, at(value), 8), "</svg>"]))  # noqa: S704 - numbers and escaped text only
