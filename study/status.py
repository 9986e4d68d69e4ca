"""What of a study is done and what is left, read from its folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..console import format_count, format_duration
from ..errors import RunError, UsageError
from ..extract.plan import look
from ..train.run_folder.metrics_log import read_metrics
from ..train.run_folder.record import RECORD, load_run
from .plan import PlannedMember, PlannedText, StudyPlan, Training
from .state import STATE, StudyState, check_same, read_state


@dataclass(frozen=True)
class StageStatus:
    """One line."""

    stage: str
    state: str
    """done, begun, failed, or left to do."""
    progress: str
    seconds: float
    """So far."""

    @property
    def time(self) -> str:
        """In words."""
        return format_duration(self.seconds) if self.seconds else ""


@dataclass(frozen=True)
class MemberFailure:
    """An SAE without a result, and why."""

    member: str
    sentence: str


@dataclass(frozen=True)
class StudyStatus:
    """Everything that ``--status`` says."""

    fingerprint: str
    stages: tuple[StageStatus, ...]
    failures: tuple[MemberFailure, ...]
    analysed: bool

    @property
    def left(self) -> int:
        """Stages."""
        return sum(stage.state != "done" for stage in self.stages)


def study_status(plan: StudyPlan) -> StudyStatus:
    """Read the folder of a study.

    Raises:
        UsageError: it was not begun, or belongs to another file.
        RunError: what it holds is damaged.

    """
    state = read_state(plan.out)
    if state is None:
        raise UsageError(f"there is no study in {plan.out} ({STATE} is missing): run it first, or give its --out")
    check_same(state, plan.study, plan.out)
    stages = tuple(stage for text in plan.texts for stage in _of_text(text, state))
    failures = tuple(
        MemberFailure(each.key, sentence) for each in plan.members if (sentence := _failure(each)) is not None
    )
    return StudyStatus(state.fingerprint, stages, failures, state.finished)


def _of_text(text: PlannedText, state: StudyState) -> Iterator[StageStatus]:
    stored = look(text.extraction)
    rows, trained = stored.rows if stored else 0, all(state.stage(each.key).done for each in text.trainings)
    said = f"{rows:,} of {text.extraction.rows:,} rows" if rows or not trained else "its store is no longer needed"
    yield _line(f"extract {text.name}", state, said, begun=rows > 0)
    for training in text.trainings:
        yield _line(training.key, state, *_progress(training))
    if text.alone is not None:
        kept = sum(text.alone.file(each).is_file() for each in text.alone.members)
        yield _line(text.alone.key, state, f"{kept} of {len(text.alone.members)} SAEs", begun=kept > 0)
    wanted = f"{len(text.members)} SAEs on {text.evaluation.rows:,} rows"
    yield _line(f"evaluate {text.name}", state, wanted, begun=(text.report / "rows").is_dir())


def _progress(training: Training) -> tuple[str, bool]:
    """How far the training is, and whether it was begun."""
    steps = [_steps(each) for each in training.members]
    planned = training.members[0].config.run.steps
    finished = sum(done == planned for done in steps)
    under_way = max((done for done in steps if done < planned), default=0)
    said = f"{finished} of {len(steps)} SAEs"
    if under_way:
        said += f", others at step {format_count(under_way)} of {format_count(planned)}"
    return said, any(steps)


def _steps(each: PlannedMember) -> int:
    """Steps taken, as far as the run says them."""
    if not (each.folder / RECORD).is_file():
        return 0
    record = load_run(each.folder)
    if record.finished:
        return record.steps
    try:
        entries = read_metrics(each.folder)
    except RunError:
        return 0
    return int(entries[-1]["step"]) if entries else 0


def _failure(each: PlannedMember) -> str | None:
    return (load_run(each.folder).failure or None) if (each.folder / RECORD).is_file() else None


def _line(name: str, state: StudyState, progress: str, begun: bool) -> StageStatus:
    known = state.stage(name)
    what = "done" if known.done else "failed" if known.failure else "begun" if begun else "left to do"
    return StageStatus(name, what, f"{progress}: {known.failure}" if known.failure else progress, known.seconds)
