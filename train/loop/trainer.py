"""One pass: a stream of batches, the members it feeds, their logs and checkpoints.

The store is read once, and every member is given the view of it that it needs. All state that matters is in the
checkpoints; whatever else there is can be thrown away at any moment.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...cache.store import ActivationStore
from ...cache.views import TokenBatch, View
from ...console import Progress, format_count, format_duration, warn
from ...errors import UsageError
from ...progress_bar import Table
from ...system.free_memory import peak_memory
from ...system.stop_signals import stop_signals
from ..loss.partners import Batch, draw_partners, generator_of, neighbours_in_rows
from ..loss.registry import PARTNERS
from ..plan import MemberPlan, tokens_per_step, view_of
from ..run_folder.checkpoint import load_checkpoint, save_checkpoint
from ..run_folder.metrics_log import MetricsLog, read_metrics
from ..run_folder.record import RunRecord
from ..sae.protocol import RowTokens
from .alarms import MemberError, MembersFailedError, check_divergence, check_finite, check_weights, collapse
from .batches import open_batches
from .compared_inputs import Facts, compared_inputs
from .diagnostics import Metrics, diagnose
from .distributed import World
from .inputs import Inputs
from .member import Member, Update
from .memory_plan import alone, stacks
from .single import Single
from .stack import Stack
from .threshold import calibrate_thresholds
from .warm_start import begin_from_run

_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", "{:.4g}".format),
    "explained_variance": ("explained\nvariance", "{:.3f}".format),
    "l0": ("L0", "{:.4g}".format),
    "dead_share": ("dead\nshare", "{:.1%}".format),
    "temporal_share": ("temporal\nshare", "{:.1%}".format),
    "temporal_variation": ("temporal\nvariation", "{:.3f}".format),
}


def live_table(members: Mapping[str, Metrics], rate: Metrics, step: int) -> Table:
    """The table under the progress bar.

    Args:
        members: their last metrics by name, as in ``metrics.jsonl``; what is None or missing is shown as a dash.
        rate: tokens per second and seconds of waiting since the step logged before.
        step: of these metrics.

    """
    rows = [
        (name, [_cell(metrics.get(key), form) for key, (_, form) in _COLUMNS.items()])
        for name, metrics in members.items()
    ]
    speed, waited = rate.get("tokens_per_second"), rate.get("seconds_waiting")
    said = [f"step {step}"]
    said += [f"{format_count(speed)} tokens/s"] if speed is not None else []
    said += [f"{format_duration(waited)} waiting for the disk"] if waited is not None else []
    return Table([head for head, _ in _COLUMNS.values()], rows, foot=", ".join(said))


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "—" if value is None else form(value)


_EVENTS_KEPT = 256
_CLOCK_EVERY = 5  # steps between two looks at the time of the last checkpoint
_CUDA_CHECK_EVERY = 16  # looking at a loss waits for the device


@dataclass(frozen=True)
class _Seen:
    """What this process has of a view's batch."""

    batch: TokenBatch
    x_NWD: torch.Tensor  # scaled, on the device
    share: float  # of the whole batch's tokens
    rows: RowTokens | None  # which tokens count, where these are whole rows


