"""A study from its file to its verdict: every stage, resumed where it stopped, then the analysis and its page.

What is finished is found again by what it is, not by what was noted: stores, runs and rows of evaluation refuse to be
taken for others. A member that fails is kept as a sentence, and the rest of the study goes on without it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache.cluster import connected
from ..console import format_duration, note, speaking, warn
from ..errors import ModelError, RunError, StoreError, TcsaeError, TextError
from ..evaluate.config import EvaluateConfig
from ..evaluate.results import EvaluationReport, read_results
from ..evaluate.row_cache import measuring_code
from ..evaluate.run import describe_machine, evaluate
from ..evaluate.subjects import untrained_name
from ..extract.model.load import check_layers, outline_model
from ..extract.run import extract
from ..plugins import load_plugins
from ..system.allocator import keeping_freed_memory
from ..system.atomic_files import plain_errors
from ..system.device import resolve_device
from ..system.stop_signals import stop_signals
from ..train.config import SAEConfig
from ..train.run import train
from ..train.run_folder.record import RECORD, SAE_WEIGHTS, load_run
from .alone import AloneCost, alone_costs, measure_alone
from .checks import check_outcomes, member_plans
from .file import StudyFile
from .members import StudyMember
from .plan import AloneStage, PlannedMember, PlannedText, StudyPlan, Training, output_folder, plan_study
from .state import ANALYSIS, PARTS, STATE, StageState, StudyState, check_free, check_same, locked, new_state, read_state

if TYPE_CHECKING:
    from .findings import Analysis

_GO_ON = "finished runs and checkpoints stay; start it again, and the same command goes on from there"
# Failures of one text or one SAE: the others go on. Of the machine (a full disk, no memory) nothing goes on.
_OF_ITS_OWN = (ModelError, TextError, StoreError, RunError)


@dataclass(frozen=True)
class StudySummary:
    """What :func:`run_study` did."""

    name: str
    scale: str
    fingerprint: str
    folder: Path
    members: int
    failures: Mapping[str, str]
    """Member → why it has no result."""
    page: Path
    documents: tuple[Path, ...]
    seconds: float
    """Of all stages, over all sittings."""
    analysis: Analysis

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the closing summary: plain values for machines, words for people."""
        facts: dict[str, Any] = {"study": self.name, "scale": self.scale, "hash": self.fingerprint}
        facts |= {"members": self.members, "failures": dict(self.failures)} if as_json else {}
        if not as_json:
            facts["SAEs"] = f"{self.members - len(self.failures)} of {self.members}"
            facts |= {f"failed: {name}": sentence for name, sentence in self.failures.items()}
            facts["time"] = format_duration(self.seconds)
        else:
            facts["seconds"] = self.seconds
        facts |= {"folder": str(self.folder), "page": str(self.page)}
        if self.documents:
            facts["documents"] = list(map(str, self.documents)) if as_json else " ".join(map(str, self.documents))
        return facts


def run_study(
    study: StudyFile,
    *,
    file: str = "",
    out: str | Path | None = None,
    device: str = "auto",
    scheduler: str | None = None,
    fresh: bool = False,
    write_docs: str | Path | None = None,
) -> StudySummary:
    """Run a study, or what is left of it.

    Args:
        study: the file, with one of its scales chosen.
        file: where it was read, for the record.
        out: its folder; ``studies/out/NAME-SCALE`` by default.
        device: for every stage.
        scheduler: address of a Dask scheduler whose workers share this machine's files.
        fresh: delete what is in the folder first.
        write_docs: document that is written from this study and all that lie finished beside it.

    Raises:
        UsageError: the folder belongs to another file, or the file asks for what cannot be.
        ResourceError: disk or memory does not suffice, or the cluster is lost.
        RunError: every member failed; the sentence of the first.
        KeyboardInterrupt: Ctrl-C; its message says how to go on.

    """
    folder = output_folder(study, out)
    plan = plan_study(study, folder.absolute() if scheduler else folder, device=device, scheduler=scheduler)
    check_free(plan.out)
    with locked(plan.out), ExitStack() as stack:
        if fresh:
            _clear(plan.out)
        state = read_state(plan.out)
        if state is None:
            state = new_state(study, file)
        check_same(state, study, plan.out)
        client = None
        if scheduler is not None:
            client = stack.enter_context(connected(scheduler, instead="leave --scheduler out", then=_GO_ON))
        here = resolve_device("cpu" if scheduler else device)
        run = _Run(plan, state.model_copy(update={"machine": describe_machine(here)}), client)
        try:
            with stop_signals():
                run.begin()
                for text in plan.texts:
                    run.text(text)
                return run.conclude(write_docs)
        except KeyboardInterrupt:
            done = sum(run.state.stage(name).done for name in plan.stages)
            stages = f"{done} of {len(plan.stages)} stages are finished in {plan.out}"
            raise KeyboardInterrupt(f"{stages}; the same command goes on from there.") from None


