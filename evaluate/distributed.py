"""Evaluation on a Dask cluster: the rows of the text are divided among workers, and what they summed is added here.

A task is a block of whole batches. A worker measures all rows of the table on it and returns the states of their
accumulators. This process merges them in the order of the text, so that nothing depends on who was first, and asks the
model after the pass what is asked then. The first look at the text is divided likewise. Batches are those of a single
process: figures differ from its own by the rounding of sums alone. When a worker dies, Dask gives its blocks to
another.
"""

from __future__ import annotations

import pickle
import secrets
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numcodecs import zstd  # pyright: ignore[reportAttributeAccessIssue] - a compiled module

from ..cache.cluster import connected, local_cluster, own_device
from ..console import Progress, note, progress, speaking
from ..errors import ModelError, ResourceError, TcsaeError
from ..plugins import load_plugins
from ..sites import Location
from ..system.allocator import keeping_freed_memory
from ..system.free_memory import is_out_of_memory
from ..train.sae.protocol import SparseCoder
from .candidates import CandidateMaker, Wanted
from .config import EvaluateConfig
from .metrics.registry import METRICS, MetricFamily
from .model.heldout_text import HeldOutText, Look, Survey, look_at
from .protocol import State
from .results import Failure
from .row_cache import measuring_code
from .sources import VERIFY_ROWS, Source, source_of
from .subjects import Group
from .table_row import Candidate

T = TypeVar("T")
_BLOCKS = 4  # per thread of the cluster: what is lost with a worker is one of them
_AHEAD = 2  # blocks per thread that are handed out: the states of no more than these wait for their turn
_OF_FAMILIES = ("metrics", "by_scope", "by_summand")
_RETRIES = 2  # for a task that raises anything but a TcsaeError; a worker that dies is not counted here
_GO_ON = "rows that are finished stay; start it and its workers again, and the same command goes on from there"


@dataclass(frozen=True)
class Job:
    """What all tasks of one pass share. It is small, and is sent along with each block of rows."""

    evaluation: str
    """Names the evaluation: a worker that knows it has the model loaded already."""
    config: EvaluateConfig
    group: Group
    """The model and the text, under names that hold in any folder."""
    arithmetic: tuple[str, ...]
    """What must be the same on every machine."""
    families: tuple[str, ...]
    cards: int
    locations: tuple[Location, ...]
    """All places of the evaluation."""
    begin: HeldOutText
    """The rows on which what the pass relies on is tried."""
    threads: int | None
    """For torch; None: as many as the worker was given."""
    surveys: Mapping[Location, Survey] = field(default_factory=dict)
    rows: Mapping[str, Wanted] = field(default_factory=dict)
    """The rows of the table that are measured in this pass."""


@dataclass(frozen=True)
class _Measured:
    """What came of one block."""

    states: dict[str, bytes]
    failures: dict[str, Failure]


@contextmanager
def workers_of(config: EvaluateConfig) -> Iterator[Any]:
    """A Dask client of the workers that are asked for.

    Raises:
        ResourceError: the scheduler cannot be reached, has no workers, or is lost.

    """
    if config.scheduler is not None:
        with connected(config.scheduler, instead="use --workers", then=_GO_ON) as client:
            yield client
    else:
        with local_cluster(config.workers or 1) as client:
            yield client


def _arithmetic_of(source: Source, plugins: Mapping[str, str]) -> tuple[str, ...]:
    """What decides the numbers besides the SAEs and the text; as words."""
    facts = source.facts
    code = measuring_code(plugins)[:12]
    return (
        f"model {facts.fingerprint[:12]}",
        f"device {source.device.type}",
        f"dtype {facts.dtype}",
        f"torch {torch.__version__.split('+')[0]}",
        f"code {code}",
    )


def _divided(families: Mapping[str, MetricFamily]) -> tuple[dict[str, MetricFamily], dict[str, MetricFamily]]:
    """The families that workers can measure, and those that only this process can.

    The latter have no ``state`` and ``merge``, or were registered in this process by no file that a worker could load.
    """
    there = {
        name: family
        for name, family in families.items()
        if family.merges and (METRICS.is_own(name) or METRICS.owner(name) is not None)
    }
    return there, {name: family for name, family in families.items() if name not in there}


