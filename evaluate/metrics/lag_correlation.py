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
_HELD = ("_sums_GSFL", "_first_G2F", "_second_G2F", "pairs_GL")


class LagSums:
    """The five sums of every feature and lag, per jackknife group."""

    def __init__(self, n_features: int, lags: int, device: torch.device):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(GROUPS, *shape, dtype=torch.float64, device=device)

        self.lags = lags
        self._sums_GSFL = zeros(5, n_features, lags)
        # Nearly every token begins, or ends, a pair of every lag: Σx and Σx², Σy and Σy² over these are the same for
        # all lags, and are summed once.
        self._first_G2F, self._second_G2F = zeros(2, n_features), zeros(2, n_features)
        self.pairs_GL = zeros(lags)

    def sums(self, lags: slice, features: Tensor | slice = slice(None)) -> Tensor:
        """The five sums for some lags (the first is 1, at place 0) and features: [G, 5, F, L]."""
        found_GSFL = self._sums_GSFL[:, :, features, lags].clone()
        for which, (first, second) in enumerate(((X, Y), (XX, YY))):
            found_GSFL[:, first] += self._first_G2F[:, which, features, None]
            found_GSFL[:, second] += self._second_G2F[:, which, features, None]
        return found_GSFL

    def autocorrelations(self, *, centred: bool) -> Tensor:
        """Of the whole text: [F, L], see :func:`autocorrelation`."""
        one_by_one = [slice(at, at + 1) for at in range(self.lags)]
        found = [
            autocorrelation(self.pairs_GL[:, lag].sum(0), self.sums(lag).sum(0), centred=centred) for lag in one_by_one
        ]
        return torch.cat(found, dim=1)

    def update(self, active: ActiveEntries, masks: PairMasks, found: Matches, group_N: Tensor) -> None:
        """Take one batch in. A pair belongs to the group of its first token."""
        first_LN, second_LN = masks.earlier_LN[1:], masks.later_LN[1:]
        for lag in range(1, self.lags + 1):
            self.pairs_GL[:, lag - 1] += torch.bincount(group_N[first_LN[lag - 1]], minlength=GROUPS)
        self._add_ends(active, first_LN, group_N.expand_as(first_LN), self._first_G2F, (X, XX))
        group_before_LN = torch.stack([group_N.roll(lag) for lag in range(1, self.lags + 1)])
        self._add_ends(active, second_LN, group_before_LN, self._second_G2F, (Y, YY))
        earlier, later = found.earlier_M, found.later_M
        group_M = group_N[active.token_E[earlier]]
        self._add(XY, found.lag_M, group_M, active.feature_E[earlier], active.value_E[earlier] * active.value_E[later])

    def state(self) -> State:
        """What it holds."""
        return held(self, _HELD)

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        add_held(self, later, _HELD)

    def _add_ends(
        self, active: ActiveEntries, pairs_LN: Tensor, group_LN: Tensor, of_all_G2F: Tensor, kinds: tuple[int, int]
    ) -> None:
        """Values and squares of the entries at one end of the pairs, in the group that the pair belongs to."""
        of_all_N = pairs_LN.all(0) & (group_LN == group_LN[0]).all(0)
        of_all_E = of_all_N[active.token_E]
        token_E, feature_E, value_E = (one[of_all_E] for one in (active.token_E, active.feature_E, active.value_E))
        n_features = of_all_G2F.shape[2]
        for which, weight_E in enumerate((value_E, value_E**2)):
            place_E = (group_LN[0][token_E] * 2 + which) * n_features + feature_E
            of_all_G2F.view(-1).index_add_(0, place_E, weight_E)
        token_E, feature_E, value_E = (one[~of_all_E] for one in (active.token_E, active.feature_E, active.value_E))
        for lag, (pairs_N, group_N) in enumerate(zip(pairs_LN, group_LN, strict=True), 1):
            here = pairs_N[token_E]
            group_P, feature_P, value_P = group_N[token_E[here]], feature_E[here], value_E[here]
            for kind, weight_P in zip(kinds, (value_P, value_P**2), strict=True):
                self._add(kind, lag, group_P, feature_P, weight_P)

    def _add(self, kind: int, lag: int | Tensor, group: Tensor, feature: Tensor, weight: Tensor) -> None:
        features = self._sums_GSFL.shape[2]
        place = ((group * 5 + kind) * features + feature) * self.lags + lag - 1
        self._sums_GSFL.view(-1).index_add_(0, place, weight)


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
