"""Stage one: plan, resume, one truncated forward pass for all layers, commit by commit until the plan or the text ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from ..cache.manifest import Execution
from ..cache.writer import StoreSetWriter
from ..console import Progress, format_bytes, format_count, format_duration, note, progress
from ..errors import TcsaeError
from .config import ExtractConfig, command_line
from .feed import Batch, RowFeed, batches
from .forward import Flight, ForwardPass, check_finite, choose_batch_size, until_it_fits
from .models import LanguageModel, identify_model, load_language_model
from .plan import Plan, look, make_plan, resolve_execution
from .rows import Cursor, read_rows

_ESTIMATE_AFTER = 5.0  # seconds of extraction after which the first time estimate is printed


@dataclass(frozen=True)
class ExtractSummary:
    """What an extraction left behind. ``tokens`` and ``bytes_written`` are of this run, ``rows`` of the whole stores."""

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
        """Of this run; 0 when nothing was left to do."""
        return self.tokens / self.seconds if self.tokens else 0.0

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the closing summary: every number for machines, in words for people."""
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


def extract(config: ExtractConfig) -> ExtractSummary:
    """Fill one store per layer, or go on filling them; see :class:`ExtractConfig`.

    Raises:
        ModelError, TextError, StoreError, ResourceError: one sentence each; what was committed before stays.
        KeyboardInterrupt: on SIGINT and SIGTERM, with the command that goes on.

    """
    with _interruptible(config):
        if config.workers or config.scheduler:
            from .distributed import extract_on_cluster

            return extract_on_cluster(config)
        return _extract_here(make_plan(config))


def _extract_here(plan: Plan) -> ExtractSummary:
    config = plan.config
    identity = identify_model(plan.outline)
    plan.check_same(identity)
    if plan.complete:
        return already_complete(plan)
    lm = load_language_model(plan.outline, deepest_layer=max(config.layers), identity=identity)
    batch_size = min(config.batch_size or choose_batch_size(lm, plan.layout, config.rows), plan.layout.shard_rows)
    execution = resolve_execution(plan, batch_size)
    torch.set_num_threads(execution.threads)
    if config.fresh:
        note(f"      --fresh: what is at {' '.join(config.paths.values())} is replaced")
    writer = StoreSetWriter.open(config.paths, plan.manifests(identity, execution), fresh=config.fresh)
    start, began = writer.rows_stored, time.perf_counter()
    with writer:
        Filling(plan, lm, writer).run(execution)
        writer.finish()
    return summarise(plan, writer, start, time.perf_counter() - began)


class Filling:
    """The loop of one process: one batch computed while the last one is copied out and written."""

    def __init__(self, plan: Plan, lm: LanguageModel, writer: StoreSetWriter):
        self.plan, self.lm, self.writer = plan, lm, writer
        self._began = time.perf_counter()
        self._tokens = self._uncommitted = 0
        self._estimated = False

    def run(self, execution: Execution) -> None:
        """Extract until the plan is full or the text ends."""
        config, context = self.plan.config, self.plan.config.text.context
        record_execution(self.writer, execution)
        done = self.writer.rows_committed * context
        with progress("extracting", config.rows * context, done=done) as bar:
            name, restart = self.lm.identity.id, self.writer.restart_shard
            until_it_fits(lambda now: self._batches(now.batch_size, bar), execution, name, restart)

    def _batches(self, batch_size: int, bar: Progress) -> None:
        plan, writer = self.plan, self.writer
        forward = ForwardPass(self.lm, plan.config.layers, batch_size)
        bar.advance(-self._uncommitted)
        self._uncommitted = 0
        rows = read_rows(plan.config.text, plan.outline, plan.documents, Cursor.read(writer.cursor))
        with RowFeed(rows, plan.outline.special_token_ids) as feed:
            ahead: tuple[Batch, Flight] | None = None
            for batch in batches(feed, writer.rows_committed, plan.config.rows, writer.layout.shard_rows, batch_size):
                launched = forward.launch(batch.block)
                if ahead:
                    self._deliver(*ahead, bar)
                ahead = (batch, launched)
            if ahead:
                self._deliver(*ahead, bar)
            writer.drain()

    def _deliver(self, batch: Batch, flight: Flight, bar: Progress) -> None:
        bits = flight.land()
        check_finite(bits, batch.block, batch.first_row, self.lm)
        self.writer.append(batch.block, bits)
        tokens = len(batch.block) * self.plan.config.text.context
        self._uncommitted += tokens
        if batch.cursor is not None:
            self.writer.commit(batch.cursor)
            self._uncommitted = 0
        self._tokens += tokens
        seconds = time.perf_counter() - self._began
        bar.advance(tokens, f"{format_bytes(self.writer.bytes_written / seconds)}/s to disk")
        if not self._estimated and seconds > _ESTIMATE_AFTER:
            self._estimate(batch, seconds)

    def _estimate(self, batch: Batch, seconds: float) -> None:
        self._estimated = True
        speed = self._tokens / seconds
        left = (self.plan.config.rows - batch.first_row) * self.plan.config.text.context / speed
        note(f"      {speed:,.0f} tokens/s: about {format_duration(left)} to go")


def record_execution(writer: StoreSetWriter, execution: Execution) -> None:
    """Have the next commits record how they were run, if that is another way than the last ones."""
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


@contextmanager
def _interruptible(config: ExtractConfig) -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does (only the main thread can arrange for that); either says how to go on."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    began = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(config, began)) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def how_to_go_on(config: ExtractConfig, began: str) -> str:
    """What a run that was stopped left behind, and the command that goes on; ``began``: when it started, ISO 8601 in UTC."""
    try:
        stored = look(config)
    except TcsaeError:  # stopped while the stores were being created
        stored = None
    if config.fresh and stored and any(manifest.created < began for manifest in stored.manifests):
        return f"What --fresh was to replace is still there under {config.out}; to go on: {command_line(config)} --fresh"
    rows = f"{stored.rows:,} of {config.rows:,} rows are" if stored else "Nothing is"
    return f"{rows} committed under {config.out}; to go on: {command_line(config)}"
