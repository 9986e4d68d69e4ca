"""Stage three as a whole: SAEs in, report out.

Each model is loaded once. Rows that an earlier evaluation of the same text finished are taken from the report's folder;
what is missing is measured in as few passes over the text as memory allows, in halves where a pass does not fit; the
report is assembled from all rows and says on which machine it was made.
"""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..cache.format.manifest import Execution, TextIdentity, installed_versions
from ..console import Progress, note, progress, warn
from ..errors import ResourceError, RunError, TcsaeError, needs
from ..plugins import load_plugins
from ..sites import Location
from ..system.allocator import keeping_freed_memory
from ..system.free_memory import is_out_of_memory, peak_memory
from .assemble import compose
from .candidates import CandidateMaker, Process, ThisProcess
from .codes.beside_report import MeasuredText, ReportCodes
from .config import FIDELITY, EvaluateConfig
from .finished import Asked, Outcome
from .flat import write_tables
from .metrics.all import families, installed, memory_over_weights, probes
from .model.heldout_text import Survey
from .model.probes import ProbeContext
from .model.reference_rows import share_of
from .report.page import write_report
from .results import Failure, write_results
from .row_cache import RowCache, measuring_code, slug
from .shared_references import SharedReferences, fingerprint_of
from .sources import source_of
from .subjects import Group, Subject, gather_subjects
from .table_row import Candidate

PASS_BYTES = 4e9
"""Of SAEs that are measured at once on a CPU, with what the metrics hold of them; on a GPU a quarter of its memory."""
BROWSER_CARDS = 200
"""Cards over all SAEs of a report, at least a tenth of it each."""


def evaluate(config: EvaluateConfig) -> list[Outcome]:
    """Evaluate everything asked for: one report per language model and text.

    Raises:
        UsageError: nothing to evaluate, or a plug-in that cannot be run.
        TcsaeError: of the only thing that could be evaluated.

    """
    needs("matplotlib", extra="report", what="a report")
    asked = Asked.of(config)
    plugins = load_plugins(config.plugins)
    groups, failures = gather_subjects(config, plugins)
    for failure in failures:
        warn(f"{failure.path}: {failure.message}")
    if not groups:
        raise RunError(
            failures[0].message if len(failures) == 1 else f"none of the {len(failures)} SAEs can be evaluated"
        )
    names = _names(config, groups)
    outcomes = []
    for group, name in zip(groups, names, strict=True):
        try:
            outcomes.append(_Evaluation(config, group, name, failures, plugins, asked).run())
            failures = []  # reported
        except TcsaeError as failure:
            if len(groups) == 1:
                raise
            warn(f"{group.model.id}: {failure}")
            failures.append(Failure(path=group.model.id, message=str(failure)))
    if not outcomes:
        raise RunError(f"none of the {len(groups)} language models could be evaluated in; the messages above say why")
    if failures:
        outcomes[-1] = outcomes[-1].with_failures(failures)
    if len(outcomes) == len(groups):
        asked.remember(outcomes)
    return outcomes


def _names(config: EvaluateConfig, groups: Sequence[Group]) -> list[str]:
    """A folder name per group, different from each other."""
    names: list[str] = []
    for group in groups:
        name = config.name or slug(Path(group.model.id).name) or "report"
        while name in names:
            name += "-" + (slug(Path(group.text.dataset).name) or "2")
        names.append(name)
    return names


