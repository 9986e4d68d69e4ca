"""Lag autocorrelation of every feature and the temporal variation it implies.

Shapes: F features, L lags, N tokens, G jackknife groups. For lag τ and feature i five sums over the valid pairs (x, y)
= (z_t, z_t+τ) say everything: Σxy, Σx, Σy, Σx², Σy². Memory O(F·L), whatever the length of the text (the paper's
incremental O(kT)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..intervals.jackknife import GROUPS
from ..protocol import State, add_held, held
from .active_entries import ActiveEntries, Matches, PairMasks

XY, X, Y, XX, YY = range(5)


class LagSums:
    """The five sums of every feature and lag, per jackknife group."""

    def __init__(self, n_features: int, lags: int, device: torch.device):
        self.lags = lags
        self.sums_GSFL = torch.zeros(GROUPS, 5, n_features, lags, dtype=torch.float64, device=device)
        self.pairs_GL = torch.zeros(GROUPS, lags, dtype=torch.float64, device=device)

    def update(self, active: ActiveEntries, masks: PairMasks, found: Matches, group_N: Tensor) -> None:
        """Take one batch in. A pair belongs to the group of its first token."""
        token_E, value_E = active.token_E, active.value_E
        for lag in range(1, self.lags + 1):
            self.pairs_GL[:, lag - 1] += torch.bincount(group_N[masks.earlier_LN[lag]], minlength=GROUPS)
            first = masks.earlier_LN[lag][token_E]
            self._add(X, XX, lag, group_N[token_E[first]], active.feature_E[first], value_E[first])
            second = masks.later_LN[lag][token_E]
            self._add(Y, YY, lag, group_N[token_E[second] - lag], active.feature_E[second], value_E[second])
        place = self._place(XY, found.lag_M, group_N[token_E[found.earlier_M]], active.feature_E[found.earlier_M])
        self.sums_GSFL.view(-1).index_add_(0, place, value_E[found.earlier_M] * value_E[found.later_M])

    def state(self) -> State:
        """What it holds."""
        return held(self, ("sums_GSFL", "pairs_GL"))

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        add_held(self, later, ("sums_GSFL", "pairs_GL"))

    def _add(self, plain: int, squared: int, lag: int, group: Tensor, feature: Tensor, value: Tensor) -> None:
        flat = self.sums_GSFL.view(-1)
        flat.index_add_(0, self._place(plain, lag, group, feature), value)
        flat.index_add_(0, self._place(squared, lag, group, feature), value**2)

    def _place(self, which: int, lag: int | Tensor, group: Tensor, feature: Tensor) -> Tensor:
        features = self.sums_GSFL.shape[2]
        return ((group * 5 + which) * features + feature) * self.lags + lag - 1


def autocorrelation(pairs_L: Tensor, sums_SFL: Tensor, *, centred: bool) -> Tensor:
    """Correlation of z_t and z_t+τ over the valid pairs: [F, L], NaN where a feature never varies (centred) or never
    fires.

    Centred: Pearson's, with the means and variances of the two ends of the pairs. Uncentred: Σxy / √(Σx² Σy²).
    """
    xy, x, y, xx, yy = sums_SFL
    if not centred:
        return xy / (xx * yy).sqrt()
    n = pairs_L
    # Of a constant feature only rounding is left of the variance: to divide by that is worse than to say nothing.
    variance_x, variance_y = (_variance(n, s, ss) for s, ss in ((x, xx), (y, yy)))
    return (xy / n - (x / n) * (y / n)) / (variance_x * variance_y).sqrt()


def _variance(n: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    variance = squares / n - (total / n) ** 2
    return torch.where(variance > 1e-12 * squares / n, variance, torch.nan)


def variation(sums_SFL: Tensor, gain_F: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the normalised temporal variation at lag 1, per feature [F], after an optional gain.

    Σ (z_t − z_t+1)² and ½ Σ (z_t² + z_t+1²) over the valid pairs.
    """
    xy, _, _, xx, yy = sums_SFL[:, :, 0]
    square_F = 1.0 if gain_F is None else torch.nan_to_num(gain_F.to(xy)) ** 2
    return (xx + yy - 2 * xy).clamp(min=0) * square_F, (xx + yy) / 2 * square_F
