"""The report's charts for papers, by matplotlib: the page's panels as PNG and SVG, and the README's picture.

Deterministic: no date, no version and no random identifier goes into a file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

from ...errors import TcsaeError, needs
from ...system.atomic_files import plain_errors, write_file, write_json
from ...system.checksums import content_hash, file_hash
from ...system.untrusted_files import read_json
from . import chart
from .chart import STYLES, Axis, Line, Mark, Panel, Rule

SIZE = (4.4, 3.3)  # inches
DPI = 160
TITLE = 46  # characters of a line of it
_LETTER, _BESIDE = 4.2, 9.0  # points: a letter of a label beside a mark, and its distance from it
_AXIS, _AXIS_BESIDE_NAMES = 0.75, 0.55  # of the figure's width, about; the second where named rows stand on the left
DRAWN = "drawn.json"
_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle": "^", "cross": "x"}
_HOLLOW = {"square", "diamond"}
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5c5f66",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e1da",
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "tcsae",
}


def write_figures(panels: Sequence[Panel], folder: Path) -> list[Path]:
    """Write every panel as ``KEY.png`` and ``KEY.svg``; returns the paths. The folder's older figures are removed.

    A panel that is drawn already is not drawn again: ``drawn.json`` says from what each file was drawn, and its hash.
    """
    needs("matplotlib", extra="report", what="a report's figures")
    known = _drawn_before(folder / DRAWN)
    made_with = f"{version('matplotlib')} {_code()}"
    of: dict[str, str] = {}
    new: dict[Path, bytes] = {}
    for panel in panels:
        stem = _file_name(panel.key)
        of[stem] = content_hash([repr(panel), made_with])
        if known.get(stem) != {"of": of[stem], "files": _hashes(_paths(folder, stem))}:
            with _figure(1, _height(panel)) as (figure, axes):
                draw(axes[0], panel)
                new |= zip(_paths(folder, stem), _contents(figure), strict=True)
    with ThreadPoolExecutor() as pool:  # all of them wait for the disk at once
        list(pool.map(write_file, new, new.values()))
    written = [path for stem in of for path in _paths(folder, stem)]
    for old in {*folder.glob("*.png"), *folder.glob("*.svg")} - set(written):
        with plain_errors(f"remove {old}"):
            old.unlink()
    drawn = {stem: {"of": what, "files": _hashes(_paths(folder, stem))} for stem, what in of.items()}
    if drawn != known:
        write_json(folder / DRAWN, drawn)
    return written


def _paths(folder: Path, stem: str) -> list[Path]:
    return [folder / f"{stem}.{ending}" for ending in ("png", "svg")]


def _drawn_before(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except TcsaeError:
        return {}  # none, or damaged: everything is drawn again


def _hashes(paths: Sequence[Path]) -> list[str] | None:
    return [file_hash(path) for path in paths] if all(path.is_file() for path in paths) else None


def _code() -> str:
    """Of what draws: this file and the description of charts."""
    return content_hash([Path(file).read_text(encoding="utf-8") for file in (__file__, chart.__file__)])


def draw(ax: Any, panel: Panel) -> None:
    """Draw a panel into matplotlib axes."""
    x_ends, y_ends = panel.ends()
    for rule, words in zip(panel.rules, _rule_words(panel, x_ends), strict=True):
        _rule(ax, rule, words)
    marks = panel.drawn()
    for a, b in panel.links:
        ends = (marks[a], marks[b])
        ax.plot([mark.x for mark in ends], [mark.y for mark in ends], color="#5c5f66", linewidth=0.7, zorder=1)
    for line in panel.lines:
        _line(ax, line)
    for mark in marks:
        _mark(ax, mark)
    _labels(ax, panel, marks)
    _axis(ax.xaxis, ax.set_xscale, ax.set_xlim, panel.x, x_ends)
    _axis(ax.yaxis, ax.set_yscale, ax.set_ylim, panel.y, (y_ends[1], y_ends[0]) if panel.y.categories else y_ends)
    ax.set(xlabel=panel.x.label, ylabel=panel.y.label)
    if panel.y.categories:  # whose names take much of the width: the title begins above them
        ax.figure.suptitle(fill(panel.title, TITLE), x=0.01, ha="left", fontsize="medium", fontweight="bold")
    else:
        ax.set_title(fill(f"{panel.title}: {panel.part}" if panel.part else panel.title, TITLE))
    _legend(ax, panel)


def _rule_words(panel: Panel, ends: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """Where each rule's words stand: at a level, along a vertical rule or, over named rows, above it.

    Above means: on the outer side of the rule, unless they run out of the axes by more than an eighth (the layout makes
    room for less), and higher where the words of another rule are.
    """
    axis, taken = 72 * SIZE[0] * _AXIS_BESIDE_NAMES, list[tuple[float, float, int]]()
    for rule in panel.rules:
        if rule.x is None:
            yield {"xytext": (-2, 2), "ha": "right"}
            continue
        if not panel.y.categories:
            yield {"xytext": (-2, 3), "ha": "right", "va": "bottom", "rotation": 90}
            continue
        here, wide = axis * panel.x.fraction(rule.x, ends), _LETTER * len(rule.label)
        left = rule.x < 0 or here + wide > 1.125 * axis
        low, high = (here - wide, here) if left else (here, here + wide)
        others = {line for a, b, line in taken if low < b and a < high}
        line = next(line for line in range(len(panel.rules)) if line not in others)
        taken.append((low, high, line))
        yield {"xytext": (0, 2 + 10 * line), "ha": "right" if left else "left", "va": "bottom"}


def _rule(ax: Any, rule: Rule, words: dict[str, Any]) -> None:
    if rule.y is not None:
        ax.axhline(rule.y, color="#5c5f66", linewidth=0.8, linestyle=":")
        ax.annotate(rule.label, (1, rule.y), xycoords=("axes fraction", "data"), **words, **_NOTE)
    if rule.x is not None:
        ax.axvline(rule.x, color="#5c5f66", linewidth=0.8, linestyle=":")
        end = 0 if "rotation" in words else 1
        ax.annotate(rule.label, (rule.x, end), xycoords=("data", "axes fraction"), **words, **_NOTE)


_NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5, "color": "#5c5f66", "style": "italic"}


def _line(ax: Any, line: Line) -> None:
    style = STYLES[line.role]
    dashes: dict[str, Any] = {"linestyle": (0, style.dash)} if style.dash else {}
    if line.step:
        ax.stairs(line.y, line.x, color=style.light, linewidth=1.4, **dashes)
        ax.stairs(line.y, line.x, color=style.light, fill=True, alpha=0.1)
        return
    if line.low and line.high:
        ax.fill_between(line.x, line.low, line.high, color=style.light, alpha=0.13, linewidth=0)
    marker = _MARKERS[style.marker] if len(line.x) <= 16 else None
    ax.plot(line.x, line.y, color=style.light, linewidth=1.5, marker=marker, markersize=4.5, **dashes)


def _mark(ax: Any, mark: Mark) -> None:
    style = STYLES[mark.role]
    if mark.x_interval:
        ax.plot(mark.x_interval, [mark.y] * 2, color=style.light, linewidth=1.1, marker="|", markersize=5)
    if mark.y_interval:
        ax.plot([mark.x] * 2, mark.y_interval, color=style.light, linewidth=1.1, marker="_", markersize=5)
    look: dict[str, Any] = {
        "markerfacecolor": "white" if style.marker in _HOLLOW else style.light,
        "markeredgewidth": 1.4,
    }
    if mark.small:
        ax.plot(mark.x, mark.y, "o", color=style.light, markersize=2.2, clip_on=False, zorder=3)
        return
    ax.plot(mark.x, mark.y, _MARKERS[style.marker], color=style.light, markersize=5.5, clip_on=False, zorder=3, **look)


def _labels(ax: Any, panel: Panel, marks: Sequence[Mark]) -> None:
    """Words beside the points, on the side that has room; where points crowd, the legend must do."""
    x_ends, y_ends = panel.ends()
    spots = [(panel.x.fraction(mark.x, x_ends), panel.y.fraction(mark.y, y_ends)) for mark in marks]
    axis = 72 * SIZE[0] * (_AXIS_BESIDE_NAMES if panel.y.categories else _AXIS)
    for i, mark in enumerate(marks):
        near = (abs(spots[i][0] - a) < 0.3 and abs(spots[i][1] - b) < 0.05 for j, (a, b) in enumerate(spots) if j != i)
        if not mark.label or (any(near) and not panel.y.categories):
            continue
        label, here, need = mark.label, spots[i][0], (_LETTER * len(mark.label) + _BESIDE) / axis
        low, high = (panel.x.fraction(x, x_ends) for x in mark.x_interval or (mark.x, mark.x))
        if max(low, 1 - high) < need:  # no room beside the interval: over it, beside the mark
            low = high = here
            if max(here, 1 - here) < need:  # not there either: two lines
                label = fill(label, len(label) // 2 + 3)
        left = 1 - high < need and low > 1 - high
        edge = panel.x.value(low if left else high, x_ends)
        where: dict[str, Any] = {"xytext": (-7 if left else 7, -2.5), "ha": "right" if left else "left"}
        if label != mark.label:
            where |= {"xytext": (where["xytext"][0], 0), "va": "center"}
        ink = STYLES[mark.role].light
        words = ax.annotate(label, (edge, mark.y), textcoords="offset points", fontsize=7.5, color=ink, **where)
        words.set_path_effects(_halo())


def _halo() -> list[Any]:
    """A white edge, so that words stay readable over lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.2, foreground="white")]