def _clear(folder: Path) -> None:
    """Remove what a study keeps; its state last, so that a folder that is half emptied is still known."""
    with plain_errors(f"empty {folder}"):
        for part in (*PARTS, "figures"):
            shutil.rmtree(folder / part, ignore_errors=True)
        for name in ("index.html", ANALYSIS, STATE):
            (folder / name).unlink(missing_ok=True)


class _Run:
    """A study that is running."""

    def __init__(self, plan: StudyPlan, state: StudyState, client: Any):
        self.plan, self.state, self.client = plan, state, client
        self.failures: dict[str, str] = {}

    def begin(self) -> None:
        """Look at outcomes, and at every configuration with its model's width and the text's rows; then it is begun.

        Raises:
            UsageError: a configuration that cannot be trained, or an outcome that is no metric.
            MissingPackageError: an outcome needs a package that is not installed.
            ModelError: a model has no such layer.

        """
        check_outcomes(self.plan)
        for text in self.plan.texts:
            if all(self.state.stage(training.key).done for training in text.trainings):
                continue
            try:
                outline = outline_model(text.extraction.model, elsewhere=self.client is not None)
            except ModelError:
                continue  # said in its turn, where the other texts go on
            check_layers(outline, text.extraction.layers)
            context = text.extraction.text.context
            with speaking(False):  # training says the same in its turn
                for training in text.trainings:
                    member_plans(training, outline.d_model, text.extraction.rows * context, context)
        self.state.save(self.plan.out)

    def text(self, text: PlannedText) -> None:
        """Everything that has to do with one text; a failure of its own leaves the other texts alone."""
        left = [training for training in text.trainings if not self._is_trained(training)]
        with self._failures_of(text.name, text.members):
            if left:
                self._extract(text)
            for training in text.trainings:
                with self._failures_of(training.key, training.members):
                    if training in left:
                        self._train(training)
                    for each in training.members:
                        self._note_failure(each)
            if text.alone is not None and not self._is_measured(text.alone):
                with self._failures_of(text.alone.key, ()):
                    if not left:  # the store may have been deleted since
                        self._extract(text)
                    self._measure(text.alone)
            self._evaluate(text)

    @contextmanager
    def _failures_of(self, name: str, members: Sequence[PlannedMember]) -> Iterator[None]:
        """A failure inside is that of these members."""
        try:
            yield
        except _OF_ITS_OWN as failure:
            warn(f"{name}: {failure}")
            for each in members:
                self.failures.setdefault(each.key, str(failure))

    # --- stages -------------------------------------------------------------------------------------------------------

    def _extract(self, text: PlannedText) -> None:
        with self._stage(f"extract {text.name}"):
            extract(text.extraction)

    def _is_trained(self, training: Training) -> bool:
        """Whether this study finished it and every run is still there: then the store is no longer needed."""
        if not self.state.stage(training.key).done:
            return False
        records = [each.folder / RECORD for each in training.members]
        return all(path.is_file() and _settled(path.parent) for path in records)

    def _train(self, training: Training) -> None:
        with self._stage(training.key), keeping_freed_memory():
            if self.client is not None:
                self._train_on_workers(training)
            else:
                _train_here(training, None)

    def _is_measured(self, stage: AloneStage) -> bool:
        return self.state.stage(stage.key).done and all(stage.file(each).is_file() for each in stage.members)

    def _measure(self, stage: AloneStage) -> None:
        with self._stage(stage.key):
            if self.client is not None:
                self._on_workers([(_measure_there, stage, self.state.machine)])
            else:
                measure_alone(stage, self.state.machine)

    def _train_on_workers(self, training: Training) -> None:
        """The members in as many parts as there are workers; each worker reads the store by itself."""
        assert self.client is not None  # noqa: S101 - for the type checker
        parts = min(len(self.client.nthreads()), len(training.members))
        names = [[each.name for each in training.members[part::parts]] for part in range(parts)]
        self._on_workers([(_train_there, training, part) for part in names])

    def _on_workers(self, calls: Sequence[tuple[Any, ...]]) -> None:
        futures = [self.client.submit(*call, pure=False) for call in calls]
        for failure in self.client.gather(futures):
            if failure is not None:
                raise failure

    def _note_failure(self, each: PlannedMember) -> None:
        if failure := load_run(each.folder).failure:
            self.failures[each.key] = failure

    def _evaluate(self, text: PlannedText) -> None:
        runs = tuple(str(each.folder) for each in text.members if each.key not in self.failures)
        if not runs:
            return
        config, name = replace(text.evaluation, runs=runs), f"evaluate {text.name}"
        code = _identity(config.plugins, runs, config.rows, codes=config.codes)
        known = self.state.stage(name)
        if not (known.done and known.code == code and _readable(text.report)):
            with self._stage(name) as stage:
                if self.client is not None:
                    many = len(self.client.nthreads()) > 1
                    self._on_workers([(_evaluate_there, config, self.client.scheduler.address if many else None)])
                else:
                    evaluate(config)
                # What failed is tried again by the next command.
                stage.code = "" if read_results(text.report).failures else code
        of_path = {str(each.folder): each.key for each in text.members}
        for failure in read_results(text.report).failures:
            self.failures[of_path.get(failure.path, failure.path)] = failure.message

    @contextmanager
    def _stage(self, name: str) -> Iterator[_Open]:
        """A stage; how long it took is kept also if it is stopped, and its sentence if it fails."""
        number = self.plan.stages.index(name) + 1
        note(f"{number}/{len(self.plan.stages)}  {name}")
        before, began, stage = self.state.stage(name), time.perf_counter(), _Open()
        now: dict[str, Any] = {"failure": "", "done": False, "code": ""}
        try:
            yield stage
            now |= {"done": True, "code": stage.code}
        except _OF_ITS_OWN as failure:
            now["failure"] = str(failure)
            raise
        finally:
            now["seconds"] = before.seconds + time.perf_counter() - began
            stages = self.state.stages | {name: StageState(**(before.model_dump() | now))}
            self.state = self.state.model_copy(update={"stages": stages, "finished": False})
            self.state.save(self.plan.out)

    # --- what follows from all of them --------------------------------------------------------------------------------

    def members(self) -> list[StudyMember]:
        """Every SAE of the study with its result, or the sentence of its failure."""
        found = []
        for text in self.plan.texts:
            report = read_results(text.report) if _readable(text.report) else None
            for each in text.members:
                failure = self.failures.get(each.key)
                if failure is None and (report is None or report.record(each.name, *each.at) is None):
                    failure = f"{each.folder} has no row in {text.report}"
                twin = None if report is None or failure else _untrained(each, report)
                found.append(
                    StudyMember(
                        model=text.model,
                        place=each.at.short,
                        variant=each.variant,
                        seed=each.seed,
                        row=each.name,
                        untrained=twin,
                        report=text.report,
                        run=each.folder,
                        failure=failure,
                    )
                )
        return found

    def _alone_costs(self, text: PlannedText) -> list[AloneCost]:
        stage = text.alone
        return [] if stage is None or not self._is_measured(stage) else alone_costs(stage, text.model)

    def conclude(self, write_docs: str | Path | None) -> StudySummary:
        """Analyse, write page and document.

        Raises:
            RunError: every member failed.

        """
        members, folder = self.members(), self.plan.out
        failures = {f"{each.model} {each.row}": each.failure for each in members if each.failure is not None}
        if len(failures) == len(members):
            raise RunError(f"no SAE of the study has a result: {next(iter(failures.values()))}")
        from .analysis import analyse
        from .document import write_document
        from .page import write_page

        took = {name: self.state.stage(name).seconds for name in self.plan.stages}
        alone = [one for text in self.plan.texts for one in self._alone_costs(text)]
        analysis = analyse(self.plan.study, members, took, alone)
        page = write_page(analysis, folder)
        documents = () if write_docs is None else (write_document(_beside(folder), Path(write_docs)),)
        self.state = self.state.model_copy(update={"finished": True})
        self.state.save(folder)
        return StudySummary(
            name=self.plan.study.name,
            scale=self.plan.study.scale,
            fingerprint=self.plan.study.fingerprint(),
            folder=folder,
            members=len(members),
            failures=failures,
            page=page,
            documents=documents,
            seconds=self.state.seconds,
            analysis=analysis,
        )


