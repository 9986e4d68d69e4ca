"""What the user sees: progress, the closing summary, and numbers written for people.

Everything goes to standard error except the summary, so that ``--json`` leaves standard output to machines. A library
says nothing unless it is asked to (:func:`speaking`); the command line speaks unless it is told not to (``--quiet``),
with bars on a terminal.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from .errors import UsageError

if TYPE_CHECKING:
    from .progress_bar import Table

_quiet = True
_seldom = False  # how often a line stands in for a bar where there is no terminal
_OFTEN, _SELDOM = 10.0, 30.0  # seconds between lines, in a notebook and in a pipe or log file
_COUNT = re.compile(r"^([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kKmMbBgGtT]?)$")
_POWERS = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}


def set_quiet(quiet: bool) -> None:
    """Silence progress and notes for as long as :func:`speaking` lasts, or for the rest of the process."""
    global _quiet
    _quiet = quiet


@contextmanager
def speaking(progress: bool, *, seldom: bool = False) -> Iterator[None]:
    """Inside, notes and progress are shown, or are not, whatever was said before.

    Args:
        progress: whether they are.
        seldom: where there is no terminal, a line every half minute and none for what is done sooner; otherwise one
            every ten seconds and one at the end.

    """
    global _quiet, _seldom
    before = _quiet, _seldom
    _quiet, _seldom = not progress, seldom
    try:
        yield
    finally:
        _quiet, _seldom = before


def parse_count(text: str | int) -> int:
    """``200k``, ``10M``, ``1.5B`` or ``4_096`` as an integer.

    Raises:
        UsageError: the text is not such a count.

    """
    match = _COUNT.match(str(text).strip())
    if not match:
        raise UsageError(f"'{text}' is not a count: write a number such as 200000, 200k, 10M or 1B")
    count = round(float(match[1].replace("_", "")) * 10 ** _POWERS[match[2].lower()])
    if count >= 1 << 63:
        raise UsageError(f"'{str(text)[:30]}' is more than 64 bits can count: write a smaller number")
    return count


def format_count(n: float) -> str:
    """1234567 as ``1.23M``."""
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= power:
            return f"{n / power:.3g}{letter}"
    return f"{n:.0f}"


def format_bytes(n: float) -> str:
    """Bytes in decimal units: 138000000000 as ``138 GB``."""
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(n) >= power:
            return f"{n / power:.3g} {unit}"
    return f"{n:.0f} B"


def format_duration(seconds: float) -> str:
    """3725 as ``1 h 02 min``, 65 as ``1 min 05 s``, 3.21 as ``3.2 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def note(message: str) -> None:
    """One line for the user on standard error, unless quiet."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """One line the user should not miss; printed even when quiet."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Progress(Protocol):
    """What :func:`progress` yields."""

    def advance(self, n: float, status: str = "") -> None:
        """Count ``n`` more units done; ``status`` replaces the short text at the end of the line."""
        ...

    def show(self, table: Table) -> None:
        """Put a table beneath the bar, in place of the one before."""
        ...


class _Silent:
    def advance(self, n: float, status: str = "") -> None:
        """Nothing to show."""

    def show(self, table: Table) -> None:
        """Nowhere to show it."""


class _Lines:
    """A line now and then, for places where a bar cannot be drawn over itself."""

    def __init__(self, description: str, total: float | None, unit: str, done: float):
        self._description, self._total, self._unit = description, total, unit
        self._done = self._begun_at = done
        self._began = self._said = time.monotonic()

    def advance(self, n: float, status: str = "") -> None:
        """Count, and say how far it is if the last line is some seconds old or all is done."""
        self._done += n
        now = time.monotonic()
        ended = self._done == self._total and (not _seldom or self._said > self._began)
        if ended or now - self._said >= (_SELDOM if _seldom else _OFTEN):
            self._said = now
            far = f"{self._done / self._total:.0%}" if self._total else format_count(self._done)
            rate = (self._done - self._begun_at) / max(now - self._began, 1e-9)
            note(
                ", ".join(filter(None, (f"{self._description} {far}", f"{format_count(rate)} {self._unit}/s", status)))
            )

    def show(self, table: Table) -> None:
        """Numbers by line would drown the rest: they are in ``metrics.jsonl``."""


@contextmanager
def progress(description: str, total: float | None, *, unit: str = "tokens", done: float = 0) -> Iterator[Progress]:
    """A bar with rate and time left, counting ``unit`` from ``done`` to ``total``.

    Nothing when quiet; without a terminal a line now and then, see :func:`speaking`.
    """
    if _quiet or not sys.stderr.isatty():
        yield _Silent() if _quiet else _Lines(description, total, unit, done)
        return
    from .progress_bar import Bar

    def rate(speed: float | None) -> str:
        return f"{format_count(speed) if speed else '—'} {unit}/s"

    with Bar(description, total, done, rate) as bar:
        yield bar


def summary(title: str, facts: Mapping[str, Any], *, as_json: bool, names: Collection[str] = ()) -> None:
    """The one closing summary of a command: JSON on one line for machines, aligned lines for people.

    Args:
        title: the first line for people.
        facts: what to say; underscores in a key are shown as spaces.
        as_json: whether machines read it.
        names: keys that are names, shown as they are.

    """
    if as_json:
        print(json.dumps(facts, default=str, allow_nan=False))
        return
    width = max((len(name) for name in facts), default=0)
    print(title)
    for name, value in facts.items():
        shown = name if name in names else name.replace("_", " ")
        print(f"  {shown:<{width}}  {value}")