def blocks_of(rows: int, batch_rows: int, threads: int) -> list[slice]:
    """Runs of whole batches, a few for each thread."""
    batches = -(-rows // batch_rows)
    step = -(-batches // (threads * _BLOCKS)) * batch_rows
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class Workers:
    """Shows the text to candidates on the workers of a cluster.

    Args:
        source: of this process.
        text: all of it.
        maker: of candidates, with all families of metrics.
        share_R: bool [R], the rows that references see which only give meaning; None: all.
        wanted: all rows of the table, by key.
        client: of the cluster.
        plugins: those that are loaded, file name → SHA-256.
        locations: all places of the evaluation.

    """

    def __init__(
        self,
        source: Source,
        text: HeldOutText,
        maker: CandidateMaker,
        share_R: np.ndarray | None,
        wanted: Mapping[str, Wanted],
        client: Any,
        plugins: Mapping[str, str],
        locations: Sequence[Location],
    ):
        there, here = _divided(maker.families)
        self._client, self._source, self._text, self._wanted, self._share_R = client, source, text, wanted, share_R
        self._maker, self._alone = replace(maker, families=there), replace(maker, families=here)
        for name in here:
            note(f"the metric '{name}' is measured in this process alone: it has no state and merge, or no file")
        config, workers = maker.config, len(client.nthreads())
        self._threads = sum(client.nthreads().values())
        note(f"{workers} worker{'s' if workers > 1 else ''}, {self._threads} blocks of rows at a time")
        self._job = Job(
            evaluation=secrets.token_hex(8),
            config=replace(
                config,
                device=config.device if ":" in config.device else source.device.type,
                plugins=tuple(str(Path(file).absolute()) for file in config.plugins),
            ),
            group=source.elsewhere(),
            arithmetic=_arithmetic_of(source, plugins),
            families=tuple(there),
            cards=maker.cards,
            locations=tuple(locations),
            begin=text.part(slice(0, VERIFY_ROWS)),
            threads=max(1, torch.get_num_threads() // config.workers) if config.workers else None,
        )

    def candidate(self, key: str, survey: Survey) -> Candidate:
        """As of any process: here what workers sum is put together."""
        wanted = self._wanted[key]
        return self._maker.make(key, wanted, self._maker.load(wanted, survey), survey, self._share_R)

    def measure(self, candidates: list[Candidate], bar: Progress) -> dict[str, Failure]:
        """As of any process.

        Raises:
            ResourceError: a block took every worker down with it.
            MemoryError: a worker has no room for this pass.
            TcsaeError: a failure that is not of one SAE alone.

        """
        rows = {candidate.key: self._wanted[candidate.key] for candidate in candidates}
        seen = {one.row.location: replace(one.survey, mean_D=one.survey.mean_D.cpu()) for one in candidates}
        failures = self._on_workers(replace(self._job, rows=rows, surveys=seen), candidates, bar)
        left = [candidate for candidate in candidates if candidate.key not in failures]
        return failures | (self._measure_here(left) if self._alone.families else {})

    def _on_workers(self, job: Job, candidates: list[Candidate], bar: Progress) -> dict[str, Failure]:
        failures: dict[str, Failure] = {}
        by_key = {candidate.key: candidate for candidate in candidates}

        def task(rows: slice) -> tuple[Any, ...]:
            left = {key: wanted for key, wanted in job.rows.items() if key not in failures}
            share = None if self._share_R is None else self._share_R[rows]
            return _measure_rows, replace(job, rows=left), self._text.part(rows), share

        with closing(self._each_block(task)) as blocks:
            for rows, found in blocks:
                failures |= {key: failure for key, failure in found.failures.items() if key not in failures}
                for key, packed in found.states.items():
                    if key not in failures:
                        by_key[key].merge(_unpacked(packed))
                bar.advance((rows.stop - rows.start) * self._text.context)
                if len(failures) == len(by_key):
                    break
        return failures

    def survey(self, locations: Sequence[Location]) -> dict[Location, Survey]:
        """As of any process."""
        looks = {at: Look() for at in locations}
        while open_ := {at: look for at, look in looks.items() if look.found is None}:
            apart = {at: look.apart for at, look in open_.items()}

            def task(rows: slice, apart: dict[Location, float | None] = apart) -> tuple[Any, ...]:
                return _look_at_rows, self._job, self._text.part(rows), apart

            with (
                progress("looking at the text", len(self._text) * self._text.context) as bar,
                closing(self._each_block(task)) as blocks,
            ):
                for rows, found in blocks:
                    for at, packed in found.items():
                        open_[at].merge(_unpacked(packed))
                    bar.advance((rows.stop - rows.start) * self._text.context)
            for look in open_.values():
                look.conclude()
        return {at: look.found for at, look in looks.items() if look.found is not None}

    def _each_block(self, task: Callable[[slice], tuple[Any, ...]]) -> Generator[tuple[slice, Any]]:
        """Hand out the task of every block of rows, a few ahead, and yield their results in the order of the text."""
        pending: deque[tuple[Any, slice]] = deque()
        blocks = deque(blocks_of(len(self._text), self._job.config.batch_rows, self._threads))
        try:
            while blocks or pending:
                while blocks and len(pending) < self._threads * _AHEAD:
                    rows = blocks.popleft()
                    pending.append((self._submit(*task(rows)), rows))
                future, rows = pending.popleft()
                yield rows, _result(future, rows)
        finally:
            self._client.cancel([future for future, _ in pending])

    def _submit(self, *call: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
            return self._client.submit(*call, pure=False, retries=_RETRIES)

    def _measure_here(self, candidates: list[Candidate]) -> dict[str, Failure]:
        """Measure what no worker can, without splices."""
        beside: dict[str, Candidate] = {}
        for candidate in candidates:
            if candidate.accumulators:
                facts = (self._wanted[candidate.key], candidate.sae, candidate.survey, self._share_R)
                beside[candidate.key] = one = self._alone.make(candidate.key, *facts)
                one.accumulators = {name: each for name, each in one.accumulators.items() if name in _OF_FAMILIES}
        measurement = self._source.measurement(self._text, list(beside.values()))
        measurement.splices = False
        with progress("evaluate in this process", len(self._text) * self._text.context) as bar:
            measurement.run(self._maker.config.batch_rows, bar)
        for candidate in candidates:
            more = beside[candidate.key].accumulators if candidate.key in beside else {}
            candidate.accumulators |= {f"{name} here": each for name, each in more.items()}
        return measurement.failures


def _result(future: Any, rows: slice) -> Any:
    from distributed import KilledWorker

    try:
        found = future.result()
    except KilledWorker as lost:
        raise ResourceError(
            f"rows {rows.start} to {rows.stop - 1} took every worker that tried them down with it, most likely out of "
            "memory: use fewer workers or a smaller --batch-size; rows of the table that are finished stay"
        ) from lost
    if isinstance(found, Exception):
        raise found
    return found


def _packed(state: State) -> bytes:
    """Most of a state is zeros: features that did not fire."""
    return zstd.compress(pickle.dumps(state, protocol=5), 1)


def _unpacked(packed: bytes) -> State:
    return pickle.loads(zstd.decompress(packed))  # noqa: S301 - from a worker, which runs what this process sends


# --- on a worker

_one_at_a_time = threading.Lock()  # the threads of a worker share one model and one GPU


class _Worker:
    """A worker's model, and the SAEs of the pass that it measured last."""

    def __init__(self, job: Job):
        plugins = load_plugins(job.config.plugins)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        device = own_device(job.config.device)
        group = replace(job.group, model=replace(job.group.model, device=device))
        self.evaluation = job.evaluation
        self.source = source_of(replace(job.config, device=device), group)
        found = _arithmetic_of(self.source, plugins)
        if found != job.arithmetic:
            here, there = (", ".join(sorted(set(one) - set(other))) for one, other in _both_ways(job.arithmetic, found))
            raise ModelError(
                f"a worker would measure with other numbers than this process ({there} there, {here} here): give all "
                "machines the same model, device, packages and plug-ins"
            )
        self.source.prepare(job.begin, job.locations)
        families = {name: METRICS.get(name) for name in job.families}
        facts = (job.begin.context, self.source.facts.d_model, self.source.device, self.source.spliced, job.cards)
        self.maker = CandidateMaker(job.config, families, *facts)
        self._saes: dict[str, SparseCoder | None] = {}

    def measure(self, job: Job, part: HeldOutText, share_R: np.ndarray | None) -> _Measured:
        self._saes = {key: sae for key, sae in self._saes.items() if key in job.rows}
        device = self.source.device
        surveys = {at: replace(one, mean_D=one.mean_D.to(device)) for at, one in job.surveys.items()}
        candidates = []
        for key, wanted in job.rows.items():
            survey = surveys[wanted[0]]
            if key not in self._saes:
                self._saes[key] = self.maker.load(wanted, survey)
            candidates.append(self.maker.make(key, wanted, self._saes[key], survey, share_R))
        measurement = self.source.measurement(part, candidates)
        with progress("evaluate", len(part) * part.context) as bar:
            measurement.run(job.config.batch_rows, bar)
        states = {candidate.key: _packed(candidate.state()) for candidate in measurement.candidates}
        return _Measured(states, measurement.failures)


_known: list[_Worker] = []


def _both_ways(one: Sequence[str], other: Sequence[str]) -> tuple[tuple[Sequence[str], Sequence[str]], ...]:
    return (one, other), (other, one)


def _measure_rows(job: Job, part: HeldOutText, share_R: np.ndarray | None) -> _Measured | Exception:
    """Measure one block."""
    return _returned(job, lambda worker: worker.measure(job, part, share_R))


def _look_at_rows(
    job: Job, part: HeldOutText, apart: Mapping[Location, float | None]
) -> dict[Location, bytes] | Exception:
    """Look at one block."""

    def look(worker: _Worker) -> dict[Location, bytes]:
        looks = {at: Look(norm) for at, norm in apart.items()}
        look_at(worker.source.activations, part, looks, job.config.batch_rows)
        return {at: _packed(one.state()) for at, one in looks.items()}

    return _returned(job, look)


def _returned(job: Job, work: Callable[[_Worker], T]) -> T | Exception:
    """What comes of some work; a failure that another try would repeat is returned, not raised."""
    try:
        with _one_at_a_time, speaking(False), keeping_freed_memory():
            if not _known or _known[0].evaluation != job.evaluation:
                _known.clear()
                _known.append(_Worker(job))
            return work(_known[0])
    except Exception as failure:
        if is_out_of_memory(failure):
            return MemoryError(str(failure))
        if isinstance(failure, TcsaeError):
            return failure
        raise
