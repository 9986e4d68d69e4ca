"""Decoder rows that repeat one another: how alike the most alike are, and which belong to one group.

Shapes: F features, D model width. Nothing here holds an F × F matrix: rows meet in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NEAR_DUPLICATE = 0.9
"""Cosine from which two decoder rows count as one direction. Random rows stay below about √(4 ln F / D): 0.24 for F =
4096 rows in D = 576 dimensions."""

COLLAPSE_SHARE = 0.1
"""Share of near-duplicates from which a dictionary counts as collapsing."""

_BLOCK = 2048


def decoder_neighbours(W_dec: Tensor, alive_F: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each feature's most similar other feature and their decoder rows' cosine, among the alive ones (all by default).

    Returns:
        int64 [F] and float32 [F]; −1 and NaN for a dead feature, a zero row, and one that has no other to meet.

    """
    size, device = len(W_dec), W_dec.device
    neighbour = torch.full((size,), -1, dtype=torch.int64, device=device)
    cosine = torch.full((size,), torch.nan, device=device)
    unit_KD, kept_K = _unit_rows(W_dec, alive_F)
    if len(kept_K) < 2:
        return neighbour, cosine
    best_K = torch.full((len(kept_K),), -2.0, device=device)
    where_K = torch.zeros(len(kept_K), dtype=torch.int64, device=device)

    def offer(start: int, value: Tensor, index: Tensor) -> None:
        mine = slice(start, start + len(value))
        better = value > best_K[mine]
        best_K[mine] = torch.where(better, value, best_K[mine])
        where_K[mine] = torch.where(better, index, where_K[mine])

    for start in range(0, len(kept_K), _BLOCK):
        for other, similar in _meetings(unit_KD[start : start + _BLOCK], unit_KD[start:]):
            if other == 0:
                similar.fill_diagonal_(-2.0)
            value, index = similar.max(dim=1)
            offer(start, value, index + start + other)
            value, index = similar.max(dim=0)  # the other half of a symmetric matrix that is computed but once
            offer(start + other, value, index + start)
    neighbour[kept_K], cosine[kept_K] = kept_K[where_K], best_K.clamp(-1, 1)
    return neighbour, cosine


def _unit_rows(W_dec: Tensor, alive_F: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unit rows of the alive, nonzero features, and which features they are."""
    norm_F = W_dec.float().norm(dim=1)
    use_F = norm_F > 0 if alive_F is None else (norm_F > 0) & alive_F.to(W_dec.device)
    kept_K = use_F.nonzero().squeeze(1)
    return W_dec.float()[kept_K] / norm_F[kept_K, None], kept_K


def _meetings(block_BD: Tensor, unit_KD: Tensor) -> Iterator[tuple[int, Tensor]]:
    for other in range(0, len(unit_KD), _BLOCK):
        yield other, block_BD @ unit_KD[other : other + _BLOCK].T


def duplicate_groups(W_dec: Tensor, energy_F: Tensor, *, min_cosine: float = NEAR_DUPLICATE) -> Tensor:
    """Which group each feature belongs to, named by the group's leader: int64 [F], itself for a feature that stands
    alone.

    Features are visited by falling energy; each joins the most similar leader whose cosine reaches ``min_cosine``, or
    becomes a leader. Every member is thus that close to its leader: chains of pairwise likeness cannot drag unlike
    features together.
    """
    leader_F = torch.arange(len(W_dec), device=W_dec.device)
    order = torch.argsort(energy_F.to(W_dec.device), descending=True, stable=True)
    unit_KD, kept_K = _unit_rows(W_dec[order], None)
    names_K = order[kept_K]
    is_leader = torch.zeros(len(names_K), dtype=torch.bool, device=W_dec.device)
    for start in range(0, len(names_K), _BLOCK):
        block = unit_KD[start : start + _BLOCK]
        best = torch.full((len(block),), -2.0, device=W_dec.device)
        name = torch.full((len(block),), -1, dtype=torch.int64, device=W_dec.device)
        for other, similar in _meetings(block, unit_KD[:start]):
            similar[:, ~is_leader[other : other + _BLOCK][: similar.shape[1]]] = -2.0
            value, index = similar.max(dim=1)
            better = value > best
            best, name = torch.where(better, value, best), torch.where(better, names_K[index + other], name)
        _settle_block(block, start, best, name, is_leader, names_K, min_cosine)
        leader_F[names_K[start : start + _BLOCK]] = name
    return leader_F


def _settle_block(block, start: int, best, name, is_leader, names_K, min_cosine: float) -> None:
    """Visit a block's rows in order: each may also join a leader found within the block. Fills ``name`` and
    ``is_leader``.
    """
    within = (block @ block.T).cpu()
    found, labels = best.tolist(), name.tolist()
    leaders: list[int] = []
    for at in range(len(block)):
        if leaders:
            likeness, nearest = within[at, leaders].max(dim=0)
            if float(likeness) > found[at]:
                found[at], labels[at] = float(likeness), int(names_K[start + leaders[int(nearest)]])
        if found[at] < min_cosine:
            labels[at] = int(names_K[start + at])
            leaders.append(at)
    name.copy_(torch.tensor(labels, device=name.device))
    is_leader[start + torch.tensor(leaders, dtype=torch.int64, device=is_leader.device)] = True
