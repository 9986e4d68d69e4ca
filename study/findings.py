"""The document of a study's findings, and how it is kept: verdicts, effects, levels, curves, cost, claims, and limits.

:mod:`.analysis` makes it; the page and docs/RESULTS.md are drawn from it and from nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from ..evaluate.results import Definition, Frozen, Number
from ..system.atomic_files import write_json
from ..system.untrusted_files import read_json
from .alone import AloneCost
from .claims import ClaimRow
from .published import PublishedTable
from .state import ANALYSIS
from .statistics.decision import Decision
from .statistics.effects import ComparisonEffects
from .statistics.resampling import Estimate


class VariantRow(Frozen):
    """One variant at one place: every metric over its seeds."""

    variant: str
    label: str
    model: str
    place: str
    seeds: list[int]
    metrics: dict[str, Estimate] = Field(description="those of the outcomes and of a report's main table")
    others: dict[str, list[Number]] = Field(description="all other metrics, a value per seed")


class ReferenceRow(Frozen):
    """A reference row, or an untrained twin, at one place; of the first report there."""

    name: str
    model: str
    place: str
    metrics: dict[str, Number]


class StudyCurve(Frozen):
    """What one run logged of one quantity."""

    variant: str
    seed: int
    model: str
    place: str
    series: str
    steps: list[int]
    values: list[Number]


class VariantFacts(Frozen):
    """What the study file says of a variant."""

    name: str
    label: str
    preset: str
    train: dict[str, Any]
    members: int = Field(description="with numbers")


class CostRow(Frozen):
    """What a variant's training took, over all its seeds and places."""

    variant: str
    label: str
    microseconds_per_token: Number
    memory_bytes: Number = Field(description="the most that the process held")
    trained_together: int = Field(description="SAEs that shared that process")
    flops_per_token: Number
    parameters: Number
    alone_microseconds_per_token: Number = Field(default=None, description="trained in a process of its own")
    alone_memory_bytes: Number = Field(default=None, description="what such a training added to its process")
    alone_peak_bytes: Number = Field(default=None, description="the most that such a process held, libraries and all")


class FailedMember(Frozen):
    """A member without numbers."""

    variant: str
    seed: int
    model: str
    place: str
    message: str


class StudyText(Frozen):
    """What was evaluated on, with which model."""

    model: str
    dataset: str
    tokens: int
    documents: int
    context: int
    resampling: str


class Analysis(Frozen):
    """A study's findings."""

    schema_version: int = 1
    study: str
    question: str
    scale: str
    scales: dict[str, str] = Field(description="every scale of the file and what it is estimated to take")
    fingerprint: str = Field(description="hash of everything that was fixed before the run")
    headline: str
    decisions: list[Decision] = Field(description="one per comparison over all models, then one per model of several")
    comparisons: list[ComparisonEffects]
    claims: list[ClaimRow] = Field(default_factory=list)
    published: PublishedTable | None = None
    labels: dict[str, str]
    settings: dict[str, dict[str, str | int | float | bool | None]] = Field(
        description="of the training of each variant, by dotted name; of its first member"
    )
    about: list[VariantFacts]
    variants: list[VariantRow]
    references: list[ReferenceRow]
    curves: list[StudyCurve]
    costs: list[CostRow]
    alone: list[AloneCost] = Field(default_factory=list, description="trainings in processes of their own")
    definitions: dict[str, Definition]
    alpha: float
    resamples: int
    estimates: int = Field(description="effects that were estimated, all models and places")
    tests: int = Field(description="outcomes × comparisons that the decisions rest on")
    seeds: list[int]
    tokens: int
    steps: int
    texts: list[StudyText]
    machines: list[str]
    versions: dict[str, str]
    hours: dict[str, float] = Field(description="what took how long")
    created: str
    finished: int = Field(description="members with numbers")
    failures: list[FailedMember]
    notes: list[str]
    limits: list[str]


def write_analysis(analysis: Analysis, folder: str | Path) -> Path:
    """Write ``analysis.json`` whole or not at all; returns its path."""
    return write_json(Path(folder) / ANALYSIS, analysis.model_dump(mode="json"), indent=1, ascii_only=False)


def read_analysis(folder: str | Path) -> Analysis:
    """Read what :func:`write_analysis` wrote.

    Raises:
        RunError: there is none, or it is damaged.

    """
    file = Path(folder) / ANALYSIS
    found = read_json(
        file, missing=f"no analysis at {file}; run the study with `pipeline study`", remedy="run `pipeline study` again"
    )
    return Analysis.model_validate(found)
