"""The geometric median of a store's tokens: the point with the smallest mean distance to them.

Unlike the mean, it hardly moves if a few tokens are far away.

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
_NEAR = 1e-2  # within this share of the mean distance from a token, check whether that token is the median


def sample_tokens(store: ActivationStore, rows: int, norm_limit: float | None) -> Tensor:
    """A sample of at most 8192 counted tokens, float32 [N, D], not scaled.

    They are evenly spaced within each of 128 evenly spaced chunks.

    Args:
        store: the store to read.
        rows: number of rows used, from the beginning of the store.
        norm_limit: tokens with a larger raw norm do not count.

    Raises:
        StoreError: the store is damaged.

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
    """The point m that minimises Σ_n ‖x_n − m‖, float32 [D], by Weiszfeld's iteration, starting at the mean.

    At a token the step is that of Vardi and Zhang (PNAS 97, 2000), since Weiszfeld's iteration would stay there. The
    iteration ends when the mean of the unit vectors from m to the tokens is shorter than ``tolerance``; as the
    objective is convex, its value is then at most a relative 2 · ``tolerance`` above the minimum. It also ends at a
    token that is the exact median (where the sum of the unit vectors to all other tokens is no longer than the number
    of tokens at that point), and after 1000 steps.

    Args:
        x_ND: at least one token.
        tolerance: see above.

    """
    x_ND = x_ND.double()
    median_D = x_ND.mean(0)
    for _ in range(_MOST_STEPS):
        distance_N = torch.linalg.vector_norm(x_ND - median_D, dim=1)
        nearest = int(distance_N.argmin())
        if 0 < distance_N[nearest] < _NEAR * distance_N.mean() and _direction(x_ND, x_ND[nearest])[1] == 0:
            return x_ND[nearest].float()
        sum_D, length = _direction(x_ND, median_D)
        if length <= tolerance * len(x_ND):
            break
        # Between tokens the step is R / Σ 1/‖x − m‖, where R is the sum of unit vectors. If η tokens lie at m itself,
        # the step is multiplied by 1 − η / ‖R‖.
        apart = distance_N > 0
        median_D = median_D + sum_D * (length / sum_D.norm()) / distance_N[apart].reciprocal().sum()
    return median_D.float()


def _direction(x_ND: Tensor, at_D: Tensor) -> tuple[Tensor, Tensor]:
    """The sum R [D] of the unit vectors from ``at_D`` to the tokens, and max(0, ‖R‖ − number of tokens at ``at_D``)."""
    away_ND = x_ND - at_D
    distance_N = torch.linalg.vector_norm(away_ND, dim=1)
    apart = distance_N > 0
    sum_D = (away_ND[apart] / distance_N[apart, None]).sum(0)
    return sum_D, (sum_D.norm() - (~apart).sum()).clamp(min=0)
