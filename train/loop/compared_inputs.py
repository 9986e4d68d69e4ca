"""Who is compared with whom, seen on the inputs: a control is one only if its pairs are no neighbours.

Shapes: N windows, pairs or rows, W positions, D model width, P pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...cache.views import TokenBatch
from ..loss.terms import Pairs

Facts = dict[str, float | None]


def compared_inputs(batch: TokenBatch, x_NWD: Tensor, mean_D: Tensor, partner_NP: Tensor | None, lag: int) -> Facts:
    """Facts of the pairs of a batch.

    Args:
        batch: what is compared.
        x_NWD: its activations, on any device.
        mean_D: mean of the activations, which is taken off before cosines: it is most of any two.
        partner_NP: partners, as in :class:`~tcsae.train.loss.terms.Pairs`.
        lag: distance of the pairs where there are no partners.

    Returns:
        pairs: how many; neighbours: share of them that are at distance 1 in one row; cosine: mean over them of
        cos(x − mean, x' − mean); neighbours_cosine: the same of the true neighbours of the batch. None where undefined.

    """
    places_NW = batch.rows_N[:, None] * (1 << 32) + batch.positions_NW
    pairs = Pairs(lag, None if partner_NP is None else partner_NP.cpu())
    at_NW1 = torch.arange(places_NW.numel()).view(*places_NW.shape, 1)
    one_P, other_P = (side.squeeze(1) for side in pairs.of(at_NW1))
    places = places_NW.flatten()
    next_P = (places[one_P] - places[other_P]).abs() == 1
    follows = places_NW[:, 1:] - places_NW[:, :-1] == 1
    if batch.valid_NW is not None and batch.documents_NW is not None:
        documents_NW = batch.documents_NW
        follows &= batch.valid_NW[:, 1:] & batch.valid_NW[:, :-1] & (documents_NW[:, 1:] == documents_NW[:, :-1])
    before = at_NW1[:, :-1, 0][follows]
    centred = (x_NWD - mean_D).flatten(0, 1)
    return {
        "pairs": float(len(one_P)),
        "neighbours": float(next_P.double().mean()) if len(one_P) else None,
        "cosine": _mean_cosine(centred, one_P, other_P),
        "neighbours_cosine": _mean_cosine(centred, before, before + 1),
    }


def in_words(partner: str, facts: Facts) -> str:
    """One line of a log."""
    cosine, real = facts["cosine"], facts["neighbours_cosine"]
    if not facts["pairs"] or cosine is None:
        return f"partner {partner}: the first batch has no pairs"
    beside = "" if real is None else f" (true neighbours {real:.2f})"
    pairs = f"{facts['neighbours'] or 0:.1%} of the first batch's {facts['pairs']:.0f} pairs are true neighbours"
    return f"partner {partner}: {pairs}, mean cosine of the paired inputs {cosine:.2f}{beside}"


def _mean_cosine(x: Tensor, one_P: Tensor, other_P: Tensor) -> float | None:
    if not len(one_P):
        return None
    one_P, other_P = one_P.to(x.device), other_P.to(x.device)
    mean = float(torch.cosine_similarity(x[one_P], x[other_P], dim=-1).mean())
    return mean if math.isfinite(mean) else None  # training itself says where inputs are not finite
