"""How alike the codes of two tokens are: adjacent ones, ones of different documents, the same token elsewhere.

Shapes: N tokens of a batch, M tokens of a sample, F features, D model width, P pairs, G jackknife groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..intervals.jackknife import GROUPS, Jackknifed, leave_out
from .active_entries import ActiveEntries, Matches
from .token_sample import SampledTokens


@dataclass(frozen=True)
class AdjacentPairs:
    """The codes at t and t + 1, for the tokens t where a pair begins: what every metric of pairs needs, float64 [P]."""

    dot_P: Tensor
    both_P: Tensor  # features active at both
    squares_2P: Tensor
    counts_2P: Tensor

    @classmethod
    def of(cls, active: ActiveEntries, found: Matches, first_N: Tensor) -> AdjacentPairs:
        """``first_N``: bool, where a valid pair of lag 1 begins."""
        adjacent = found.lag_M == 1
        earlier, later = found.earlier_M[adjacent], found.later_M[adjacent]
        dot_N, both_N = (torch.zeros(active.n_tokens, dtype=torch.float64, device=first_N.device) for _ in range(2))
        dot_N.index_add_(0, active.token_E[earlier], active.value_E[earlier] * active.value_E[later])
        both_N.index_add_(0, active.token_E[earlier], torch.ones_like(active.value_E[earlier]))
        square_N, count_N = active.per_token(active.value_E**2), active.per_token()
        t = first_N.nonzero().squeeze(1)
        ends_2P = torch.stack([t, t + 1])
        return cls(dot_N[t], both_N[t], square_N[ends_2P], count_N[ends_2P])

    def cosine(self) -> Tensor:
        """NaN with an all-zero code."""
        return self.dot_P / self.squares_2P.prod(0).sqrt()

    def jaccard(self) -> Tensor:
        """Of the active sets; NaN for two empty ones."""
        return self.both_P / (self.counts_2P.sum(0) - self.both_P)

    def energy(self) -> Tensor:
        """½ (‖z_t‖² + ‖z_t+1‖²)."""
        return self.squares_2P.mean(0)

    def variation(self) -> Tensor:
        """‖z_t − z_t+1‖²."""
        return (2 * self.energy() - 2 * self.dot_P).clamp(min=0)


def adjacent_cosine(x_BTD: Tensor, first_N: Tensor) -> Tensor:
    """Cosine of the vectors at t and t + 1 where a pair begins at t: float64 [P], NaN with a zero vector."""
    x_ND = x_BTD.reshape(len(first_N), -1)
    norm_N = x_ND.norm(dim=1).double()
    dot_N = (x_ND[1:] * x_ND[:-1]).sum(1).double()
    t = first_N.nonzero().squeeze(1)
    return dot_N[t] / (norm_N[t] * norm_N[t + 1])


def sample_similarity(sample: SampledTokens) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine and Jaccard index of the codes, and cosine of the centred activations, of all pairs: [M, M] each."""
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


def chance(sample: SampledTokens, similarity_MM: Tensor, *, definition: str) -> Jackknifed:
    """Mean similarity over the sample's pairs from different documents; n counts them."""
    apart = torch.triu(sample.document_M[:, None] != sample.document_M[None], diagonal=1) & torch.isfinite(
        similarity_MM
    )
    member_MG = torch.nn.functional.one_hot(sample.group_M, GROUPS).double()
    values = torch.where(apart, similarity_MM, 0.0).double()
    # On the CPU: what is left out is chosen by lists of numbers, for each of which a GPU would be waited for.
    sums_GG, counts_GG = ((member_MG.T @ part @ member_MG).cpu() for part in (values, apart.double()))

    def mean(g: int | None) -> float:
        kept = [s if g is None else s[_others(g)][:, _others(g)] for s in (sums_GG, counts_GG)]
        return float(kept[0].sum() / kept[1].sum())

    return leave_out(mean, _groups(sample), unit="1", definition=definition, n=int(counts_GG.sum()))


def _others(g: int) -> list[int]:
    return [other for other in range(GROUPS) if other != g]


def _groups(sample: SampledTokens) -> list[int]:
    return torch.unique(sample.group_M).tolist()


def same_token(
    sample: SampledTokens, similarity_MM: Tensor, context: int, *, far: str, near: str
) -> tuple[Jackknifed, Jackknifed]:
    """Mean similarity between two occurrences of one token in different rows, by how far apart their positions are.

    Far: at least half of the context; near: at most an eighth of it. Every kind of token that has pairs of both sorts
    has the same weight, so that the most frequent do not decide alone; n counts the kinds. ``far`` and ``near`` name
    the definitions.
    """
    alike = (sample.token_M[:, None] == sample.token_M[None]) & (sample.row_M[:, None] != sample.row_M[None])
    first, second = (torch.triu(alike, diagonal=1) & torch.isfinite(similarity_MM)).nonzero(as_tuple=True)
    distance = (sample.position_M[first] - sample.position_M[second]).abs()
    kinds, kind = torch.unique(sample.token_M[first], return_inverse=True)
    value = similarity_MM[first, second].double()

    def by_kind(g: int | None) -> Tensor:
        """Means [2, kinds with pairs of both sorts]: far, near."""
        kept = torch.ones_like(kind, dtype=torch.bool)
        if g is not None:
            kept = (sample.group_M[first] != g) & (sample.group_M[second] != g)
        means = []
        for within in (distance >= context / 2, distance <= context / 8):
            total, count = (torch.zeros(len(kinds), dtype=torch.float64, device=kind.device) for _ in range(2))
            mine = kept & within
            total.index_add_(0, kind[mine], value[mine])
            count.index_add_(0, kind[mine], torch.ones_like(value[mine]))
            means.append(total / count)
        return torch.stack(means)[:, torch.isfinite(means[0]) & torch.isfinite(means[1])]

    found = {g: by_kind(g) for g in (None, *_groups(sample))}
    n = found[None].shape[1]
    both = [
        leave_out(lambda g, at=at: float(found[g][at].mean()), _groups(sample), unit="1", definition=key, n=n)
        for at, key in enumerate((far, near))
    ]
    return both[0], both[1]