class _Evaluation:
    """One group on its way to a report."""

    def __init__(
        self,
        config: EvaluateConfig,
        group: Group,
        name: str,
        failures: Sequence[Failure],
        plugins: Mapping[str, str],
        asked: Asked,
    ):
        self.config, self.group, self.name, self.plugins = config, group, name, plugins
        self.asked = asked
        self.families, left_out = installed(families(plugins, config.parts))
        self.failures = list(failures)
        self.folder = Path(config.out) / name
        self.notes: list[str] = []
        for message in left_out:
            self._say(message)

    def run(self) -> Outcome:
        started = time.perf_counter()
        config, group = self.config, self.group
        self.source = source_of(config, group)
        self.asked.reads(self.source.reads())
        for sentence in self.source.about():
            self._say(sentence)
        self._drop_unfit()
        self._compare_origins()
        self.locations = sorted({subject.at for subject in group.subjects})
        text, identity = self.source.gather()
        self.text = text.spliced_in(config.splice_rows) if self.source.spliced else text
        if len(self.text) < config.rows:
            self._say(f"the text ends after {len(self.text)} rows of the {config.rows} asked for")
        if config.role is not None:
            self._say(f"only tokens in messages of the role '{config.role}' are measured")
        if config.parts:
            self._say(f"only what was asked for is measured: {', '.join(config.parts)}, and L0 and L1")
        if self.text.spliced_R is not None and config.measures(FIDELITY):
            self._say(f"CE and KL are of {config.splice_rows} of the {len(self.text)} rows")
        self.share_R = share_of(self.text, quick=config.quick)
        if config.quick and self.share_R is not None and self.source.spliced and config.measures(FIDELITY):
            rows = f"{int(self.share_R.sum())} of the {len(self.text)} rows"
            self._say(f"a first look: references are spliced into {rows}, and their losses there stand for all")
        model = self.source.facts
        splices = config.splice_rows if self.text.spliced_R is not None else 0
        seen = (model.fingerprint, model.dtype, self.text.fingerprint, config.batch_rows, splices)
        settings = (config.seed, config.quick, tuple(self.families), config.parts, measuring_code(self.plugins))
        # A folder of reports may be shared by machines whose libraries round in different ways.
        kind = (self.source.device.type, torch.backends.cpu.get_cpu_capability(), torch.__version__)
        arithmetic = (*kind, measuring_code(self.plugins, of_saes=False))
        self.shared = SharedReferences(Path(config.out), (*seen, *arithmetic), settings, quick=config.quick)
        facts = (*seen, *settings)
        self.codes = self._codes(identity, fingerprint_of(facts))
        self.rows = RowCache(
            *(self.folder, facts, self.locations, self._references(), group.subjects),
            shared=self.shared,
            codes=self.codes,
            fresh=config.fresh,
        )
        if self.rows.from_others:
            note(f"{self.rows.from_others} reference rows were measured for other reports and are taken from there")
        if self.rows.without_codes:
            many = self.rows.without_codes > 1
            rows = f"{self.rows.without_codes} rows are" if many else "1 row is"
            note(f"{rows} measured again: {'their' if many else 'its'} codes were not kept")
        if self.rows.missing:
            with within_memory(config.batch_rows):
                self._measure()
        report = compose(
            self.rows.finished,
            self.text,
            name=self.name,
            machine=describe_machine(self.source.device),
            versions=versions(),
            plugins=dict(self.plugins),
            model=model,
            identity=identity,
            seed=config.seed,
            layers=sorted({at.layer for at in self.locations}),
            failures=self.failures,
            notes=self.notes,
            seconds=round(time.perf_counter() - started, 1),
            peak_memory_bytes=peak_memory(self.source.device),
        )
        write_results(report, self.folder)
        write_tables(report, self.folder)
        return Outcome(report, self.folder, write_report(report, self.folder))

    def _say(self, message: str) -> None:
        self.notes.append(message)
        note(message)

    def _say_once(self, message: str) -> None:
        if message not in self.notes:
            self._say(message)

    def _references(self) -> tuple[str, ...]:
        """Without a splice, zero at every position is the same as zero at those that count."""
        asked = self.config.reference_rows
        return asked if self.source.spliced else tuple(name for name in asked if name != "zero_all")

    def _codes(self, identity: TextIdentity, fingerprint: str) -> ReportCodes:
        """Those that lie beside the report, or will."""
        config, source = self.config, self.source
        if config.codes:
            for subject in self.group.subjects:
                if subject.facts.source != "run":
                    self._say(f"the codes of {subject.name} are not kept: it is no run of this program")
        execution = Execution(batch_size=config.batch_rows, threads=torch.get_num_threads(), device=source.device.type)
        of_text = (self.text, identity, source.identity, fingerprint, config.seed, execution)
        measured = MeasuredText(*of_text, self.group.vectors or "", source.trained_on)
        return ReportCodes(self.folder, measured, wanted=config.codes)

    def _compare_origins(self) -> None:
        """Say where an SAE from elsewhere was made for something else."""
        for number, subject in enumerate(self.group.subjects):
            notes = self.source.differences(subject)
            for message in notes:
                warn(f"{subject.facts.path}: {message}")
            self.group.subjects[number] = replace(subject, notes=(*subject.notes, *notes))

    def _drop_unfit(self) -> None:
        """Leave out SAEs of another width or depth; fail when none is left."""
        for subject in list(self.group.subjects):
            if (message := self.source.unfit(subject)) is not None:
                warn(f"{subject.facts.path}: {message}")
                self.group.subjects.remove(subject)
                self.failures.append(Failure(path=subject.facts.path, message=message))
        if not self.group.subjects:
            raise RunError(self.failures[-1].message)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        kept = len(self.rows.finished)
        if kept:
            note(f"{kept} of {len(self.rows.wanted)} rows were measured before and are kept")
        with keeping_freed_memory(), ExitStack() as stack:
            self.process = self._process(stack)
            for message in self.source.prepare(self.text, self.locations):
                self._say(message)
            if not self.config.on_workers:
                self.source.keep_states(self.text, self.locations, self.shared.states)
            self._in_passes(self._surveys())

    def _process(self, stack: ExitStack) -> Process:
        """What shows the text to candidates: this process, or workers, which stay until ``stack`` is left."""
        config, source, text = self.config, self.source, self.text
        cards = max(BROWSER_CARDS // len(self.group.subjects), BROWSER_CARDS // 10)
        facts = (text.context, source.facts.d_model, source.device, source.spliced, cards)
        maker, share_R = CandidateMaker(config, self.families, *facts), self.share_R
        if not config.on_workers:
            return ThisProcess(source, text, maker, share_R, self.rows.wanted)
        from .distributed import Workers, workers_of

        client = stack.enter_context(workers_of(config))
        return Workers(source, text, maker, share_R, self.rows.wanted, client, self.plugins, self.locations)

    def _in_passes(self, surveys: dict[Location, Survey]) -> None:
        limit, device = PASS_BYTES, self.source.device
        if device.type == "cuda":
            limit = torch.cuda.get_device_properties(device).total_memory / 4
        over = memory_over_weights(self.families, self.text.context, self.source.facts.d_model)
        passes = deque(self.rows.passes(limit / over))
        with progress("evaluate", len(self.text) * self.text.context * len(passes)) as bar:
            while passes:
                part = passes.popleft()
                if not self._fits(part, surveys, bar):
                    release()
                    left = [key for key in part if key in self.rows.missing]
                    self._say(f"out of memory with {len(part)} rows of the table at once: going on with half as many")
                    passes.extendleft([left[len(left) // 2 :], left[: len(left) // 2]])

    def _surveys(self) -> dict[Location, Survey]:
        """What a look at the text finds at every location; each location is looked at once for all reports."""
        kept = {at: None if self.config.fresh else self.shared.survey(at) for at in self.locations}
        found = {at: one for at, one in kept.items() if one is not None}
        if missing := [at for at in self.locations if at not in found]:
            for at, one in self.process.survey(missing).items():
                self.shared.put_survey(at, one)
                found[at] = one
        device = self.source.device
        return {at: replace(one, mean_D=one.mean_D.to(device)) for at, one in found.items()}

    def _fits(self, part: list[str], surveys: dict[Location, Survey], bar: Progress) -> bool:
        """Measure these rows in one pass; false where they do not fit into memory together."""
        try:
            candidates = [one for key in part if (one := self._candidate(key, surveys)) is not None]
            with ExitStack() as stack:
                subjects = {key: what for key, (_, what) in self.rows.wanted.items() if isinstance(what, Subject)}
                self.codes.begin(subjects, candidates, self.source.activations, stack)
                failures = self.process.measure(candidates, bar)
                for failure in failures.values():
                    warn(f"{failure.path}: {failure.message}")
                self.failures += failures.values()
                self._finish([one for one in candidates if one.key not in failures])
        except Exception as failure:
            if len(part) == 1 or not is_out_of_memory(failure):
                raise
            return False
        return True

    def _candidate(self, key: str, surveys: dict[Location, Survey]) -> Candidate | None:
        """None where its SAE cannot be loaded, which is then among the failures."""
        at, what = self.rows.wanted[key]
        try:
            return self.process.candidate(key, surveys[at])
        except TcsaeError as failure:
            if not isinstance(what, Subject):
                raise
            warn(f"{what.facts.path}: {failure}")
            self.failures.append(Failure(path=what.facts.path, message=str(failure)))
            return None

    def _finish(self, candidates: list[Candidate]) -> None:
        """Complete and keep every row of a pass."""
        probed = self.source.probed(self.text)
        at = None
        for candidate in sorted(candidates, key=lambda one: one.row.location):
            if candidate.row.location != at:
                probed.forget()
            at = candidate.row.location
            per_feature = candidate.finish()
            candidate.row.documents_U = self.text.unit_documents
            if candidate.sae is not None and candidate.accumulators and not self.config.quick:
                facts = (at, self.config.seed, per_feature, candidate.survey.norm_limit)
                context = ProbeContext(probed, candidate.sae, *facts)
                candidate.row.take(probes(context, self.families))
                for family in self.families.values():
                    candidate.row.definitions |= family.definitions
                if "browser" in candidate.accumulators:
                    shown: Any = candidate.accumulators["browser"]
                    candidate.row.cards = shown.cards(context)
            self.rows.put(candidate.key, candidate.row)
        for name in sorted(probed.left_out):
            self._say_once(f"{name} is left out: it needs a language model that altered text is run in")


@contextmanager
def within_memory(batch_rows: int) -> Iterator[None]:
    """A block that measures one SAE at a time in the end: what then does not fit is a batch of ``batch_rows`` rows.

    Raises:
        ResourceError: an allocation failed inside.

    """
    try:
        yield
    except Exception as failure:
        if not is_out_of_memory(failure):
            raise
        rows = f"{batch_rows} row{'' if batch_rows == 1 else 's'}"
        remedy = (
            "give a smaller --batch-size" if batch_rows > 1 else "try another --device, or one SAE at a time with --run"
        )
        raise ResourceError(
            f"out of memory with batches of {rows}, one SAE at a time: {remedy}; rows that are finished are kept"
        ) from failure


def release() -> None:
    """Give back to the device what a failed pass held."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_machine(device: torch.device) -> dict[str, str | int | float | None]:
    """Processor, threads and device; nothing that identifies a person or a host."""
    facts: dict[str, str | int | float | None] = {
        "device": device.type,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions() -> dict[str, str]:
    """Of Python and the packages that shape the numbers."""
    return {"python": platform.python_version(), **installed_versions()}
