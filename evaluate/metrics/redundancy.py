"""Decoder rows that repeat one another: how alike the most alike are, and which belong to one group.

Shapes: F features, K features compared, D model width, B rows of a block. Nothing here holds an F × F matrix: cosines
are computed block by block. Their number grows with the square of the width; from some width on a random sample of the
features is compared with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...system.dense_product import linear
from ...train.sae.protocol import SparseCoder
from ..protocol import Findings, State, TokenBatch, held, plain_metric
from ..results import NO_INTERVAL, Definition
from .active_entries import ActiveEntries
from .registry import metric

NEAR_DUPLICATE = 0.9
"""Cosine from which two decoder rows count as one direction. Random rows stay below about √(4 ln F / D): 0.24 for F =
4096 rows in D = 576 dimensions."""

COLLAPSE_SHARE = 0.1
"""Share of near-duplicates from which a dictionary counts as collapsing."""

BLOCK = 2048
"""Decoder rows of a block of cosines."""


EXACT_UP_TO = 131_072
"""Alive features up to which all are compared with all: 2 · 10¹³ multiplications in D = 2304 dimensions."""

SAMPLE = 16_384
"""How many of more features are compared with all. A share of 1 % is then known to ± 0.15 % (95 %)."""

_OF_WEIGHTS = f"{NO_INTERVAL} a property of the weights, whatever the text"

_SAMPLED = f"Of more than {EXACT_UP_TO:,} alive features {SAMPLE:,}, drawn at random, are compared with all; n says so"

DEFINITIONS = {
    "near_duplicate_share": Definition(
        text=f"share of alive features whose decoder row has a cosine ≥ {NEAR_DUPLICATE} with that of another alive "
        "feature. " + _SAMPLED,
        unit="share",
        better="lower",
        label="near-duplicates",
        group="features",
        interval=_OF_WEIGHTS,
    ),
    "neighbour_cosine": Definition(
        text="mean over alive features of the largest cosine between the decoder row and another alive feature's. "
        + _SAMPLED,
        unit="1",
        better="lower",
        interval=_OF_WEIGHTS,
    ),
}


@metric("redundancy")
class Redundancy:
    """How alike the decoder rows of the features are that fire on the text."""

    definitions = DEFINITIONS
    by_part = ("near_duplicate_share",)

    def __init__(self, sae: SparseCoder, *, context: int, seed: int):  # noqa: ARG002 - every accumulator is made alike
        self._seed = seed
        self._W_dec = sae.W_dec.detach()
        self._alive_F = torch.zeros(sae.n_features, dtype=torch.bool, device=sae.W_dec.device)

    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:  # noqa: ARG002
        """Take one batch in."""
        self._alive_F |= active.per_feature() > 0

    def state(self) -> State:
        """What it holds."""
        return held(self, ("_alive_F",))

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        self._alive_F |= torch.from_numpy(later["_alive_F"]).to(self._alive_F.device)

    def result(self) -> Findings:
        """Shares over alive features; per feature its most similar other feature and the cosine."""
        alive = self._alive_F.nonzero().squeeze(1)
        if len(alive) <= EXACT_UP_TO:
            neighbour_F, cosine_F = decoder_neighbours(self._W_dec, alive_F=self._alive_F)
        else:
            drawn = torch.randperm(len(alive), generator=torch.Generator().manual_seed(self._seed))[:SAMPLE]
            neighbour_F, cosine_F = neighbours_of(alive[drawn.to(alive.device)], self._W_dec, self._alive_F)
        found = cosine_F[torch.isfinite(cosine_F)]
        share = float((found >= NEAR_DUPLICATE).double().mean()) if len(found) else None
        mean = float(found.mean()) if len(found) else None
        collapsing = (
            f"{share or 0:.1%} of the alive features nearly repeat another's decoder row: the dictionary collapses"
        )
        return Findings(
            metrics={
                "near_duplicate_share": plain_metric(DEFINITIONS, "near_duplicate_share", share, len(found)),
                "neighbour_cosine": plain_metric(DEFINITIONS, "neighbour_cosine", mean, len(found)),
            },
            per_feature={"neighbour": neighbour_F.cpu().numpy(), "neighbour_cosine": cosine_F.cpu().numpy()},
            notes=[collapsing] if share is not None and share > COLLAPSE_SHARE else [],
        )


def decoder_neighbours(W_dec: Tensor, alive_F: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each feature's most similar other feature and their decoder rows' cosine, among the alive ones (all by default).

    Returns:
        int64 [F] and float32 [F]; −1 and NaN for a dead feature, a zero row, and one that is alone.

    """
    device = W_dec.device
    neighbour, cosine = _nothing_found(W_dec)
    unit_KD, kept_K = _unit_rows(W_dec, alive_F)
    if len(kept_K) < 2:
        return neighbour, cosine
    best_K = torch.full((len(kept_K),), -2.0, device=device)
    block_K = torch.zeros(len(kept_K), dtype=torch.int64, device=device)

    def update(mine: int, value: Tensor, other: int) -> None:
        rows = slice(mine, mine + len(value))
        block_K[rows].masked_fill_(value > best_K[rows], other)
        torch.maximum(best_K[rows], value, out=best_K[rows])

    for start in range(0, len(kept_K), BLOCK):
        for other, similar in _cosines_by_block(unit_KD[start : start + BLOCK], unit_KD[start:]):
            if other == 0:
                similar.fill_diagonal_(-2.0)
            update(start, similar.amax(dim=1), start + other)
            update(start + other, similar.amax(dim=0), start)  # the other half of a symmetric matrix
    # Which row it is: a place costs several times as much as a maximum, so it is looked for in one block alone.
    where_K = torch.zeros_like(block_K)
    for first in range(0, len(kept_K), BLOCK):
        for mine in (block_K == first).nonzero().squeeze(1).split(BLOCK):
            similar = linear(unit_KD[mine], unit_KD[first : first + BLOCK])
            itself = ((mine >= first) & (mine < first + BLOCK)).nonzero().squeeze(1)
            similar[itself, mine[itself] - first] = -2.0
            where_K[mine] = similar.argmax(dim=1) + first
    neighbour[kept_K], cosine[kept_K] = kept_K[where_K], best_K.clamp(-1, 1)
    return neighbour, cosine


