"""Activation smoothness as Temporal SAE defines it: the largest change of a feature from token to token within a row.

Shapes: B rows, N tokens, E active entries, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .active_entries import ActiveEntries, Matches, PairMasks


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


def _mean_of_largest(active: ActiveEntries, change_E: Tensor) -> tuple[Tensor, Tensor]:
    """Largest change of each (feature, row), averaged over the features of a row; −1 stands for none."""
    group = active.feature_E * active.n_rows + active.rows()
    names, index = torch.unique_consecutive(group, return_inverse=True)
    largest = torch.full((len(names),), -1.0, dtype=torch.float64, device=change_E.device)
    largest.scatter_reduce_(0, index, change_E, "amax")
    some = largest >= 0
    row = names[some] % active.n_rows
    total = torch.zeros(active.n_rows, dtype=torch.float64, device=change_E.device).index_add_(0, row, largest[some])
    count = torch.bincount(row, minlength=active.n_rows)
    return total / count, count
