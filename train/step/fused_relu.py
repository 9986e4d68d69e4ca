"""ReLU codes on CUDA with everything around the matrix products in two passes over them, instead of a dozen.

The forward pass makes codes of the pre-activations and all sums that the loss needs; the backward pass turns g·W_decᵀ
into ∂L/∂z with sparsity and the paper's temporal term added. Both are Triton kernels (:mod:`.triton_kernels`).

Shapes: M members, W positions of a window, R rows (M·T tokens), D model width, F features of a member, C = M·F columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..loss.objective import Objective, TemporalTerm
from .active_entries import DenseCodes, SparseCodes, columns_of, is_dense
from .matmul import kernels_for, matmul
from .top_k import true_positions


class FusedCodes(DenseCodes):
    """Whole matrices whose elementwise work is done by two kernels. Made by :func:`fused_codes`.

    Attributes:
        value: [R, F] the codes, in the dtype of the products' factors.
        sums: [C] Σ over tokens. changes: [C] Σ (z_t − z_{t+1})² over all pairs of neighbours in a window.

    """

    _out = torch.float32

    def __init__(self, z_RF: Tensor, sums_C: Tensor, counts_C: Tensor, changes_C: Tensor, w: int, n_members: int):
        self.shape, self.value, self._compute, self._w = z_RF.shape, z_RF, z_RF.dtype, w
        self.sums, self._counts, self.changes, self.n_members = sums_C, counts_C, changes_C, n_members

    def column_counts(self) -> Tensor:
        """On how many tokens each feature is active, int64 [C]."""
        return self._counts

    def slopes(
        self,
        to_reconstruction_RGD: Tensor,
        W_dec_CD: Tensor,
        objectives: Sequence[Objective],
        norms_C: Tensor | None,
        sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """∂L/∂z [R, F] and its sum over tokens [C]."""
        kernels = kernels_for(to_reconstruction_RGD)
        assert kernels is not None  # noqa: S101 - for the type checker: these codes were made by the kernels
        n_tokens = self.shape[0] // self.n_members
        sparsity_C = self._per_column([each.sparsity_weight / n_tokens for each in objectives])
        if norms_C is not None:
            sparsity_C *= norms_C
        terms = [each.temporal for each in objectives]
        pull_C = self._per_column(
            [term.weight / self.n_pairs if term.active and self.n_pairs else 0.0 for term in terms]
        )
        pull_C *= self._seen(terms)
        parts = [
            matmul(self._apart(a_RD), self._apart(W_dec_CD)[..., part, :].mT, self._compute, self.value.dtype)
            for a_RD, part in zip(to_reconstruction_RGD.unbind(1), columns_of(sizes), strict=True)
        ]
        to_codes = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).view(self.shape)
        return kernels.backward_codes(self.value, to_codes, self._w, sparsity_C, pull_C, self.n_members)

    def temporal(self, terms: Sequence[TemporalTerm]) -> Tensor:
        """The paper's term of every member [M], zero where it is not active."""
        changes_MF = (self.changes * self._seen(terms)).view(self.n_members, -1)
        return changes_MF.sum(1) / max(1, self.n_pairs)

    @property
    def n_pairs(self) -> int:
        """Pairs of neighbours within windows, of each member."""
        return self.shape[0] // self.n_members // self._w * (self._w - 1)

    def _per_column(self, per_member: Sequence[float]) -> Tensor:
        if len(set(per_member)) == 1:
            return torch.full_like(self.sums, per_member[0])
        return self.sums.new_tensor(per_member).repeat_interleave(self.shape[1], output_size=len(self.sums))

    def _seen(self, terms: Sequence[TemporalTerm]) -> Tensor | int:
        """The weight in their member's term of the features that it sees, 0 for others."""
        n_features = self.shape[1]
        if all(term.active and term.n_features >= n_features and term.feature_weights is None for term in terms):
            return 1
        number_F = torch.arange(n_features, device=self.sums.device)
        seen = [(number_F < (term.n_features if term.active else 0)).to(self.sums) for term in terms]
        weights = [term.feature_weights for term in terms]
        return torch.cat([one if a is None else one * a for one, a in zip(seen, weights, strict=True)])


def can_fuse(pre_RF: Tensor, objective: Objective) -> bool:
    """Whether the kernels can run here and know the objective: no temporal term, or the paper's."""
    term = objective.temporal
    paper = term.form == "pairwise" and term.partner in ("next", "lag") and term.lag == 1
    return kernels_for(pre_RF) is not None and (not term.active or paper)


def fused_codes(
    pre_RF: Tensor,
    w: int,
    *,
    dense_above: float | None = None,
    compute_dtype: torch.dtype | None = None,
    n_members: int = 1,
) -> FusedCodes | SparseCodes:
    """ReLU of contiguous pre-activations: whole matrices, or active entries where these are few
    (:func:`.active_entries.codes_of`).
    """
    kernels = kernels_for(pre_RF)
    assert kernels is not None  # noqa: S101 - callers ask can_fuse first
    z, sums, counts, changes = kernels.forward_codes(pre_RF, w, compute_dtype or pre_RF.dtype, n_members)
    if is_dense(int(counts.sum()), pre_RF, dense_above):
        return FusedCodes(z, sums, counts, changes, w, n_members)
    mask = pre_RF > 0
    return SparseCodes(pre_RF, mask, true_positions(mask), all_positive=True, n_members=n_members)
