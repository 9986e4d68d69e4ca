"""Importing an array: rows are read, checked, rounded to bfloat16 and written, shard by shard, as extraction does.

Shapes: R rows of a step, T positions, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...console import format_bytes, format_duration, note, progress
from ...errors import ArrayError, StoreError
from ...system.stop_signals import stop_signals
from ...system.untrusted_files import shown
from ..format.layout import PADDING, RowBlock, to_bits
from ..verify import nonfinite_tokens
from ..writer import StoreSetWriter
from .config import ImportConfig
from .plan import ImportPlan, Rows, make_plan

_STEP_BYTES = 32_000_000  # of vectors in float32 that are read together


@dataclass(frozen=True)
class ImportSummary:
    """What :func:`import_array` did."""

    plan: ImportPlan
    stores: tuple[str, ...]  # the store, and that of the held-out vectors
    rows_before: int  # rows that were there already
    rows: int  # in all stores now
    seconds: float

    @property
    def already_complete(self) -> bool:
        """Whether nothing was left to do."""
        return self.rows_before == self.rows

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the closing summary: plain values for machines, words for people."""
        facts = self.plan.facts(as_json=as_json)
        if as_json:
            return facts | {"stores": list(self.stores), "rows_before": self.rows_before, "seconds": self.seconds}
        return facts | {"time": format_duration(self.seconds)}


def import_array(config: ImportConfig) -> ImportSummary:
    """Make a store of an array of vectors, or go on with one; see :class:`ImportConfig`.

    Raises:
        ArrayError, StoreError, ResourceError: one sentence each; what was committed before stays.
        KeyboardInterrupt: Ctrl-C; the same command goes on.

    """
    with stop_signals():
        return _import(make_plan(config))


def _import(plan: ImportPlan) -> ImportSummary:
    began, config = time.perf_counter(), plan.config
    before = rows = 0
    for name, _, part in plan.parts:
        size = format_bytes(plan.layout(part).store_bytes(len(part)))
        note(f"      {name}: {len(part):,} rows of {plan.context} × {plan.d_model} in bfloat16, {size}")
    for path, split, part in plan.parts:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        manifest = plan.manifest(part, split)
        writer = StoreSetWriter.open({config.at: path}, {config.at: manifest}, fresh=config.fresh)
        before += writer.rows_stored
        with writer:
            _write(plan, part, writer)
            writer.finish()
        rows += writer.rows_stored
    if not len(plan.held_out):
        _refuse_other_held_out(config)
    stores = tuple(path for path, _, _ in plan.parts)
    return ImportSummary(plan, stores, before, rows, time.perf_counter() - began)


def _refuse_other_held_out(config: ImportConfig) -> None:
    if Path(config.held_out_store).exists():
        raise StoreError(
            f"nothing was held out, but {config.held_out_store} of another import is there: remove it with "
            "`pipeline rm`, so that no evaluation takes it for yours"
        )


def _write(plan: ImportPlan, rows: Rows, writer: StoreSetWriter) -> None:
    layout, at = writer.layout, plan.config.at
    step = max(1, min(layout.shard_rows, _STEP_BYTES // (4 * plan.context * plan.d_model)))
    first = writer.rows_committed
    with progress("importing", len(rows), unit="rows", done=first) as bar:
        while first < len(rows):
            end = min(len(rows), (first // layout.shard_rows + 1) * layout.shard_rows)
            for start in range(first, end, step):
                stop = min(end, start + step)
                block, bits = _read(plan, rows, start, stop)
                writer.append(block, {at: bits})
                bar.advance(stop - start)
            writer.commit(_cursor(plan, rows, first, end))
            first = end
        writer.drain()


def _cursor(plan: ImportPlan, rows: Rows, first: int, end: int) -> dict[str, Any]:
    """What a shard's commit says beside its rows: labels of its sequences; the first one also what tokens look like."""
    found: dict[str, Any] = {"rows": end}
    if plan.labels is not None:
        sequences = np.unique(rows.sequence_R[first:end]).tolist()
        found["labels"] = {str(one): plan.labels[one] for one in sequences if plan.labels[one] is not None}
    if plan.token_text is not None and first == 0:
        found["token_text"] = plan.token_text
    return found


def _read(plan: ImportPlan, rows: Rows, start: int, stop: int) -> tuple[RowBlock, np.ndarray]:
    n, context = stop - start, plan.context
    x_RTD = torch.zeros(n, context, plan.d_model)
    tokens_RT = np.zeros((n, context), dtype=np.int32)
    inside_RT = np.arange(context) < rows.count_R[start:stop, None]
    inside = torch.from_numpy(inside_RT)
    for low, high in rows.stretches(start, stop):
        first, last = int(rows.start_R[low]), int(rows.start_R[high - 1] + rows.count_R[high - 1])
        here = slice(low - start, high - start)
        with _reading(plan.config):
            x_ND = plan.vectors.flat(first, last, plan.axes)
            x_RTD[here][inside[here]] = x_ND.float()
            if plan.tokens is not None:
                tokens_RT[here][inside_RT[here]] = plan.tokens.flat(first, last, plan.axes).numpy().astype(np.int32)
    bits = to_bits(x_RTD)
    if nonfinite_tokens(bits):
        _refuse_nonfinite(plan, rows, start, bits)
    documents_RT = np.repeat(rows.sequence_R[start:stop, None].astype(np.int32), context, axis=1)
    flags_RT = np.where(inside_RT, 0, PADDING).astype(np.uint8)
    return RowBlock(tokens_RT, documents_RT, flags_RT), bits


@contextmanager
def _reading(config: ImportConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as failure:
        raise ArrayError(f"{shown(config.array)} cannot be read to its end ({failure}): write it again") from failure


def _refuse_nonfinite(plan: ImportPlan, rows: Rows, start: int, bits: np.ndarray) -> None:
    row, position = np.argwhere((bits & 0x7FFF).max(-1) >= 0x7F80)[0].tolist()
    index = int(rows.start_R[start + row]) + position
    where = f"vector {index}" if plan.axes == 1 else f"row {index // plan.vectors.shape[1]}, position "
    where += "" if plan.axes == 1 else str(index % plan.vectors.shape[1])
    finite = bool(torch.isfinite(plan.vectors.flat(index, index + 1, plan.axes)).all())
    what = "a number too large for bfloat16 (3.4e38)" if finite else "NaN or infinity"
    raise ArrayError(f"{shown(plan.config.array)} holds {what} at {where}: mend the array, or leave its sequence out")
