"""What pruning is asked to do."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from ... import options
from ...console import parse_count
from ...errors import UsageError
from ...system.untrusted_files import seed_number
from ..metrics.position import FALSE_DISCOVERY_RATE, LOCKED
from ..metrics.redundancy import NEAR_DUPLICATE


@dataclass(frozen=True)
class PruneConfig:
    """What to eliminate, and from which run.

    Raises:
        UsageError: a threshold that cannot be.

    """

    run: str
    """Folder of a finished run."""
    out: str | None = None
    """Folder of the new run; None: the run's name with ``-pruned``."""
    store: str | None = None
    """Activation store; None: the one the run was trained on."""
    tokens: int = 200_000
    """Tokens of the store to look at."""
    min_cosine: float = NEAR_DUPLICATE
    """Decoder rows at least this alike are merged."""
    min_eta_squared: float = LOCKED
    """Features whose η² is significant and at least this are dropped."""
    false_discovery_rate: float = FALSE_DISCOVERY_RATE
    """Of the rotation test."""
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.min_cosine <= 0:
            raise UsageError(
                f"--min-cosine {self.min_cosine} would merge unlike features: use 0.9, or more than 1 to merge none"
            )
        if self.min_eta_squared <= 0:
            raise UsageError(
                f"--min-eta-squared {self.min_eta_squared} would drop every significant feature: use 0.5, say"
            )
        if self.tokens < 1:
            raise UsageError(f"--tokens {self.tokens} is no text: use 200k, say")
        if math.isnan(self.min_cosine + self.min_eta_squared) or not 0 <= self.false_discovery_rate <= 1:
            raise UsageError("thresholds are numbers, and a false discovery rate lies between 0 and 1: see --help")
        seed_number(self.seed)


class PruneOptions(TypedDict, total=False):
    """The options of ``pipeline prune`` under their names in Python; one that is None is left at its default."""

    store: str | Path | None
    tokens: int | str | None
    """Of the store to look at; ``200k``."""
    device: str | None
    min_cosine: float | None
    min_eta_squared: float | None
    false_discovery_rate: float | None
    seed: int | None
    out: str | Path | None


def prune_config(run: str | Path, **asked: Unpack[PruneOptions]) -> PruneConfig:
    """The configuration that options mean; defaults are those of the record.

    Raises:
        UsageError: no such option, or a value that cannot be.

    """
    given = options.chosen(asked, PruneOptions, "prune")
    if "tokens" in given:
        given["tokens"] = parse_count(given["tokens"])
    return PruneConfig(run=os.fspath(run), **given)