def _axis(axis: Any, set_scale: Any, set_limits: Any, spec: Axis, ends: tuple[float, float]) -> None:
    if spec.log:
        set_scale("log")
    set_limits(*ends)
    ticks = spec.ticks((min(ends), max(ends)))
    axis.set_ticks([value for value, _ in ticks], [fill(label, 30) for _, label in ticks])
    axis.set_minor_locator(_no_locator())


def _no_locator() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _legend(ax: Any, panel: Panel) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for role, name in panel.legend():
        style = STYLES[role]
        dashes: dict[str, Any] = {"linestyle": ((0, style.dash) if style.dash else "-") if panel.lines else "none"}
        marker = None if panel.lines and len(panel.lines[0].x) > 16 else _MARKERS[style.marker]
        face = "white" if style.marker in _HOLLOW else style.light
        handles.append(Line2D([], [], color=style.light, marker=marker, markerfacecolor=face, label=name, **dashes))
    if len(handles) > 1 and not panel.y.categories:  # named rows need no legend
        ax.legend(handles=handles, fontsize=7.5, frameon=False, loc="best")


def _height(panel: Panel) -> float:
    return max(1.7, 1.1 + 0.26 * len(panel.y.categories)) if panel.y.categories else SIZE[1]


@contextmanager
def _figure(columns: int, height: float) -> Iterator[tuple[Any, list[Any]]]:
    """A figure without a window, in the report's style, closed afterwards."""
    needs("matplotlib", extra="report", what="a report's figures")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="constrained_layout not applied"
        )  # cramped words are no reason to fail
        figure = Figure(figsize=(SIZE[0] * columns, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _contents(figure: Any) -> tuple[bytes, bytes]:
    """A figure as png and svg."""
    png, svg = BytesIO(), BytesIO()
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return png.getvalue(), svg.getvalue()


def _file_name(key: str) -> str:
    """A key as a safe file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip(".-") or "figure"
