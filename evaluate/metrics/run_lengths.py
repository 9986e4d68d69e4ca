"""For how many tokens a feature stays active: runs, their ends, and how long they last.

Shapes: F features, N tokens, E active entries, T positions, G jackknife groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..intervals.jackknife import GROUPS
from ..protocol import State, add_held, held
from .active_entries import ActiveEntries, Matches, PairMasks

_ADDED = ("chances_GF", "ends_GF", "starts_GF", "ended_GT", "cut_GT")


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

    def state(self) -> State:
        """What it holds."""
        return held(self, _ADDED)

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        add_held(self, later, _ADDED)


def survival(ended_T: Tensor, cut_T: Tensor) -> Tensor:
    """Kaplan–Meier estimate of P(a run lasts longer than l tokens), l = 1 … T: runs that were cut count while seen."""
    # A run that was cut after l tokens had no chance to end there: it was at risk only before.
    at_risk = (ended_T + cut_T).flip(0).cumsum(0).flip(0)[1:] - cut_T[1:]
    return torch.cumprod(torch.where(at_risk > 0, 1 - ended_T[1:] / at_risk, torch.nan), 0)


def geometric_survival(starts_F: Tensor, density_F: Tensor, context: int) -> Tensor:
    """The same if every feature fired independently from token to token: Σ starts_i p_i^l / Σ starts_i."""
    share_F = starts_F / starts_F.sum()
    return torch.stack([(share_F * density_F**length).sum() for length in range(1, context + 1)])
