"""From the row that is wanted to the row being measured: its SAE loaded, and everything that reads the pass for it;
and what shows it the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..console import Progress
from ..sites import Location
from ..train.sae.protocol import SparseCoder
from .codes.beside_report import KEPT
from .codes.of_pass import CodesOfPass
from .config import ACTIVATIONS, FEATURES, FIDELITY, EvaluateConfig
from .features.collect import FeatureBrowser
from .metrics.all import AllMetrics
from .metrics.by_scope import ByScope, BySummand
from .metrics.registry import MetricFamily
from .metrics.windows import WindowMetrics
from .model.heldout_text import HeldOutText, Survey, survey
from .model.reference_rows import untrained_sae
from .protocol import RawActivations
from .results import Failure
from .sources import Source
from .subjects import Subject, UntrainedTwin
from .table_row import Candidate, MeasuredRow, row_of

Wanted = tuple[Location, str | Subject | UntrainedTwin]
"""A row of the table: where, and the name of a reference, an SAE, or an architecture before its training."""


@dataclass(frozen=True)
class CandidateMaker:
    """What all candidates of an evaluation have in common."""

    config: EvaluateConfig
    families: Mapping[str, MetricFamily]
    context: int
    """Positions of a row."""
    d_model: int
    device: torch.device
    splices: bool
    """Whether there is a language model that reconstructions are spliced into."""
    cards: int
    """Features of each SAE that the report describes."""

    def load(self, wanted: Wanted, survey: Survey) -> SparseCoder | None:
        """The SAE, on the device; None of a reference without features.

        Raises:
            TcsaeError: it cannot be loaded.

        """
        what = wanted[1]
        if isinstance(what, str):
            if what != "untrained":
                return None
            sae: Any = untrained_sae(self.d_model, self.config.seed)
        else:
            sae = what.load(survey.mean_D) if isinstance(what, UntrainedTwin) else what.load()
        return sae.to(self.device, torch.float32).token_coder()

    def make(
        self, key: str, wanted: Wanted, sae: SparseCoder | None, survey: Survey, share_R: np.ndarray | None
    ) -> Candidate:
        """A candidate that has seen nothing yet.

        Args:
            key: its name in the cache of rows.
            wanted: what it is.
            sae: what :meth:`load` gave.
            survey: of its location.
            share_R: bool [R], the rows of the text that references are spliced into which only give meaning; None: all.

        """
        at, what = wanted
        if isinstance(what, Subject):
            row = row_of(what)
        else:
            name = what if isinstance(what, str) else what.name
            row = MeasuredRow(name, "reference", at.layer, site=at.site)
        scope = what.scope if isinstance(what, Subject) else 1.0
        # At a first look, of all references; zero_all must be of all rows to be compared with (metrics/saebench.py).
        only_meaning = what in (ACTIVATIONS, "untrained")
        quick = self.config.quick and not isinstance(what, Subject) and what != "zero_all"
        share_R = share_R if only_meaning or quick else None
        return Candidate(
            *(row, sae, survey, self._accumulators(row, sae, scope, survey), key),
            in_model=self.splices,
            # The activations of all rows are the ceiling of all codes; a first look has few rows anyway.
            seen_R=share_R if what == "untrained" and not self.config.quick else None,
            spliced_R=share_R,
            fidelity=self.config.measures(FIDELITY),
        )

    def _accumulators(self, row: MeasuredRow, sae: Any, scope: float, seen: Survey) -> dict[str, Any]:
        common = {"context": self.context, "seed": self.config.seed}
        if row.name == ACTIVATIONS and row.kind == "reference":
            raw = RawActivations(self.d_model, self.device)
            return {"metrics": AllMetrics(raw, self.families, **common)}
        if sae is None:
            return {}
        found: dict[str, Any] = {"metrics": AllMetrics(sae, self.families, **common)}
        inside = max(1, round(scope * sae.n_features))
        fidelity = self.config.measures(FIDELITY)
        if inside < sae.n_features:
            found["by_scope"] = ByScope(sae, self.families, **common, fidelity=fidelity, inside=inside)
        if sae.summands:
            found["by_summand"] = BySummand(sae, self.families, **common, fidelity=fidelity)
        if sae.sees == "window" and fidelity:
            found["windows"] = WindowMetrics(seen.mean_D)
        if row.kind == "sae" and not self.config.quick and self.config.measures(FEATURES):
            found["browser"] = FeatureBrowser(sae, seed=self.config.seed, n_cards=self.cards)
        if self.config.codes and row.kind == "sae" and row.facts is not None and row.facts.source == "run":
            found[KEPT] = CodesOfPass()
        return found


class Process(Protocol):
    """What shows a text to candidates: this process, or workers."""

    def candidate(self, key: str, survey: Survey) -> Candidate:
        """The candidate of a row that is wanted, its SAE loaded.

        Raises:
            TcsaeError: it cannot be loaded.

        """
        ...

    def survey(self, locations: Sequence[Location]) -> dict[Location, Survey]:
        """What a look at the text finds at each."""
        ...

    def measure(self, candidates: list[Candidate], bar: Progress) -> dict[str, Failure]:
        """Show them the whole text; returns why some were left out, by key."""
        ...


@dataclass(frozen=True)
class ThisProcess:
    """One pass after the other, here."""

    source: Source
    text: HeldOutText
    maker: CandidateMaker
    share_R: np.ndarray | None
    """bool [R], the rows that references see which only give meaning; None: all."""
    wanted: Mapping[str, Wanted]

    def candidate(self, key: str, survey: Survey) -> Candidate:
        """As of any process."""
        wanted = self.wanted[key]
        return self.maker.make(key, wanted, self.maker.load(wanted, survey), survey, self.share_R)

    def survey(self, locations: Sequence[Location]) -> dict[Location, Survey]:
        """As of any process."""
        return survey(self.source.untouched(self.text), self.text, locations, self.maker.config.batch_rows)

    def measure(self, candidates: list[Candidate], bar: Progress) -> dict[str, Failure]:
        """As of any process."""
        measurement = self.source.measurement(self.text, list(candidates))
        measurement.run(self.maker.config.batch_rows, bar)
        return measurement.failures
