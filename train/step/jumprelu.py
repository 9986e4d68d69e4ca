"""Codes of jumprelu, and what its thresholds learn from them.

The step of z = pre · (pre > θ) has no derivative; with the rectangle of width ε in its place (arXiv 2407.14435, eq 11
and 12)

    ∂L/∂θ = −(1/ε) Σ_n [|pre − θ| < ε/2] (θ ∂L/∂z + λ1/N)

so that an entry less than ε/2 below its threshold, though zero, has a say in it. These codes therefore hold the entries
above θ − ε/2, and tell apart which of them are active, above θ. Everything else is as for the other activations
(:mod:`.active_entries`).

Shapes: M members, R rows (tokens of one member after another), F features, C = M·F columns, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .active_entries import DenseCodes, SparseCodes, is_dense
from .top_k import count_true, true_positions


class SparseJumpReLU(SparseCodes):
    """On entries.

    Args:
        pre_RF: pre-activations.
        active_RF: which of them are above their threshold.
        flat_E: positions of those above θ − ε/2, ascending.
        n_members: M.

    Attributes:
        raw: [E] the pre-activations at the entries. active: [E] which of these are active; elsewhere ``value`` is zero.

    """

    def __init__(self, pre_RF: Tensor, active_RF: Tensor, flat_E: Tensor, n_members: int):
        super().__init__(pre_RF, active_RF, flat_E, all_positive=False, n_members=n_members)
        self.raw, self.active = self.value, active_RF.view(-1).index_select(0, flat_E)
        self.value = self.raw * self.active

    def column_counts(self) -> Tensor:
        """On how many tokens each feature is active, int64 [C]."""
        return torch.bincount(self._column[self.active], minlength=self._n_columns)

    def restricted(self, values: Tensor) -> Tensor:
        """``values``, in place, with everything outside the active entries set to zero."""
        return values.mul_(self.active)


class DenseJumpReLU(DenseCodes):
    """On whole matrices: ``raw`` and ``active`` are [R, F]."""

    def __init__(self, pre_RF: Tensor, active_RF: Tensor, compute_dtype: torch.dtype | None, n_members: int):
        super().__init__(pre_RF, active_RF, compute_dtype, n_members)
        self.raw, self.active = pre_RF, active_RF

    def row_sums(self, values: Tensor) -> Tensor:
        """Σ_f of ``values`` [R]."""
        return values.sum(1)

    def of_rows(self, per_token_R: Tensor) -> Tensor:
        """A number per token, to be multiplied with ``value``."""
        return per_token_R.unsqueeze(1)

    def sampled(self, a_RD: Tensor, W_CD: Tensor) -> Tensor:
        """(a·Wᵀ), whole: what is not active is needed too until :meth:`restricted`."""
        return self.product(a_RD, W_CD)

    def sampled_groups(self, a_RGD: Tensor, W_CD: Tensor, sizes: Sequence[int]) -> Tensor:
        """The same, a being that of the feature's group."""
        return self.product_groups(a_RGD, W_CD, sizes)

    def gathered(self, dense_NF: Tensor, member: int = 0) -> Tensor:  # noqa: ARG002 - all are whole
        """A dense matrix, whole."""
        return dense_NF


JumpReLUCodes = SparseJumpReLU | DenseJumpReLU


def jumprelu_codes(
    pre_RF: Tensor,
    threshold_MF: Tensor,
    bandwidth: float,
    *,
    dense_above: float | None,
    compute_dtype: torch.dtype | None,
) -> JumpReLUCodes:
    """The codes of contiguous pre-activations, of members who have a row of thresholds each; see
    :func:`.active_entries.codes_of`.
    """
    n_members = len(threshold_MF)
    pre_MTF, threshold_M1F = pre_RF.view(n_members, -1, pre_RF.shape[1]), threshold_MF.unsqueeze(1)
    active_RF = (pre_MTF > threshold_M1F.clamp(min=0)).view(pre_RF.shape)
    held_RF = (pre_MTF > threshold_M1F - bandwidth / 2).view(pre_RF.shape)
    held = count_true(held_RF)
    if is_dense(held, pre_RF, dense_above):
        return DenseJumpReLU(pre_RF, active_RF, compute_dtype, n_members)
    return SparseJumpReLU(pre_RF, active_RF, true_positions(held_RF, held), n_members)


def to_thresholds(
    codes: JumpReLUCodes, slope: Tensor, threshold_MF: Tensor, bandwidth: float, pull_R: Tensor
) -> Tensor:
    """∂L/∂θ [M, F] from ∂L/∂z at every entry the codes hold.

    Args:
        codes: at the current pre-activations.
        slope: ∂L/∂z, not yet restricted to active entries; like the codes' ``value``.
        threshold_MF: θ.
        bandwidth: ε.
        pull_R: λ1/N times the slope of a token's penalty in its L0.

    """
    near = (codes.raw - codes.of_columns(threshold_MF.flatten())).abs_() < bandwidth / 2
    pulled_MF = codes.column_sums(slope * near).view(threshold_MF.shape) * threshold_MF
    crossed_MF = codes.column_sums(near * codes.of_rows(pull_R)).view(threshold_MF.shape)
    return (pulled_MF + crossed_MF).div_(-bandwidth)


def l0_penalty(codes: JumpReLUCodes, aims: Sequence[float], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The penalty on L0 of every member [M], and λ1/N times its slope in the L0 of every token [R].

    Args:
        codes: of N tokens of every member.
        aims: the L0 that a member's tokens should have, 0 for none: then L0 itself is the penalty.
        weights: λ1 of every member.

    """
    l0_MT = codes.row_sums(codes.active.to(codes.value.dtype)).view(len(weights), -1)
    n_tokens = l0_MT.shape[1]
    weight_M1 = l0_MT.new_tensor(weights).unsqueeze(1) / n_tokens
    if not any(aims):
        return l0_MT.sum(1) / n_tokens, weight_M1.expand_as(l0_MT).flatten()
    aim_M1 = l0_MT.new_tensor(aims).unsqueeze(1)
    over_MT = l0_MT - aim_M1
    return (2 / aim_M1 * over_MT.square()).mean(1), (weight_M1 * 4 / aim_M1 * over_MT).flatten()
