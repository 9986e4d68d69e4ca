"""For how many tokens a feature stays active, and how long the largest jump of a feature is within a row.

Shapes: F features, N tokens, E active entries, T positions, G jackknife groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..intervals.jackknife import GROUPS
from .active_entries import ActiveEntries, Matches, PairMasks


def followed(active: ActiveEntries, found: Matches) -> tuple[Tensor, Tensor]:
    """Bool [E] twice: whether the same feature is active at the next token, and whether it was at the one before."""
    next_E = torch.zeros(len(active.token_E), dtype=torch.bool, device=active.token_E.device)
    previous_E = torch.zeros_like(next_E)
    adjacent = found.lag_M == 1
    next_E[found.earlier_M[adjacent]] = True
    previous_E[found.later_M[adjacent]] = True
    return next_E, previous_E


class RunCounts:
    """Ends of runs against chances to end, and how long the runs lasted that were seen to begin."""

    def __init__(self, n_features: int, context: int, device: torch.device):
        self.chances_GF = torch.zeros(
            GROUPS, n_features, dtype=torch.float64, device=device
        )  # active, the next token counts
        self.ends_GF = torch.zeros_like(self.chances_GF)  # … and the feature is not active there
        self.starts_GF = torch.zeros_like(self.chances_GF)  # active, and not so at the token before, which counts
        self.ended_GT = torch.zeros(GROUPS, context + 1, dtype=torch.float64, device=device)
        self.cut_GT = torch.zeros_like(
            self.ended_GT
        )  # runs cut by a row's, document's or gap's edge, by the length seen

    def update(
        self, active: ActiveEntries, masks: PairMasks, group_N: Tensor, next_E: Tensor, previous_E: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take one batch in; returns chances and ends per token [N]."""
        chance_E = masks.earlier_LN[1][active.token_E]
        end_E = chance_E & ~next_E
        start_E = masks.later_LN[1][active.token_E] & ~previous_E
        for total, flags in ((self.chances_GF, chance_E), (self.ends_GF, end_E), (self.starts_GF, start_E)):
            total += active.per_group(group_N, GROUPS, flags)
        if len(active.token_E):
            run_E = torch.cumsum(~previous_E, 0) - 1
            length_R = torch.bincount(run_E)
            seen_R = start_E[~previous_E]  # a run's first entry is the one that nothing precedes
            ended_R = end_E[~next_E]  # its last one is the one that nothing follows
            lengths = self.ended_GT.shape[1]
            place_R = group_N[active.token_E[~previous_E]] * lengths + length_R
            for total, ended in ((self.ended_GT, ended_R), (self.cut_GT, ~ended_R)):
                total += torch.bincount(place_R[seen_R & ended], minlength=total.numel()).view_as(total)
        return active.per_token(chance_E), active.per_token(end_E)


def survival(ended_T: Tensor, cut_T: Tensor) -> Tensor:
    """Kaplan–Meier estimate of P(a run lasts longer than l tokens), l = 1 … T: runs that were cut count while seen."""
    # A run that was cut after l tokens had no chance to end there: it was at risk only before.
    at_risk = (ended_T + cut_T).flip(0).cumsum(0).flip(0)[1:] - cut_T[1:]
    return torch.cumprod(torch.where(at_risk > 0, 1 - ended_T[1:] / at_risk, torch.nan), 0)


def geometric_survival(starts_F: Tensor, density_F: Tensor, context: int) -> Tensor:
    """The same if every feature fired independently from token to token: Σ starts_i p_i^l / Σ starts_i."""
    share_F = starts_F / starts_F.sum()
    return torch.stack([(share_F * density_F**length).sum() for length in range(1, context + 1)])


def smoothness(
    active: ActiveEntries, masks: PairMasks, found: Matches, next_E: Tensor, x_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """Activation smoothness of every row as Temporal SAE defines it (arXiv 2511.05541, section 4.3).

    For every feature active somewhere in the row the largest |z_t − z_t−1| / ‖x_t − x_t−1‖; then the mean over these
    features. Pairs that are not valid, and pairs of equal activations, are left out.

    Returns:
        float64 [B], NaN where no feature has a pair; and the number of features averaged over, [B].

    """
    step_N = torch.zeros(active.n_tokens, dtype=torch.float64, device=x_ND.device)
    step_N[1:] = (x_ND[1:] - x_ND[:-1]).double().norm(dim=1)  # across rows: masked out below
    token_E, size_E = active.token_E, active.value_E.abs()
    before_E = torch.zeros_like(active.value_E)
    adjacent = found.lag_M == 1
    before_E[found.later_M[adjacent]] = active.value_E[found.earlier_M[adjacent]]
    rise_E = _ratio((active.value_E - before_E).abs(), step_N[token_E], masks.later_LN[1][token_E])
    following = (token_E + 1).clamp(max=active.n_tokens - 1)
    fall_E = _ratio(size_E, step_N[following], masks.earlier_LN[1][token_E] & ~next_E)
    return _mean_of_largest(active, torch.maximum(rise_E, fall_E))


def _ratio(change: Tensor, step: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid & (step > 0), change / step, -1.0)


def _mean_of_largest(active: ActiveEntries, jump_E: Tensor) -> tuple[Tensor, Tensor]:
    """Largest jump of each (feature, row), averaged over the features of a row; −1 stands for none."""
    group = active.feature_E * active.n_rows + active.rows()
    names, index = torch.unique_consecutive(group, return_inverse=True)
    largest = torch.full((len(names),), -1.0, dtype=torch.float64, device=jump_E.device)
    largest.scatter_reduce_(0, index, jump_E, "amax")
    some = largest >= 0
    row = names[some] % active.n_rows
    total = torch.zeros(active.n_rows, dtype=torch.float64, device=jump_E.device).index_add_(0, row, largest[some])
    count = torch.bincount(row, minlength=active.n_rows)
    return total / count, count
