"""A progress bar on a terminal and, beneath it, a table that is replaced while it runs.

Drawn by rich, which is why only :mod:`.console` and whoever fills a table import this file, and not before they need
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table as RichTable
from rich.text import Text

_GAP = 2  # blanks between columns
_LEAST_NAME = 8


@dataclass(frozen=True)
class Table:
    """Rows of a name and its numbers as text; ``heads``, of two lines at most, are the numbers' own, ``foot`` is for
    all.
    """

    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    foot: str = ""


class Bar:
    """One bar from ``done`` to ``total`` on standard error, shown while it is entered.

    Args:
        description: before the bar.
        total: units in all; None: unknown.
        done: units done before.
        rate: units per second (None: not known yet) in words.
        console: for tests; by default the terminal behind standard error.

    """

    def __init__(
        self,
        description: str,
        total: float | None,
        done: float,
        rate: Callable[[float | None], str],
        console: Console | None = None,
    ):
        left = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        right = (_Rate(rate), TimeRemainingColumn(compact=True), TextColumn("{task.fields[status]}", style="dim"))
        self._shown = _WithTable(*left, *right, console=console or Console(stderr=True), transient=False)
        self._task = self._shown.add_task(description, total=total, completed=int(done), status="")

    def __enter__(self) -> Bar:
        self._shown.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.stop()

    def advance(self, n: float, status: str = "") -> None:
        """Count ``n`` more units; ``status`` stands at the end of the line."""
        self._shown.update(self._task, advance=n, status=status)

    def show(self, table: Table) -> None:
        """Put this table beneath the bar, in place of the one before."""
        self._shown.table = table


class _Rate(ProgressColumn):
    def __init__(self, words: Callable[[float | None], str]):
        super().__init__()
        self._words = words

    def render(self, task: Task) -> Text:
        return Text(self._words(task.finished_speed or task.speed), style="dim")


class _WithTable(RichProgress):
    table: Table | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.table is not None:
            yield fitted(self.table, *self.console.size)


def fitted(table: Table, width: int, height: int) -> RenderableType:
    """The table for a terminal of this size: the first rows that fit and how many more there are, long names by their
    ends.
    """
    lines = height - 5  # the bar, two lines of heads, the foot, and one for the cursor
    fit = len(table.rows) if len(table.rows) <= lines else max(1, lines - 1)
    columns = zip(*(numbers for _, numbers in table.rows), strict=True)
    widths = [max(map(len, [*head.split("\n"), *column])) for head, column in zip(table.heads, columns, strict=True)]
    room = max(_LEAST_NAME, width - sum(widths) - _GAP * len(widths))
    shown: Any = RichTable(
        box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim", caption_justify="left"
    )
    shown.add_column("", no_wrap=True)
    for head in table.heads:
        shown.add_column(head, justify="right", no_wrap=True)
    for name, numbers in table.rows[:fit]:
        shown.add_row(name if len(name) <= room else "…" + name[1 - room :], *numbers)
    more = [f"… and {len(table.rows) - fit} more"] if fit < len(table.rows) else []
    shown.caption = Text("\n".join([*more, table.foot]), style="dim", no_wrap=True, overflow="ellipsis")
    return shown