@dataclass
class _Open:
    """A stage that is running, and what will identify it."""

    code: str = ""


def _beside(folder: Path) -> list[Analysis]:
    """The analyses of this study and of those that lie beside it, in the order of their names."""
    from .findings import read_analysis

    return [read_analysis(path.parent) for path in sorted(folder.parent.glob(f"*/{ANALYSIS}"))]


def _settled(folder: Path) -> bool:
    try:
        record = load_run(folder)
    except RunError:
        return False  # training says what is wrong with it
    return bool(record.failure) or (record.finished and (folder / SAE_WEIGHTS).is_file())


def _readable(report: Path) -> bool:
    try:
        read_results(report)
    except RunError:
        return False
    return True


def _identity(plugins: Sequence[str], runs: Sequence[str], rows: int, *, codes: bool) -> str:
    """Of everything that a report says: what measures, and which weights are measured on how many rows."""
    digest = sha256(f"{measuring_code(load_plugins(plugins))} {rows}{' codes' if codes else ''}".encode())
    for run in runs:
        digest.update(f"{run} {load_run(run).hashes}".encode())
    return digest.hexdigest()[:16]


def _untrained(each: PlannedMember, report: EvaluationReport) -> str | None:
    """Name of the record of its untrained twin, where the report has one."""
    name = untrained_name(SAEConfig.model_validate(each.config.sae.model_dump()))
    return name if report.record(name, *each.at) is not None else None


