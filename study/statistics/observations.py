"""What the members of a study measured: per unit of text where a metric is a ratio of sums, else a value.

Nothing is divided here, so that effects can be resampled over documents. Rows in one folder of kept rows were measured
on one text, in one model, by one code: only those are ever paired.

Shapes: U units of text (at most about a thousand tokens of one document).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from ...errors import RunError, TcsaeError
from ...evaluate.assemble import scored
from ...evaluate.intervals.jackknife import Jackknifed
from ...evaluate.protocol import UnitSums
from ...evaluate.results import EvaluationReport, Metric, Record, read_results
from ...evaluate.table_row import MeasuredRow
from ..members import StudyMember


@dataclass(frozen=True)
class Observed:
    """One metric of one SAE."""

    value: float | None
    """Over all the text; None where undefined."""
    unit: str
    numerator_U: np.ndarray | None = None
    """float64 [U], with its denominators; the metric is offset + scale · Σ numerator / Σ denominator."""
    denominator_U: np.ndarray | None = None
    offset: float = 0.0
    scale: float = 1.0
    left_out: Mapping[int, float] = field(default_factory=dict)
    """Of a jackknifed metric: what it is without each group of the text, by the group's number."""


@dataclass(frozen=True)
class ObservedText:
    """A text that rows were measured on."""

    key: str
    """Name of the folder of kept rows: its hash covers every token, the model and the code."""
    documents_U: np.ndarray
    """int64 [U]: the document of each unit."""
    n_tokens: int
    n_documents: int
    dataset: str


@dataclass(frozen=True)
class ObservedRow:
    """All metrics of one record of a report."""

    name: str
    place: str
    text: ObservedText
    metrics: dict[str, Observed]
    record: Record


class ReportReader:
    """Reads the reports of a study, each file once."""

    def __init__(self) -> None:
        self._reports: dict[Path, EvaluationReport] = {}
        self._rows: dict[Path, MeasuredRow] = {}
        self._observed: dict[tuple[Path, str, str], ObservedRow] = {}

    def report(self, folder: Path) -> EvaluationReport:
        """The report in a folder.

        Raises:
            RunError: there is none, or it is damaged.

        """
        if folder not in self._reports:
            self._reports[folder] = read_results(folder)
        return self._reports[folder]

    @property
    def reports(self) -> list[EvaluationReport]:
        """Those that were read, in that order."""
        return list(self._reports.values())

    def row(self, folder: Path, name: str, place: str) -> ObservedRow:
        """Everything that a record's row measured, its scores against the reference rows included.

        Args:
            folder: of the report.
            name: of the record.
            place: layer and site as names of stores have it.

        Raises:
            RunError: no such record, or its sums per unit of text are missing.

        """
        key = (folder, name, place)
        if key not in self._observed:
            self._observed[key] = self._read(folder, name, place)
        return self._observed[key]

    def _read(self, folder: Path, name: str, place: str) -> ObservedRow:
        report = self.report(folder)
        record = next((one for one in report.records if (one.name, one.location.short) == (name, place)), None)
        if record is None:
            raise RunError(f"the report {folder} has no row '{name}' at {place}: evaluate again")
        row = self._kept(folder, record)
        inside = str(PurePosixPath(record.kept).parent)
        others = [
            self._kept(folder, one)
            for one in report.records
            if one.kind == "reference" and one.location == record.location and one.kept.startswith(inside + "/")
        ]
        n_units = len(row.documents_U)
        metrics = {key: _of_sums(sums, n_units) for key, sums in scored(row, others).items()}
        metrics |= {key: _of_metric(one) for key, one in (record.metrics | row.metrics).items() if key not in metrics}
        text = ObservedText(
            key=PurePosixPath(inside).name,
            documents_U=row.documents_U,
            n_tokens=report.n_tokens,
            n_documents=report.n_documents,
            dataset=report.text.dataset,
        )
        return ObservedRow(name, place, text, metrics, record)

    def _kept(self, folder: Path, record: Record) -> MeasuredRow:
        path = folder / record.kept
        if path not in self._rows:
            inside = PurePosixPath(record.kept)
            plain = len(inside.parts) == 3 and inside.parts[0] == "rows" and ".." not in inside.parts
            row = MeasuredRow.load(path) if plain and path.is_file() else None
            if row is None:
                raise RunError(
                    f"the report {folder} has no sums per unit of text for '{record.name}' at "
                    f"{record.location.short}: evaluate again"
                )
            self._rows[path] = row
        return self._rows[path]


