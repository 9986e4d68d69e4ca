"""ReLU codes on CUDA with everything around the matrix products in two passes over them, instead of a dozen.

The forward pass makes codes of the pre-activations and all sums that the loss needs; the backward pass turns g·W_decᵀ into
∂L/∂z with sparsity and the paper's temporal term added. Both are Triton kernels (:mod:`.kernels`).

Shapes: W positions of a window, M tokens, D model width, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import DenseCodes, SparseCodes, is_dense, kernels_for, true_positions
from .objective import Objective
from .products import matmul


class FusedCodes(DenseCodes):
    """Whole matrices whose elementwise work is done by two kernels. Made by :func:`fused_codes`.

    Attributes:
        value: [M, F] the codes, in the dtype of the products' factors.
        sums: [F] Σ over tokens. changes: [F] Σ (z_t − z_{t+1})² over all pairs of neighbours in a window.

    """

    def __init__(self, z_MF: Tensor, sums_F: Tensor, counts_F: Tensor, changes_F: Tensor, w: int):
        self.shape, self.value, self._compute, self._w = z_MF.shape, z_MF, z_MF.dtype, w
        self.sums, self._counts, self.changes = sums_F, counts_F, changes_F

    def decode(self, W_FD: Tensor) -> Tensor:
        """z·W [M, D] in float32."""
        return matmul(self.value, W_FD, self._compute, torch.float32)

    def accumulate(self, values: Tensor, a_ND: Tensor) -> Tensor:
        """valuesᵀ·a [F, D] in float32."""
        return matmul(values.t(), a_ND, self._compute, torch.float32)

    def column_counts(self) -> Tensor:
        """On how many tokens each feature is active, int64 [F]."""
        return self._counts

    def slopes(
        self, to_reconstruction_MD: Tensor, W_dec: Tensor, objective: Objective, norms_F: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """∂L/∂z [M, F] and its sum over tokens [F]."""
        kernels = kernels_for(to_reconstruction_MD)
        assert kernels is not None  # noqa: S101 - for the type checker: these codes were made by the kernels
        n_tokens = self.shape[0]
        sparsity_F = torch.full_like(self.sums, objective.sparsity_weight / n_tokens)
        if norms_F is not None:
            sparsity_F *= norms_F
        to_codes = matmul(to_reconstruction_MD, W_dec.t(), self._compute, self.value.dtype)
        term = objective.temporal
        pull = term.weight / self.n_pairs if term.active and self.n_pairs else 0.0
        return kernels.backward_codes(self.value, to_codes, self._w, sparsity_F, pull, term.n_features)

    @property
    def n_pairs(self) -> int:
        """Pairs of neighbours within windows."""
        return self.shape[0] // self._w * (self._w - 1)


def can_fuse(pre_MF: Tensor, objective: Objective) -> bool:
    """Whether the kernels can run here and know the objective: no temporal term, or the paper's."""
    term = objective.temporal
    paper = term.form == "pairwise" and term.partner in ("next", "lag") and term.lag == 1
    return kernels_for(pre_MF) is not None and (not term.active or paper)


def fused_codes(
    pre_MF: Tensor, w: int, *, dense_above: float | None = None, compute_dtype: torch.dtype | None = None
) -> FusedCodes | SparseCodes:
    """ReLU of contiguous pre-activations: whole matrices, or active entries where these are few (:func:`.codes.codes_of`)."""
    kernels = kernels_for(pre_MF)
    assert kernels is not None  # noqa: S101 - callers ask can_fuse first
    z, sums, counts, changes = kernels.forward_codes(pre_MF, w, compute_dtype or pre_MF.dtype)
    if is_dense(int(counts.sum()), pre_MF, dense_above):
        return FusedCodes(z, sums, counts, changes, w)
    mask = pre_MF > 0
    return SparseCodes(pre_MF, mask, true_positions(mask), all_positive=True)
