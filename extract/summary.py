"""The result of an extraction, in numbers for machines and in words for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..cache.format.manifest import Execution
from ..cache.writer import StoreSetWriter
from ..console import format_bytes, format_count, format_duration
from .plan import Plan
from .text.rows import Cursor


@dataclass(frozen=True)
class ExtractSummary:
    """The result of an extraction. ``tokens`` and ``bytes_written`` are of this run, ``rows`` of the whole stores."""

    stores: tuple[str, ...]
    rows: int
    tokens_stored: int
    tokens: int
    seconds: float
    bytes_written: int
    batch_size: int | None
    dtype: str
    device: str
    dropped_tokens: int
    short_documents: int
    held_out_documents: int
    text_ended: bool
    already_complete: bool

    @property
    def tokens_per_second(self) -> float:
        """Speed of this run; 0 if nothing was left to do."""
        return self.tokens / self.seconds if self.tokens else 0.0

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """The facts for the closing summary: all numbers for machines, or words for people."""
        if as_json:
            return {**asdict(self), "tokens_per_second": self.tokens_per_second}
        facts: dict[str, Any] = {"stores": " ".join(self.stores)}
        facts["rows"] = f"{self.rows:,} ({format_count(self.tokens_stored)} tokens a layer)"
        if self.tokens:
            speed = f"{self.tokens_per_second:,.0f} tokens/s, {format_bytes(self.bytes_written)} written"
            facts["this run"] = f"{format_count(self.tokens)} tokens in {format_duration(self.seconds)}, {speed}"
        facts["computed"] = f"in {self.dtype} on {self.device}, {self.batch_size} rows at a time"
        facts["left out"] = (
            f"{self.held_out_documents:,} documents held out, {self.short_documents:,} shorter than a row, "
            f"{format_count(self.dropped_tokens)} tokens of tails"
        )
        if self.text_ended:
            facts["note"] = "the text ended before the plan did; give more text for more tokens"
        return facts


def record_execution(writer: StoreSetWriter, execution: Execution) -> None:
    """Record ``execution`` with the next commits if it differs from that of the last ones."""
    if execution != writer.execution:
        writer.restart_shard(execution)


def summarise(plan: Plan, writer: StoreSetWriter, rows_before: int, seconds: float) -> ExtractSummary:
    """The summary of a finished extraction."""
    cursor = Cursor.read(writer.last_cursor)
    context = plan.config.text.context
    return ExtractSummary(
        stores=tuple(plan.config.paths.values()),
        rows=writer.rows_stored,
        tokens_stored=writer.rows_stored * context,
        tokens=(writer.rows_stored - rows_before) * context,
        seconds=seconds,
        bytes_written=writer.bytes_written,
        batch_size=writer.execution.batch_size,
        dtype=plan.outline.source.dtype,
        device=writer.execution.device,
        dropped_tokens=cursor.dropped_tokens,
        short_documents=cursor.short_documents,
        held_out_documents=cursor.held_out_documents,
        text_ended=cursor.end and writer.rows_stored < plan.config.rows,
        already_complete=False,
    )


def already_complete(plan: Plan) -> ExtractSummary:
    """The summary when nothing is left to do."""
    stored: Any = plan.stored
    return ExtractSummary(
        stores=tuple(plan.config.paths.values()),
        rows=stored.rows,
        tokens_stored=stored.rows * plan.config.text.context,
        tokens=0,
        seconds=0.0,
        bytes_written=0,
        batch_size=stored.execution.batch_size,
        dtype=stored.manifests[0].model.dtype,
        device=stored.execution.device,
        dropped_tokens=stored.cursor.dropped_tokens,
        short_documents=stored.cursor.short_documents,
        held_out_documents=stored.cursor.held_out_documents,
        text_ended=stored.cursor.end and stored.rows < plan.config.rows,
        already_complete=True,
    )
