"""A run whose codes are written, opened for looking at its features: survey, texts and logit effects together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from ...train.run_folder.record import RunRecord, load_run
from ..codes.beside_report import kept_beside
from ..codes.format import DEFAULT_NAME
from ..codes.store import CodeStore
from .known_labels import kept_labels
from .look import FeatureView, TokenTexts, known_effects, views
from .page_data import visible
from .survey import Survey, order_of, survey


@dataclass(frozen=True)
class CodedRun:
    """A run, its codes and what they say of every feature."""

    path: str
    record: RunRecord
    codes: CodeStore
    survey: Survey
    report: str | None = None

    @cached_property
    def text(self) -> TokenTexts:
        """Tokens as text; the tokenizer is loaded when it is first asked for."""
        return TokenTexts(self.codes)

    @cached_property
    def effects(self) -> dict[int, Any]:
        """Logit effects that are at hand, by feature."""
        return known_effects(self.codes, self.text, self.report)

    @cached_property
    def labels(self) -> dict[int, str]:
        """Labels that were asked of a language model, by feature."""
        return {feature: visible(each.label) for feature, each in kept_labels(self.codes).items()}

    def views(self, features: Sequence[int]) -> list[FeatureView]:
        """Some features with their passages.

        Raises:
            UsageError: there is no such feature.

        """
        for feature in features:
            if not 0 <= feature < self.survey.n_features:
                last = self.survey.n_features - 1
                raise UsageError(f"{self.path} has no feature {feature}: they are numbered 0 to {last}")
        found = views(self.codes, self.survey, self.text, features, self.effects)
        return [replace(view, label=self.labels.get(view.card.feature)) for view in found]

    def listed(self, name: str, n: int, *, ascending: bool = False) -> list[dict[str, Any]]:
        """The first n features by one of their numbers, with all of them; undefined ones are None."""
        numbers = self.survey.numbers()
        return [
            {"feature": int(f)}
            | {key: _number(float(values_F[f])) for key, values_F in numbers.items()}
            | {"label": self.labels.get(int(f))}
            for f in order_of(numbers, name, up=ascending)[:n]
        ]


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def codes_of(run: str, codes: str | None = None, report: str | None = None) -> CodeStore:
    """The codes of a run: those that are named, else those that the report keeps of it, else those in its folder.

    Raises:
        StoreError: there are none.
        RunError: the report is missing or damaged.

    """
    return CodeStore.open(codes or kept_beside(run, report) or Path(run) / DEFAULT_NAME)


def open_run(run: str, *, codes: str | None = None, report: str | None = None) -> CodedRun:
    """Open a run for looking at its features.

    Raises:
        RunError: no such run, or its codes are of another SAE.
        StoreError: it has no codes.

    """
    record, found = load_run(run), codes_of(run, codes, report)
    return CodedRun(run, record, found, survey(found, run), report)