def neighbours_of(chosen_S: Tensor, W_dec: Tensor, alive_F: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same as :func:`decoder_neighbours`, for these features only: the others have −1 and NaN."""
    neighbour, cosine = _nothing_found(W_dec)
    unit_KD, kept_K = _unit_rows(W_dec, alive_F)
    place_F = torch.full((len(W_dec),), -1, dtype=torch.int64, device=W_dec.device)
    place_F[kept_K] = torch.arange(len(kept_K), device=W_dec.device)
    places_S = place_F[chosen_S]
    if len(kept_K) < 2:
        return neighbour, cosine
    for mine_B in places_S[places_S >= 0].split(BLOCK):
        best_B = torch.full((len(mine_B),), -2.0, device=W_dec.device)
        where_B = torch.zeros_like(mine_B)
        for other, similar in _cosines_by_block(unit_KD[mine_B], unit_KD):
            at_B = (mine_B - other).clamp(0, similar.shape[1] - 1)
            itself = mine_B - other == at_B
            similar[itself.nonzero().squeeze(1), at_B[itself]] = -2.0
            value, index = similar.max(dim=1)
            where_B = torch.where(value > best_B, index + other, where_B)
            best_B = torch.maximum(value, best_B)
        neighbour[kept_K[mine_B]], cosine[kept_K[mine_B]] = kept_K[where_B], best_B.clamp(-1, 1)
    return neighbour, cosine


def _nothing_found(W_dec: Tensor) -> tuple[Tensor, Tensor]:
    neighbour = torch.full((len(W_dec),), -1, dtype=torch.int64, device=W_dec.device)
    return neighbour, torch.full((len(W_dec),), torch.nan, device=W_dec.device)


def _unit_rows(W_dec: Tensor, alive_F: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unit rows of the alive, nonzero features, and which features they are."""
    norm_F = W_dec.float().norm(dim=1)
    use_F = norm_F > 0 if alive_F is None else (norm_F > 0) & alive_F.to(W_dec.device)
    kept_K = use_F.nonzero().squeeze(1)
    return W_dec.float()[kept_K] / norm_F[kept_K, None], kept_K


def _cosines_by_block(block_BD: Tensor, unit_KD: Tensor) -> Iterator[tuple[int, Tensor]]:
    for other in range(0, len(unit_KD), BLOCK):
        yield other, linear(block_BD, unit_KD[other : other + BLOCK])


def duplicate_groups(W_dec: Tensor, energy_F: Tensor, *, min_cosine: float = NEAR_DUPLICATE) -> Tensor:
    """Which group each feature belongs to, named by the group's leader: int64 [F], itself for a feature that stands
    alone.

    Features are visited by falling energy; each joins the most similar leader whose cosine reaches ``min_cosine``, or
    becomes a leader. Every member is thus that close to its leader: features that are not alike cannot join one group
    through others between them.
    """
    leader_F = torch.arange(len(W_dec), device=W_dec.device)
    order = torch.argsort(energy_F.to(W_dec.device), descending=True, stable=True)
    unit_KD, kept_K = _unit_rows(W_dec[order], None)
    names_K = order[kept_K]
    is_leader = torch.zeros(len(names_K), dtype=torch.bool, device=W_dec.device)
    for start in range(0, len(names_K), BLOCK):
        block = unit_KD[start : start + BLOCK]
        best = torch.full((len(block),), -2.0, device=W_dec.device)
        name = torch.full((len(block),), -1, dtype=torch.int64, device=W_dec.device)
        for other, similar in _cosines_by_block(block, unit_KD[:start]):
            similar[:, ~is_leader[other : other + BLOCK][: similar.shape[1]]] = -2.0
            value, index = similar.max(dim=1)
            better = value > best
            best, name = torch.where(better, value, best), torch.where(better, names_K[index + other], name)
        _visit_block(block, start, best, name, is_leader, names_K, min_cosine)
        leader_F[names_K[start : start + BLOCK]] = name
    return leader_F


def _visit_block(block, start: int, best, name, is_leader, names_K, min_cosine: float) -> None:
    """Visit a block's rows in order, leaders of the block included; fills ``name`` and ``is_leader``."""
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
