"""Are the same features found again? Decoder directions of two SAEs, trained alike with different seeds, compared.

Two numbers, as in Paulo and Belrose (arXiv 2501.16615): the mean over the features of one of the largest cosine with
any feature of the other, and the share of them that have a partner of their own at a cosine above 0.7. Partners are
matched greedily, the most alike pair first, among each feature's eight most alike: an optimal assignment (Hungarian
method) needs all F² cosines at once, 17 GB at 65,536 features, and differs only where several features share
candidates.

Shapes: F and G features of the two SAEs, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError

MATCHED = 0.7
"""Cosine above which two features are taken for the same."""
_CANDIDATES = 8
_BLOCK = 2048  # rows of cosines at once


@dataclass(frozen=True)
class Stability:
    """What two dictionaries share."""

    mean_max_cosine: float
    """Mean of every feature's largest cosine in the other dictionary, both ways, so that the order does not matter."""
    matched_share: float
    """Features with a partner of their own above :data:`MATCHED`, over those of the smaller dictionary."""


@torch.no_grad()
def stability(W_dec_A: Tensor, W_dec_B: Tensor) -> Stability:
    """Compare decoders [F, D] and [G, D] (or [F, W, D], whose rows are whole windows), in blocks of rows.

    The cosine is signed, since features are not negative. A row of zeros is like none. An untrained pair says what
    chance alone gives: at width D the largest of G random cosines is about √(2 ln G / D).

    Raises:
        UsageError: the rows of the two are of different sizes, or there are none.

    """
    a_FD, b_GD = (torch.nn.functional.normalize(W.detach().float().flatten(1), dim=1) for W in (W_dec_A, W_dec_B))
    if a_FD.shape[1] != b_GD.shape[1] or not len(a_FD) or not len(b_GD):
        raise UsageError(
            f"decoders of shape {list(W_dec_A.shape)} and {list(W_dec_B.shape)} have no directions in common: compare "
            "SAEs of one layer"
        )
    best_G = torch.full((len(b_GD),), -1.0, device=b_GD.device)
    best_F, pairs = [], []
    for start in range(0, len(a_FD), _BLOCK):
        cosine = a_FD[start : start + _BLOCK] @ b_GD.T
        best_G = torch.maximum(best_G, cosine.amax(0))
        value, other = cosine.topk(min(_CANDIDATES, len(b_GD)), dim=1)
        best_F.append(value[:, 0])
        row, column = (value > MATCHED).nonzero(as_tuple=True)
        pairs.append(torch.stack([value[row, column].double(), (row + start).double(), other[row, column].double()]))
    means = (torch.cat(best_F).double().mean(), best_G.double().mean())
    matched = _greedy(torch.cat(pairs, 1))
    return Stability(float(sum(means) / 2), matched / min(len(a_FD), len(b_GD)))


def _greedy(pairs_3P: Tensor) -> int:
    """How many pairs (cosine, first, second) are left when each feature has one partner at most."""
    order = torch.argsort(pairs_3P[0], descending=True, stable=True)
    first, second = (part[order].long().tolist() for part in pairs_3P[1:])
    taken_F: set[int] = set()
    taken_G: set[int] = set()
    for one, other in zip(first, second, strict=True):
        if one not in taken_F and other not in taken_G:
            taken_F.add(one)
            taken_G.add(other)
    return len(taken_F)
