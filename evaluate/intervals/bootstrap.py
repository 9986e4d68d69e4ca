"""Bootstrap intervals: every average is a ratio of sums per unit of text, and units are drawn again a thousand times.

The draw is over documents, because tokens of one document are not independent; where there are fewer than thirty
documents it is over blocks of about a thousand tokens, which misses what a whole document shares, and the report says
so. The same draws serve every metric and both sides of a paired difference, so that what two SAEs share on the same
tokens cancels.

Shapes: U units, G groups (documents or units), R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..protocol import UnitSums
from ..results import Metric

RESAMPLES = 1000
MIN_DOCUMENTS = 30
MIN_GROUPS = 10  # with fewer an interval would mean nothing
LEVEL = (2.5, 97.5)


@dataclass(frozen=True)
class Resampler:
    """The draws: how often each group of units appears in each resample."""

    group_U: np.ndarray  # unit → group
    counts_RG: np.ndarray  # float64
    what: str

    @classmethod
    def of(cls, unit_documents: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Resampler:
        """Draws for text whose unit u belongs to document ``unit_documents[u]``."""
        documents, group_U = np.unique(unit_documents, return_inverse=True)
        what = f"{len(documents)} documents"
        if len(documents) < MIN_DOCUMENTS:
            group_U = np.arange(len(unit_documents))
            blocks = "1 block" if len(group_U) == 1 else f"{len(group_U)} blocks"
            what = f"{blocks} of about 1,000 tokens (fewer than {MIN_DOCUMENTS} documents)"
        n = int(group_U.max()) + 1 if len(group_U) else 0
        if n < MIN_GROUPS:
            return cls(group_U, np.zeros((0, n)), f"nothing (too little text for intervals: {what})")
        draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
        return cls(group_U, draws.astype(np.float64), what)

    def metric(self, sums: UnitSums) -> Metric:
        """The value over all units, with its interval."""
        low, high = _ends(self._resampled(sums))
        return _metric(sums, _value(sums), low, high)

    def difference(self, first: UnitSums, second: UnitSums) -> Metric:
        """First − second over the same units under the same draws."""
        a, b = _value(first), _value(second)
        low, high = _ends(self._resampled(first) - self._resampled(second))
        return _metric(first, None if a is None or b is None else a - b, low, high)

    def _resampled(self, sums: UnitSums) -> np.ndarray:
        """The metric in every resample [R]; NaN where its denominator vanishes."""
        n = self.counts_RG.shape[1]
        totals = [
            self.counts_RG @ np.bincount(self.group_U[: len(part)], weights=part, minlength=n)
            for part in (sums.numerator_U, sums.denominator_U)
        ]
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums.offset + sums.scale * totals[0] / totals[1]


def _value(sums: UnitSums) -> float | None:
    below = float(sums.denominator_U.sum())
    return None if below == 0 else sums.offset + sums.scale * float(sums.numerator_U.sum()) / below


def _ends(values_R: np.ndarray) -> tuple[float | None, float | None]:
    """The interval, or none where any resample is undefined: of the others alone it would be too narrow."""
    if not len(values_R) or not np.isfinite(values_R).all():
        return None, None
    low, high = np.percentile(values_R, LEVEL)
    return float(low), float(high)


def _metric(sums: UnitSums, value: float | None, low: float | None, high: float | None) -> Metric:
    n = round(float(sums.denominator_U.sum())) if sums.n is None else sums.n
    return Metric(value=value, unit=sums.unit, n=n, low=low, high=high, definition=sums.definition)
