"""What the user sees: progress, the closing summary, and numbers written for people.

Everything goes to standard error except the summary, so that ``--json`` leaves standard output to machines. Progress is
silent when standard error is not a terminal or after :func:`set_quiet`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from .errors import UsageError

if TYPE_CHECKING:
    from .progress_bar import Table

_quiet = False
_COUNT = re.compile(r"^([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kKmMbBgGtT]?)$")
_POWERS = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}


def set_quiet(quiet: bool) -> None:
    """Silence progress and notes for the rest of the process."""
    global _quiet
    _quiet = quiet


def parse_count(text: str | int) -> int:
    """``200k``, ``10M``, ``1.5B`` or ``4_096`` as an integer.

    Raises:
        UsageError: the text is not such a count.

    """
    match = _COUNT.match(str(text).strip())
    if not match:
        raise UsageError(f"'{text}' is not a count: write a number such as 200000, 200k, 10M or 1B")
    return round(float(match[1].replace("_", "")) * 10 ** _POWERS[match[2].lower()])


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


@contextmanager
def progress(description: str, total: float | None, *, unit: str = "tokens", done: float = 0) -> Iterator[Progress]:
    """A bar with rate and time left, counting ``unit`` from ``done`` to ``total``; silent unless on a terminal."""
    if _quiet or not sys.stderr.isatty():
        yield _Silent()
        return
    from .progress_bar import Bar

    def rate(speed: float | None) -> str:
        return f"{format_count(speed) if speed else '—'} {unit}/s"

    with Bar(description, total, done, rate) as bar:
        yield bar


def summary(title: str, facts: Mapping[str, Any], *, as_json: bool) -> None:
    """The one closing summary of a command: JSON on one line for machines, aligned lines for people."""
    if as_json:
        print(json.dumps(facts, default=str, allow_nan=False))
        return
    width = max((len(name) for name in facts), default=0)
    print(title)
    for name, value in facts.items():
        print(f"  {name.replace('_', ' '):<{width}}  {value}")