class Pass:
    """Members that train on one stream.

    Args:
        plans: what they are; all of one stream (views may differ) and number of steps.
        store: where the windows come from.
        inputs: scale and limits.
        device: where members train.
        dtype: of their products.
        world: the processes that share every batch.

    """

    def __init__(
        self,
        plans: Sequence[MemberPlan],
        store: ActivationStore,
        inputs: Inputs,
        device: torch.device,
        dtype: torch.dtype,
        world: World,
    ):
        self.inputs, self.device, self.world = inputs, device, world
        self.config = plans[0].config
        self.members = [Member(plan, inputs.centre(plan.config.sae), device, dtype, world) for plan in plans]
        by_name = {member.plan.name: member for member in self.members}
        self.stacks: list[Stack | Single] = []
        for part in stacks(plans, device.type):
            members = [by_name[plan.name] for plan in part]
            step = alone(part[0], device.type)
            self.stacks.append(Single(members[0], step) if step else Stack(members))
        self.mean_D = inputs.mean_D.to(device)
        self.feed = open_batches(store, [plan.config.data for plan in plans], inputs, device)
        self.step, self.steps = plans[0].begun_at, self.config.run.steps
        self.ends: dict[str, dict[str, Any]] = {}
        """Of every member, by name: where training stopped, for its record."""
        self.last_metrics: dict[str, Metrics] = {}
        self._alarmed: set[str] = set()
        self._rate, self._clock = _Rate(), _Clock(device)
        self._kept, self._keeping = time.perf_counter(), 0.0  # the last checkpoint: when, and how long it took

    def restore(self, step: int) -> None:
        """Go to the checkpoint of ``step`` that every member has."""
        for member in self.members:
            state = load_checkpoint(self.folder(member), step)
            member.load_state_dict(state["member"])
            self._clock.begin_at(member, state.get("seconds", 0.0))
            self.feed.load_state_dict(json.loads(state["stream"]), view_of(member.config.data))
        self.step = step

    def go_on(self, records: Mapping[str, RunRecord]) -> None:
        """Begin where finished runs ended: with their weights, at the next batch of their stream.

        The record of an earlier version does not say which batch that is: then it is the first of the next pass over
        the store.
        """
        for member in self.members:
            record, run = records[member.plan.name], member.plan.folder.parent
            begin_from_run(member, record, run)
            view = view_of(member.config.data)
            here = self.feed.state_dict(view)
            epochs = [entry["epoch"] for entry in read_metrics(run) if entry.get("epoch") is not None]
            after = {"epoch": int(max(epochs, default=0)) + 1, "pool": 0, "batch": 0}
            self.feed.load_state_dict(record.ends.get("stream") or here | after, view)

    def cost(self, member: Member) -> dict[str, float]:
        """What the training of a member took, for its record."""
        seconds, memory = self._clock.seconds(member), peak_memory(self.device)
        return {"seconds": seconds, "peak_memory_bytes": float(memory), "members": float(len(self.members))}

    def folder(self, member: Member) -> Path:
        """Run folder of a member."""
        return member.plan.folder

    def run(self, bar: Progress, tell_pairs: Callable[[dict[str, Facts]], None] | None = None) -> None:
        """Train to the last step.

        Args:
            bar: what is advanced.
            tell_pairs: called once in a run, before its first step, with what is compared with what, by member.

        Raises:
            MembersFailedError: numbers of some members are not finite, or they diverged.
            RunError: activations of the store are not finite.
            KeyboardInterrupt: Ctrl-C, after a checkpoint.

        """
        logs = self._open_logs()
        self._rate.start(self.step, self.feed.seconds_waiting)
        self._kept = time.perf_counter()
        try:
            with interruptible() as stop:
                while self.step < self.steps:
                    self._train_batch(logs, bar, tell_pairs if self.step == 0 else None)
                    if self.world.any(stop.is_set()):
                        self.checkpoint()
                        raise KeyboardInterrupt(
                            f"Checkpoint written at step {self.step}; the same command goes on from there."
                        )
                    if self.step < self.steps and self._checkpoint_is_due():
                        self.checkpoint()
                self.ends = {member.plan.name: self._end(member) for member in self.members}
                calibrate_thresholds(self.members, self.feed, self.inputs, self.device)
                self._say_missed_targets()
        finally:
            self.feed.close()
            for log in logs.values():
                log.close()

    def _train_batch(
        self, logs: dict[str, MetricsLog], bar: Progress, tell_pairs: Callable[[dict[str, Facts]], None] | None
    ) -> None:
        seen = {view: self._own_share(view, batch) for view, batch in self.feed.next_batches().items()}
        logged = (self.step + 1) % self.config.run.log_every == 0 or self.step + 1 == self.steps
        checked = self.device.type == "cpu" or self.step % _CUDA_CHECK_EVERY == 0 or logged
        partners, failures = self._partners(seen), _Failures()
        if tell_pairs is not None and self.world.writes:
            tell_pairs(self._compared(seen, partners))
        for stack in self.stacks:
            mine = seen[view_of(stack.members[0].config.data)]
            of_members = [partners[member.plan.name] for member in stack.members]
            with self._clock.running(stack.members):
                updates = stack.train_step(mine.x_NWD, of_members, share=mine.share, rows=mine.rows)
            for member, update in zip(stack.members, updates, strict=True):
                with failures.of(member):
                    if checked:
                        check_finite(member, update, mine.batch)
                    if logged:
                        self._log(member, update, mine, logs)
        failures.tell()
        self.step += 1
        bar.advance(tokens_per_step(self.config))
        if logged:
            bar.show(live_table(self.last_metrics, self._rate.last, self.step))

    def _compared(self, seen: Mapping[View, _Seen], partners: Mapping[str, torch.Tensor | None]) -> dict[str, Facts]:
        """What each member with a temporal term compares, by name; members with the same pairs share the facts."""
        known: dict[tuple[View, str, int], Facts] = {}
        found = {}
        for member in self.members:
            term, view, name = member.objective.temporal, view_of(member.config.data), member.plan.name
            if not term.active:
                continue
            key, mine = (view, term.partner, term.lag), seen[view]
            if key not in known:
                known[key] = compared_inputs(mine.batch, mine.x_NWD, self.mean_D, partners[name], term.lag)
            found[name] = known[key]
        return found

    def _own_share(self, view: View, batch: TokenBatch) -> _Seen:
        n, processes = len(batch.x_NWD) // view.together, self.world.size
        if n < processes:
            what = f"a batch holds {n} {view.name} for {processes} processes"
            raise UsageError(f"{what}: give a larger --batch-size, or start fewer processes")
        part, rows = batch.part(self.world.share(len(batch.x_NWD), together=view.together)), None
        if part.valid_NW is not None and part.documents_NW is not None:
            rows = RowTokens.of(part.valid_NW, part.documents_NW, self.device)
        return _Seen(part, self.inputs.prepare(part.x_NWD, self.device), part.n_tokens / batch.n_tokens, rows)

    def _partners(self, seen: Mapping[View, _Seen]) -> dict[str, torch.Tensor | None]:
        """Of every member, by its name; members with one view and partners of one kind have the same ones."""
        drawn: dict[tuple[View, str], torch.Tensor | None] = {}
        of_members: dict[str, torch.Tensor | None] = {}
        for member in self.members:
            term, view = member.objective.temporal, view_of(member.config.data)
            if term.active and seen[view].rows is not None:
                batch = seen[view].batch
                assert batch.valid_NW is not None and batch.documents_NW is not None  # noqa: S101, PT018 - rows
                of_members[member.plan.name] = neighbours_in_rows(batch.valid_NW, batch.documents_NW, term.lag).to(
                    self.device
                )
                continue
            if term.active and (view, term.partner) not in drawn:
                batch, generator = seen[view].batch, generator_of(self.config.data.seed, self.step)
                starts_N, window = batch.positions_NW[:, 0], batch.positions_NW.shape[1]
                known = Batch(batch.documents_N, batch.rows_N, starts_N, window, generator, view.together)
                found = draw_partners(term.partner, known)
                drawn[view, term.partner] = None if found is None else found.to(self.device)
            of_members[member.plan.name] = drawn[view, term.partner] if term.active else None
        return of_members

    def _log(self, member: Member, update: Update, seen: _Seen, logs: dict[str, MetricsLog]) -> None:
        check_divergence(member, float(update.result.error), self.inputs.spread)
        metrics = diagnose(member, update, seen.x_NWD, self.mean_D, share=seen.share, rows=seen.rows)
        self.last_metrics[member.plan.name] = metrics
        if not self.world.writes:
            return
        step = self.step + 1
        rate = self._rate.since(step, tokens_per_step(self.config), self.feed.seconds_waiting)
        log = logs[member.plan.name]
        tokens = step * tokens_per_step(member.config)
        log.write(step, {"tokens": tokens, "epoch": self.feed.epoch, **metrics, **rate})
        message = collapse(metrics, self.steps, step)
        if message and member.plan.name not in self._alarmed:
            self._alarmed.add(member.plan.name)
            log.alarm(step, message)
            warn(f"{member.plan.name}: {message}")

    def _say_missed_targets(self) -> None:
        for member in self.members if self.world.writes else ():
            missed = None if member.target is None else member.target.missed()
            if missed:
                warn(f"{member.plan.name}: {missed}")

    def _checkpoint_is_due(self) -> bool:
        run = self.config.run
        passed = time.perf_counter() - self._kept
        # Large states take long to write: never more than a twentieth of the time.
        long_ago = 0 < run.checkpoint_minutes * 60 <= passed and passed >= 20 * self._keeping
        if self.step % run.checkpoint_every == 0:
            return True
        # Clocks differ between processes, so they ask each other, which is not for every step.
        return self.step % _CLOCK_EVERY == 0 and self.world.any(long_ago)

    def checkpoint(self) -> None:
        """Write the state of every member, all of the same step.

        Raises:
            MembersFailedError: weights that are not finite, before anything is written.

        """
        failures = _Failures()
        for member in self.members:
            with failures.of(member):
                check_weights(member)
        failures.tell()
        began = time.perf_counter()
        if self.world.writes:
            for member in self.members:
                save_checkpoint(self.folder(member), self.step, self._state(member))
        self.world.wait()
        self._kept = time.perf_counter()
        self._keeping = self._kept - began

    def _state(self, member: Member) -> dict[str, Any]:
        return {
            "member": member.state_dict(),
            "stream": json.dumps(self.feed.state_dict(view_of(member.config.data))),
            "inputs": self.inputs.state_dict(),
            "seconds": self._clock.seconds(member),
        }

    def _end(self, member: Member) -> dict[str, Any]:
        target = {} if member.target is None else {"target": member.target.state_dict()}
        return {"stream": self.feed.state_dict(view_of(member.config.data)), **target}

    def _open_logs(self) -> dict[str, MetricsLog]:
        if not self.world.writes:
            return {}
        kinds = self.config.run.log
        logs = {}
        for member in self.members:
            folder, config = self.folder(member), member.config.model_dump(mode="json")
            curves = folder.parent if member.plan.begun_at else folder
            logs[member.plan.name] = MetricsLog(folder, kinds, from_step=self.step, config=config, curves=curves)
        return logs


