"""Rows prepared ahead in a background thread and cut into batches; a batch never extends over two shards."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from ...cache.format.layout import RowBlock
from .rows import Row, gather

_PIECE, _PIECES = 32, 16  # rows passed between the threads at a time; number of such pieces prepared ahead


class RowReader:
    """Runs an iterator of rows in a thread of its own, so that the forward passes do not wait for the tokenizer.

    A context manager: leaving it ends the thread. A failure of the iterator is raised by :meth:`take`.
    """

    def __init__(self, rows: Iterator[Row], special_token_ids: tuple[int, ...]):
        self._special = special_token_ids
        self._ready: deque[Row] = deque()
        self._queue: queue.Queue[list[Row] | BaseException | None] = queue.Queue(_PIECES)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(rows,), name="tokenizer", daemon=True)
        self._thread.start()

    def take(self, n: int) -> tuple[RowBlock, dict[str, Any]] | None:
        """The next ``n`` rows (fewer at the end of the text) and the cursor after them; None if there are no more.

        The cursor's field ``end`` is true if no row follows.
        """
        while len(self._ready) <= n and not self._ended:  # one row more than n, to know whether any follows
            self._receive()
        rows = [self._ready.popleft() for _ in range(min(n, len(self._ready)))]
        if not rows:
            return None
        cursor = replace(rows[-1].cursor, end=not self._ready)
        return gather(rows, self._special), asdict(cursor)

    def _receive(self) -> None:
        piece = self._queue.get()
        if isinstance(piece, BaseException):
            raise piece
        if piece is None:
            self._ended = True
        else:
            self._ready.extend(piece)

    def _run(self, rows: Iterator[Row]) -> None:
        piece: list[Row] = []
        try:
            for row in rows:
                piece.append(row)
                if len(piece) == _PIECE:
                    self._put(piece)
                    piece = []
                if self._stop.is_set():
                    return
            self._put(piece)
            self._put(None)
        except BaseException as failure:  # raised in the thread that calls take()
            self._put(piece)
            self._put(failure)

    def _put(self, item: list[Row] | BaseException | None) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)  # do not wait for ever for a stream that hangs on the network


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass. The last batch of a shard also has a ``cursor``."""

    block: RowBlock
    first_row: int
    cursor: dict[str, Any] | None


def batches(feed: RowReader, first_row: int, planned_rows: int, shard_rows: int, batch_size: int) -> Iterator[Batch]:
    """Batches from ``first_row`` until the plan is complete or the text ends.

    Within a shard they begin at multiples of ``batch_size``. The batch in which a row is computed therefore depends
    only on the row's number.
    """
    row = first_row
    while row < planned_rows:
        stop = min(planned_rows, (row // shard_rows + 1) * shard_rows)
        taken = feed.take(min(batch_size, stop - row))
        if taken is None:
            return
        block, cursor = taken
        last = row + len(block) == stop or cursor["end"]
        yield Batch(block, row, cursor if last else None)
        row += len(block)
