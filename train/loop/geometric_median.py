"""The geometric median of a store's tokens, the point of least mean distance: a centre that outlying tokens hardly
move.

Shapes: N tokens, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...cache.statistics import counted, token_norms
from ...cache.store import ActivationStore

SAMPLE_CHUNKS, SAMPLE_TOKENS = 128, 8192
_MOST_STEPS = 1000
_NEAR = 1e-2  # of the mean distance: so close to a token it is worth asking whether that token is the median


def sample_tokens(store: ActivationStore, rows: int, norm_limit: float | None) -> Tensor:
    """At most 8192 of the tokens that count, evenly spaced in each of 128 evenly spaced chunks: float32 [N, D], raw.

    Args:
        store: finished rows.
        rows: only the first so many.
        norm_limit: raw norm beyond which tokens do not count.

    Raises:
        StoreError: damage.

    """
    chunks = store.layout.chunks_for(rows)
    taken = sorted({round(at) for at in torch.linspace(0, chunks - 1, min(chunks, SAMPLE_CHUNKS)).tolist()})
    share = -(-SAMPLE_TOKENS // len(taken))
    found = []
    for chunk in taken:
        here = store.chunk_range(chunk)
        stop = min(here.stop, rows)
        x_BTD = store.read_chunks([chunk])[: stop - here.start]
        limit = math.inf if norm_limit is None else norm_limit
        mask = torch.from_numpy(counted(token_norms(x_BTD), store.flags(here.start, stop), limit))
        x_ND = x_BTD[mask]
        found.append(x_ND[torch.linspace(0, len(x_ND) - 1, min(len(x_ND), share)).round().long()].float())
    return torch.cat(found)


@torch.no_grad()
def geometric_median(x_ND: Tensor, tolerance: float = 1e-6) -> Tensor:
    """The point m that minimises Σ_n ‖x_n − m‖, float32 [D], by Weiszfeld's iteration from the mean.

    At a token the iteration is that of Vardi and Zhang (PNAS 97, 2000), which does not get stuck there. It ends when
    the mean of the unit vectors from m to the tokens is shorter than ``tolerance``; as the objective is convex, its
    value is then within 2 · ``tolerance`` of the smallest, relatively. It ends at a token whose own pull outweighs all
    others together, which is the median exactly, and after 1000 steps.

    Args:
        x_ND: at least one token.
        tolerance: see above.

    """
    x_ND = x_ND.double()
    median_D = x_ND.mean(0)
    for _ in range(_MOST_STEPS):
        distance_N = torch.linalg.vector_norm(x_ND - median_D, dim=1)
        nearest = int(distance_N.argmin())
        if 0 < distance_N[nearest] < _NEAR * distance_N.mean() and _pull(x_ND, x_ND[nearest])[1] == 0:
            return x_ND[nearest].float()
        pull_D, length = _pull(x_ND, median_D)
        if length <= tolerance * len(x_ND):
            break
        # Away from tokens a step is R / Σ 1/‖x − m‖, R the sum of unit vectors; η tokens at m itself hold it back by η
        # / ‖R‖.
        apart = distance_N > 0
        median_D = median_D + pull_D * (length / pull_D.norm()) / distance_N[apart].reciprocal().sum()
    return median_D.float()


def _pull(x_ND: Tensor, at_D: Tensor) -> tuple[Tensor, Tensor]:
    """Sum R [D] of the unit vectors from a point to the tokens elsewhere, and what is left of ‖R‖ beside the tokens
    there.
    """
    away_ND = x_ND - at_D
    distance_N = torch.linalg.vector_norm(away_ND, dim=1)
    apart = distance_N > 0
    pull_D = (away_ND[apart] / distance_N[apart, None]).sum(0)
    return pull_D, (pull_D.norm() - (~apart).sum()).clamp(min=0)