def siblings_wanted(plan: MemberPlan) -> int:
    """How many windows of one row and document a member's partners are best drawn from; 0 where it does not matter."""
    term = plan.config.temporal
    return 0 if term.form == "none" else PARTNERS.get(term.partner).siblings


class _Failures:
    """The members that fail in one step: all are looked at before the pass is ended."""

    def __init__(self) -> None:
        self._sentences: dict[str, str] = {}

    @contextmanager
    def of(self, member: Member) -> Iterator[None]:
        try:
            yield
        except MemberError as failure:
            self._sentences[member.plan.name] = str(failure)

    def tell(self) -> None:
        if self._sentences:
            raise MembersFailedError(self._sentences)


class _Rate:
    """Tokens per second and seconds spent waiting for the disk, between two logged steps."""

    def start(self, step: int, waited: float) -> None:
        self._now, self._step, self._waited = time.perf_counter(), step, waited
        self.last: Metrics = {}

    def since(self, step: int, tokens: int, waited: float) -> Metrics:
        if step != self._step:
            now = time.perf_counter()
            self.last = {
                "tokens_per_second": (step - self._step) * tokens / max(now - self._now, 1e-9),
                "seconds_waiting": waited - self._waited,
            }
            self._now, self._step, self._waited = now, step, waited
        return self.last


class _Clock:
    """Seconds that the steps of every member took; members that step together share them equally."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[list[str], torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, members: Sequence[Member]) -> Iterator[None]:
        names = [member.plan.name for member in members]
        if self._on_gpu:  # which works on while the next calls are made
            begins, ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begins.record()
            yield
            ends.record()
            self._events.append((names, begins, ends))
            if len(self._events) >= _EVENTS_KEPT:
                self._read_events()
            return
        began = time.perf_counter()
        yield
        self._add(names, time.perf_counter() - began)

    def _add(self, names: Sequence[str], seconds: float) -> None:
        for name in names:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds / len(names)

    def _read_events(self) -> None:
        for names, begins, ends in self._events:
            ends.synchronize()
            self._add(names, begins.elapsed_time(ends) / 1000)
        self._events.clear()

    def seconds(self, member: Member) -> float:
        self._read_events()
        return self._seconds.get(member.plan.name, 0.0)

    def begin_at(self, member: Member, seconds: float) -> None:
        self._seconds[member.plan.name] = seconds


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and SIGHUP set, instead of interrupting in the middle of a step; a second one
    interrupts at once.
    """
    event = threading.Event()

    def note_it(*_: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    with stop_signals(note_it):
        yield event