def _train_here(training: Training, only: Sequence[str] | None) -> None:
    """All members of a store, or some of them. Those that fail have it in their records, also if all do."""
    try:
        train([each.config for each in training.members], only=only)
    except RunError:
        folders = [each.folder for each in training.members if only is None or each.name in only]
        failures = {path.name: load_run(path).failure for path in folders if (path / RECORD).is_file()}
        if len(failures) < len(folders) or not all(failures.values()):
            raise


# --- on a worker; a failure that another try would repeat is returned, not raised


def _failure_of(work: Callable[[], Any]) -> TcsaeError | None:
    try:
        work()
    except TcsaeError as failure:
        return failure
    return None


def _train_there(training: Training, only: Sequence[str]) -> TcsaeError | None:
    return _failure_of(lambda: _train_here(training, only))


def _measure_there(stage: AloneStage, machine: Mapping[str, Any]) -> TcsaeError | None:
    return _failure_of(lambda: measure_alone(stage, machine))


def _evaluate_there(config: EvaluateConfig, scheduler: str | None) -> TcsaeError | None:
    """One worker evaluates and hands rows of the text out to all, itself among them."""
    if scheduler is not None:
        from distributed import secede

        secede()  # which frees its thread for such rows
    return _failure_of(lambda: evaluate(replace(config, scheduler=scheduler)))
