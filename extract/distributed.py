"""Extraction on a Dask cluster.

This process reads the text and commits; workers run the model and write whole shards of every store. A task is one
shard: the worker gets the tokens of its rows, and returns the record of the files it has written. Records are committed
in row order. When a worker dies, Dask gives its unfinished shards to another. With the same batch size and number of
threads, the stores are byte for byte those of a single process.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..cache.cluster import connected, local_cluster, own_device
from ..cache.format.commit_log import ShardRecord
from ..cache.format.layout import RowBlock, StoreLayout
from ..cache.format.manifest import Execution, ModelIdentity, identity_difference
from ..cache.format.shard_writer import write_shard
from ..cache.writer import StoreSetWriter
from ..console import Progress, format_bytes, note, progress, warn
from ..errors import ModelError, ResourceError, StaleRunError, TcsaeError
from ..plugins import load_plugins
from ..sites import HOOK_POINTS, Location
from ..system.allocator import keeping_freed_memory
from ..system.device import resolve_device, resolve_dtype
from .config import ExtractConfig, ModelSource
from .model.forward import ForwardPass, check_finite, choose_batch_size, until_it_fits
from .model.hooks import deepest_block
from .model.load import LanguageModel, identify_model, load_language_model
from .plan import Plan, describe_execution, make_plan
from .summary import ExtractSummary, already_complete, record_execution, summarise
from .text.row_batches import RowReader
from .text.rows import Cursor, read_rows

_SHARDS_PER_THREAD = 2  # shards assigned in advance to each thread, so that a worker never waits for text
_RETRIES = 2  # for a task that raises anything but a TcsaeError; a worker that dies is not counted here

_GO_ON = "what was committed stays; start it and its workers again, and the same command goes on from there"


@dataclass(frozen=True)
class Job:
    """What all tasks of one extraction share. It is small and hashable, and is sent along with each shard."""

    source: ModelSource
    identity: ModelIdentity
    paths: tuple[tuple[Location, str], ...]
    layout: StoreLayout
    execution: Execution
    run: str
    """Token of the run; a worker that still runs after this run has ended does not finish its files."""
    plugins: tuple[str, ...] = ()
    """Files that register hook points; a worker loads them first."""


def extract_on_cluster(config: ExtractConfig) -> ExtractSummary:
    """:func:`tcsae.extract.run.extract` on ``config.workers`` processes of this machine or on ``config.scheduler``.

    Every worker must see the model, and the stores under the same path or URL.

    Raises:
        ResourceError: the scheduler cannot be reached, has no workers, or is lost; or a single row does not fit into
            memory.
        ModelError, StoreError, ResourceError: a worker failed with it; such failures are not tried again.

    """
    with ExitStack() as stack:
        if config.scheduler:
            client = stack.enter_context(connected(config.scheduler, instead="use --workers", then=_GO_ON))
            device, dtype = client.submit(
                _resolve_on_worker, config.model.device, config.model.dtype, pure=False
            ).result()
            config = replace(config, model=replace(config.model, device=device, dtype=dtype))
            plan = make_plan(config, elsewhere=True)
        else:
            plan = make_plan(config)
        identity = identify_model(plan.outline)
        plan.check_same(identity)
        if plan.complete:
            return already_complete(plan)
        if not config.scheduler:
            client = stack.enter_context(local_cluster(config.workers or 1))
        return _Coordinator(plan, identity, client).run()


def _resolve_on_worker(device: str, dtype: str) -> tuple[str, str]:
    """Run on a worker: the device and dtype that ``auto`` means there."""
    found = resolve_device(device)
    return (str(found) if ":" in device else found.type), resolve_dtype(dtype, found)


class _Coordinator:
    """Assigns shards in row order, a limited number in advance, and commits the results in the same order."""

    def __init__(self, plan: Plan, identity: ModelIdentity, client: Any):
        self.plan, self.identity, self.client = plan, identity, client
        self.ahead = _SHARDS_PER_THREAD * sum(client.nthreads().values())

    def run(self) -> ExtractSummary:
        """Extract until the plan is complete or the text ends."""
        plan, config = self.plan, self.plan.config
        execution = self._execution()
        paths = {at: path if "://" in path else os.path.abspath(path) for at, path in config.paths.items()}
        writer = StoreSetWriter.open(paths, plan.manifests(self.identity, execution), fresh=config.fresh)
        start, began = writer.rows_stored, time.perf_counter()
        context = config.text.context
        with writer, progress("extracting", config.rows * context, done=writer.rows_committed * context) as bar:
            record_execution(writer, execution)
            writer.begin()
            name = plan.outline.files.name
            until_it_fits(lambda now: self._shards(writer, now, paths, bar), execution, name, writer.restart_shard)
            writer.finish()
        return summarise(plan, writer, start, time.perf_counter() - began)

    def _execution(self) -> Execution:
        """The execution that one worker would choose; all workers use it."""
        plan = self.plan
        probe = (
            plan.outline.source,
            self.identity,
            deepest_block(plan.config.locations),
            plan.layout,
            plan.config.rows,
        )
        batch_size, threads, device_name = self.client.submit(_probe, *probe, pure=False).result()
        batch_size = min(plan.config.batch_size or batch_size, plan.layout.shard_rows)
        if plan.stored:
            threads = plan.stored.execution.threads
        elif plan.config.workers:
            threads = max(1, torch.get_num_threads() // plan.config.workers)
        device = plan.outline.source.device.split(":")[0]
        note(f"      {len(self.client.nthreads())} workers, {threads} threads each, {batch_size} rows at a time")
        spread = plan.outline.source.device_map
        return Execution(
            batch_size=batch_size, threads=threads, device=device, device_name=device_name, device_map=spread
        )

    def _shards(self, writer: StoreSetWriter, execution: Execution, paths: dict[Location, str], bar: Progress) -> None:
        from distributed import wait

        plan, config = self.plan, self.plan.config
        plugins = tuple(sorted({owner for site in config.sites if (owner := HOOK_POINTS.owner(site))}))
        job = Job(
            plan.outline.source, self.identity, tuple(paths.items()), writer.layout, execution, writer.run, plugins
        )
        rows = read_rows(config.text, plan.outline, plan.documents, Cursor.read(writer.cursor))
        pending: deque[tuple[Any, dict[str, Any]]] = deque()
        shard, at, kept = writer.next_shard, writer.rows_committed, writer.kept_rows
        began = time.perf_counter()
        try:
            with RowReader(rows, plan.outline.special_token_ids) as feed:
                while at < config.rows and (taken := feed.take(min(job.layout.shard_rows, config.rows - at))):
                    block, cursor = taken
                    pending.append((self._submit(job, shard, block, kept), cursor))
                    shard, at, kept = shard + 1, at + len(block), 0
                    if len(pending) >= self.ahead:
                        self._commit_first(pending, writer, bar, began)
            while pending:
                self._commit_first(pending, writer, bar, began)
        except torch.OutOfMemoryError:
            wait([future for future, _ in pending])  # else two tasks might write one shard, with different batch sizes
            raise

    def _submit(self, job: Job, shard: int, block: RowBlock, kept_rows: int) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
            return self.client.submit(_extract_shard, job, shard, block, kept_rows, pure=False, retries=_RETRIES)

    def _commit_first(self, pending: deque[Any], writer: StoreSetWriter, bar: Progress, began: float) -> None:
        from distributed import KilledWorker

        future, cursor = pending[0]
        try:
            record: ShardRecord | Exception = future.result()
        except KilledWorker as problem:
            raise ResourceError(
                f"shard {writer.next_shard} took every worker that tried it down with it, most likely out of memory: "
                "use fewer workers or a smaller --batch-size; what was committed stays"
            ) from problem
        if isinstance(record, Exception):
            raise record
        pending.popleft()
        writer.commit_records([record], cursor)
        speed = writer.bytes_written / (time.perf_counter() - began)
        bar.advance(record.rows * self.plan.config.text.context, f"{format_bytes(speed)}/s to disk")


# --- on a worker

_one_at_a_time = threading.Lock()  # the threads of a worker share one model and one GPU


def _probe(
    source: ModelSource, identity: ModelIdentity, deepest: int, layout: StoreLayout, rows: int
) -> tuple[int, int, str]:
    """Batch size, number of threads and device name that this worker would choose."""
    with _one_at_a_time:
        lm = _model(source, identity, deepest)  # type: ignore[arg-type] — frozen pydantic records are hashable
        return choose_batch_size(lm, layout, rows), torch.get_num_threads(), describe_execution(lm.device)


def _extract_shard(job: Job, shard: int, block: RowBlock, kept_rows: int) -> ShardRecord | Exception:
    """Extract one shard of every store; returns the record of its files, or a failure that another try would repeat."""
    try:
        return _write_shard(job, shard, block, kept_rows)
    except StaleRunError as stale:
        warn(f"shard {shard}: {stale}")  # the coordinator may have ended, so that nobody else reports it
        return stale
    except (TcsaeError, torch.OutOfMemoryError) as failure:
        return failure


def _write_shard(job: Job, shard: int, block: RowBlock, kept_rows: int) -> ShardRecord:
    load_plugins(job.plugins)
    locations = [at for at, _ in job.paths]
    with _one_at_a_time, keeping_freed_memory():
        torch.set_num_threads(job.execution.threads)
        lm = _model(job.source, job.identity, deepest_block(locations))  # type: ignore[arg-type]
        passes = _passes(lm, locations, job, block, shard * job.layout.shard_rows)
        layouts = dict.fromkeys(locations, job.layout)
        return write_shard(dict(job.paths), layouts, shard, passes, kept_rows=kept_rows, owner=job.run)


def _passes(
    lm: LanguageModel, locations: list[Location], job: Job, block: RowBlock, first_row: int
) -> Iterator[tuple[RowBlock, dict[Location, np.ndarray]]]:
    forward = ForwardPass(lm, locations, job.execution.batch_size)
    ahead = None
    for start in [*range(0, len(block), forward.batch_size), None]:
        part = None if start is None else block.slice(start, start + forward.batch_size)
        launched = None if part is None else (part, forward.launch(part), first_row + (start or 0))
        if ahead is not None:
            rows, pending, row = ahead
            bits = pending.result()
            check_finite(bits, rows, row, lm)
            yield rows, bits
        ahead = launched


@lru_cache(maxsize=1)
def _model(source: ModelSource, identity: ModelIdentity, deepest: int) -> LanguageModel:
    lm = load_language_model(replace(source, device=own_device(source.device)), deepest_layer=deepest)
    difference = identity_difference(identity, lm.identity)
    if difference:
        raise ModelError(
            f"a worker finds another model under {source.id} ({difference}): give all machines the same one"
        )
    return lm