def _of_sums(sums: UnitSums, n_units: int) -> Observed:
    numerator_U, denominator_U = (
        np.concatenate([part, np.zeros(n_units - len(part))]) for part in (sums.numerator_U, sums.denominator_U)
    )  # units at the end of the text may hold nothing that counts
    total = float(denominator_U.sum())
    value = None if total == 0 else sums.offset + sums.scale * float(numerator_U.sum()) / total
    return Observed(value, sums.unit, numerator_U, denominator_U, sums.offset, sums.scale)


def _of_metric(metric: Metric) -> Observed:
    left_out: dict[int, float] = {}
    if isinstance(metric, Jackknifed) and metric.left_out:  # an undefined one has nothing there
        left_out = dict(zip(metric.groups, metric.left_out, strict=True))
    return Observed(metric.value, metric.unit, left_out=left_out)


@dataclass(frozen=True)
class MemberFailure:
    """A member without numbers, and why."""

    member: StudyMember
    message: str


Key = tuple[str, int, str, str]
"""Variant, seed, model, place."""


class Observations:
    """The members of a study that have numbers, by variant, seed and place; the others with their sentences.

    Args:
        members: all of them.

    """

    def __init__(self, members: Iterable[StudyMember]):
        self.reader = ReportReader()
        self.rows: dict[Key, ObservedRow] = {}
        self.untrained: dict[Key, ObservedRow] = {}
        self.members: dict[Key, StudyMember] = {}
        self.failures: list[MemberFailure] = []
        self._texts: dict[tuple[str, str], ObservedText] = {}
        for member in members:
            try:
                self._take(member)
            except TcsaeError as failure:
                self.failures.append(MemberFailure(member, str(failure)))

    def _take(self, member: StudyMember) -> None:
        if member.failure is not None:
            raise RunError(member.failure)
        key = (member.variant, member.seed, member.model, member.place)
        row = self.reader.row(member.report, member.row, member.place)
        first = self._texts.setdefault((member.model, member.place), row.text)
        if first.key != row.text.key or not np.array_equal(first.documents_U, row.text.documents_U):
            raise RunError(
                f"'{member.row}' at {member.place} was measured on another text or by other code than the members "
                f"before it ({row.text.key}, theirs {first.key}), so they cannot be paired: evaluate all of them again"
            )
        self.rows[key], self.members[key] = row, member
        if member.untrained is not None:
            self.untrained[key] = self.reader.row(member.report, member.untrained, member.place)

    @property
    def places(self) -> list[tuple[str, str]]:
        """(model, place) of every member with numbers, models in order of appearance, places by layer."""
        models = list(dict.fromkeys(model for model, _ in self._texts))
        return sorted(self._texts, key=lambda at: (models.index(at[0]), place_order(at[1])))

    def text(self, model: str, place: str) -> ObservedText:
        """What was evaluated there."""
        return self._texts[model, place]

    def label(self, metric: str) -> str:
        """A metric's short name: its definition's, else its name in words."""
        found = (one.definitions[metric].label for one in self.reader.reports if metric in one.definitions)
        return next(found, "") or metric.replace("_", " ")

    def seeds(self, variant: str, at: tuple[str, str]) -> list[int]:
        """The seeds of a variant that have numbers there."""
        return sorted(seed for name, seed, *where in self.rows if name == variant and tuple(where) == at)

    def observed(
        self, variant: str, seed: int, at: tuple[str, str], metric: str, *, untrained: bool = False
    ) -> Observed | None:
        """One metric; None where it was not measured or is undefined."""
        row = (self.untrained if untrained else self.rows).get((variant, seed, *at))
        found = None if row is None else row.metrics.get(metric)
        return None if found is None or found.value is None else found

    def share_a_twin(self, variant: str, other: str, seed: int, at: tuple[str, str]) -> bool:
        """Whether one record is the untrained twin of both: they have one architecture."""
        keys = [(name, seed, *at) for name in (variant, other)]
        twins = [(one.report, one.untrained) for key in keys if (one := self.members.get(key)) is not None]
        return len(twins) == 2 and twins[0] == twins[1] and twins[0][1] is not None


def place_order(place: str) -> tuple[int, str]:
    """Sorts l5 before l12, and the residual stream before other sites."""
    layer, _, site = place.removeprefix("l").partition(".")
    return (int(layer) if layer.isdigit() else 1 << 30, site)
