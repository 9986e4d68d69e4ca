"""How alike the codes of two tokens are: neighbours in the text, tokens of different documents, the same word elsewhere.

Shapes: N tokens of a batch, M tokens of a sample, F features, D model width, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import Codes, Matches
from .sample import TokenSample


def adjacent_similarity(codes: Codes, found: Matches, first_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and Jaccard index of the codes at t and t + 1, for the tokens t where a pair begins (``first_N``, bool).

    Both float64 [pairs]; NaN where undefined: a cosine with an all-zero code, a Jaccard index of two empty sets.
    """
    adjacent = found.lag_M == 1
    earlier, later = found.earlier_M[adjacent], found.later_M[adjacent]
    dot_N, both_N = (torch.zeros(codes.n_tokens, dtype=torch.float64, device=first_N.device) for _ in range(2))
    dot_N.index_add_(0, codes.token_E[earlier], codes.value_E[earlier] * codes.value_E[later])
    both_N.index_add_(0, codes.token_E[earlier], torch.ones_like(codes.value_E[earlier]))
    square_N, count_N = codes.per_token(codes.value_E**2), codes.per_token()
    t = first_N.nonzero().squeeze(1)
    cosine = dot_N[t] / (square_N[t] * square_N[t + 1]).sqrt()
    jaccard = both_N[t] / (count_N[t] + count_N[t + 1] - both_N[t])
    return cosine, jaccard


def adjacent_cosine(x_BTD: Tensor, first_N: Tensor) -> Tensor:
    """Cosine of the vectors at t and t + 1, for the tokens t where a pair begins: float64 [pairs], NaN with a zero vector."""
    x_ND = x_BTD.reshape(len(first_N), -1)
    norm_N = x_ND.norm(dim=1).double()
    dot_N = (x_ND[1:] * x_ND[:-1]).sum(1).double()
    t = first_N.nonzero().squeeze(1)
    return dot_N[t] / (norm_N[t] * norm_N[t + 1])


def sample_similarity(sample: TokenSample) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine and Jaccard index of the codes and cosine of the centred activations for all pairs of the sample: [M, M] each."""
    z_MK, _ = sample.dense()
    active_MK = (z_MK != 0).float()
    both = active_MK @ active_MK.T
    count_M = active_MK.sum(1)
    jaccard = both / (count_M[:, None] + count_M[None] - both)
    centred_MD = sample.x_MD - sample.x_MD.mean(0)
    return _cosines(z_MK), jaccard, _cosines(centred_MD)


def _cosines(rows: Tensor) -> Tensor:
    norm = rows.norm(dim=1)
    return (rows @ rows.T) / (norm[:, None] * norm[None])


def chance(sample: TokenSample, similarity_MM: Tensor) -> tuple[float, int]:
    """Mean similarity over the sample's pairs from different documents, and their number; NaN and 0 where there are none."""
    apart = torch.triu(sample.document_M[:, None] != sample.document_M[None], diagonal=1) & torch.isfinite(similarity_MM)
    found = similarity_MM[apart].double()
    return float(found.mean()) if len(found) else float("nan"), len(found)


def same_token(sample: TokenSample, similarity_MM: Tensor, context: int) -> dict[str, tuple[float, int]]:
    """Mean similarity between two occurrences of one token in different rows, by how far apart their positions are.

    ``near``: at most an eighth of the context; ``far``: at least half of it. Every kind of token that has pairs of both sorts
    weighs the same, so that "the" does not decide alone; the count is that of token kinds.
    """
    alike = (sample.token_M[:, None] == sample.token_M[None]) & (sample.row_M[:, None] != sample.row_M[None])
    alike = torch.triu(alike, diagonal=1) & torch.isfinite(similarity_MM)
    distance = (sample.position_M[:, None] - sample.position_M[None]).abs()
    kinds, kind_M = torch.unique(sample.token_M, return_inverse=True)
    means = []
    for within in (distance <= context / 8, distance >= context / 2):
        first, second = (alike & within).nonzero(as_tuple=True)
        total, count = (torch.zeros(len(kinds), dtype=torch.float64, device=kind_M.device) for _ in range(2))
        total.index_add_(0, kind_M[first], similarity_MM[first, second].double())
        count.index_add_(0, kind_M[first], torch.ones(len(first), dtype=torch.float64, device=kind_M.device))
        means.append(total / count)
    both = torch.isfinite(means[0]) & torch.isfinite(means[1])
    n = int(both.sum())
    return {
        name: (float(mean[both].mean()) if n else float("nan"), n) for name, mean in zip(("near", "far"), means, strict=True)
    }
