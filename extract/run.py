"""Stage one: plan, resume, and one truncated forward pass for all layers.

Shards are committed one after the other until the plan is complete or the text ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import torch

from ..cache.format.manifest import Execution
from ..cache.writer import StoreSetWriter
from ..console import Progress, format_bytes, format_duration, note, progress
from ..errors import TcsaeError
from ..system.allocator import keeping_freed_memory
from ..system.stop_signals import stop_signals
from .config import ExtractConfig, command_line
from .model.forward import ForwardPass, PendingBatch, check_finite, choose_batch_size, until_it_fits
from .model.hooks import deepest_block
from .model.load import LanguageModel, identify_model, load_language_model
from .plan import Plan, look, make_plan, resolve_execution
from .summary import ExtractSummary, already_complete, record_execution, summarise
from .text.row_batches import Batch, RowReader, batches
from .text.rows import Cursor, read_rows

_ESTIMATE_AFTER = 5.0  # seconds of extraction after which the first time estimate is printed


def extract(config: ExtractConfig) -> ExtractSummary:
    """Fill one store per layer and site, or continue to fill them; see :class:`ExtractConfig`.

    Raises:
        ModelError, TextError, StoreError, ResourceError: one sentence each; what was committed before stays.
        KeyboardInterrupt: on SIGINT and SIGTERM, with the command that continues the run.

    """
    threads = torch.get_num_threads()  # an existing store is extended with its recorded number; restored below
    try:
        with _interruptible(config):
            if config.workers or config.scheduler:
                from .distributed import extract_on_cluster

                return extract_on_cluster(config)
            return _extract_here(make_plan(config))
    finally:
        torch.set_num_threads(threads)


def _extract_here(plan: Plan) -> ExtractSummary:
    config = plan.config
    identity = identify_model(plan.outline)
    plan.check_same(identity)
    if plan.complete:
        return already_complete(plan)
    lm = load_language_model(plan.outline, deepest_layer=deepest_block(config.locations), identity=identity)
    batch_size = min(config.batch_size or choose_batch_size(lm, plan.layout, config.rows), plan.layout.shard_rows)
    execution = resolve_execution(plan, batch_size)
    torch.set_num_threads(execution.threads)
    if config.fresh:
        note(f"      --fresh: what is at {' '.join(config.paths.values())} is replaced")
    writer = StoreSetWriter.open(config.paths, plan.manifests(identity, execution), fresh=config.fresh)
    start, began = writer.rows_stored, time.perf_counter()
    with writer:
        StoreSetRun(plan, lm, writer).run(execution)
        writer.finish()
    return summarise(plan, writer, start, time.perf_counter() - began)


class StoreSetRun:
    """The loop of one process: a batch is computed while the previous one is copied to the CPU and written."""

    def __init__(self, plan: Plan, lm: LanguageModel, writer: StoreSetWriter):
        self.plan, self.lm, self.writer = plan, lm, writer
        self._began = time.perf_counter()
        self._tokens = self._uncommitted = 0
        self._estimated = False

    @keeping_freed_memory()
    def run(self, execution: Execution) -> None:
        """Extract until the plan is complete or the text ends."""
        config, context = self.plan.config, self.plan.config.text.context
        record_execution(self.writer, execution)
        done = self.writer.rows_committed * context
        with progress("extracting", config.rows * context, done=done) as bar:
            name, restart = self.lm.identity.id, self.writer.restart_shard
            until_it_fits(lambda now: self._batches(now.batch_size, bar), execution, name, restart)

    def _batches(self, batch_size: int, bar: Progress) -> None:
        plan, writer = self.plan, self.writer
        forward = ForwardPass(self.lm, plan.config.locations, batch_size)
        bar.advance(-self._uncommitted)
        self._uncommitted = 0
        rows = read_rows(plan.config.text, plan.outline, plan.documents, Cursor.read(writer.cursor))
        with RowReader(rows, plan.outline.special_token_ids) as feed:
            ahead: tuple[Batch, PendingBatch] | None = None
            for batch in batches(feed, writer.rows_committed, plan.config.rows, writer.layout.shard_rows, batch_size):
                launched = forward.launch(batch.block)
                if ahead:
                    self._deliver(*ahead, bar)
                ahead = (batch, launched)
            if ahead:
                self._deliver(*ahead, bar)
            writer.drain()

    def _deliver(self, batch: Batch, pending: PendingBatch, bar: Progress) -> None:
        bits = pending.result()
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


@contextmanager
def _interruptible(config: ExtractConfig) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the run with a message that says how to continue."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        with stop_signals():
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(config, began)) from None


def how_to_go_on(config: ExtractConfig, began: str) -> str:
    """The message of a run that was stopped: what is committed, and the command that continues.

    ``began``: when the run started, ISO 8601 in UTC.
    """
    try:
        stored = look(config)
    except TcsaeError:  # stopped while the stores were being created
        stored = None
    if config.fresh and stored and any(manifest.created < began for manifest in stored.manifests):
        return (
            f"What --fresh was to replace is still there under {config.out}; to go on: {command_line(config)} --fresh"
        )
    rows = f"{stored.rows:,} of {config.rows:,} rows are" if stored else "Nothing is"
    return f"{rows} committed under {config.out}; to go on: {command_line(config)}"
