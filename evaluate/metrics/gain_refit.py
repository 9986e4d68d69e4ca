"""One gain per feature that undoes shrinkage: an SAE cannot lower its variation by shrinking what varies most.

Shapes: M tokens of a sample, D model width, F features, K features active in the sample.

The gains g minimise Σ_t ‖x_t − b_dec − Σ_i g_i z_ti d_i‖² over a sample of tokens: the whole dictionary is refitted
together, so that no gain makes up for what other features explain. Rescaling z_i by any c_i > 0 divides g_i by c_i and
leaves g_i z_i, hence the temporal variation of g_i ‖d_i‖ z_i, unchanged. (Refitting magnitudes while directions stay is
a known repair of feature suppression: Wright & Sharkey 2024.)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .token_sample import SampledTokens

_RIDGE = 1e-3  # of each column's own square: keeps near-duplicates from trading huge gains of opposite sign
_STEPS = 60
_DENSE_ABOVE = 0.05  # share of nonzero codes above which the dense product is the faster one


def refit_gains(sample: SampledTokens, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Least-squares gains: float64 [F], NaN for a feature that is never active in the sample."""
    gain_F = torch.full((len(W_dec),), torch.nan, dtype=torch.float64, device=W_dec.device)
    z_MK, features = sample.dense()
    rows_KD = W_dec[features].float()
    size_K = z_MK.norm(dim=0) * rows_KD.norm(dim=1)
    usable = size_K > 0
    if not bool(usable.any()):
        return gain_F
    rows_KD, size_K, features = rows_KD[usable], size_K[usable], features[usable]
    # Unit columns: what follows then does not see the scale of any feature.
    columns = _Columns.of(z_MK[:, usable] / size_K, rows_KD)
    solution_K = _conjugate_gradients(columns, columns.adjoint(sample.x_MD - b_dec.float()))
    gain_F[features] = (solution_K / size_K).double()
    return gain_F


@dataclass(frozen=True)
class _Columns:
    """The linear map g → Σ_k g_k z_mk d_k, whose M·D by K matrix is never written out."""

    z_MK: Tensor  # sparse or dense
    z_KM: Tensor
    rows_KD: Tensor

    @classmethod
    def of(cls, z_MK: Tensor, rows_KD: Tensor) -> _Columns:
        where = z_MK.nonzero(as_tuple=True)
        if len(where[0]) > _DENSE_ABOVE * z_MK.numel():
            return cls(z_MK, z_MK.T.contiguous(), rows_KD)
        values = z_MK[where]
        size_M, size_K = z_MK.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse invariant checks")  # torch 2.11, though told not to
            forward = torch.sparse_coo_tensor(torch.stack(where), values, (size_M, size_K), check_invariants=False)
            backward = torch.sparse_coo_tensor(
                torch.stack(where[::-1]), values, (size_K, size_M), check_invariants=False
            )
        return cls(forward.coalesce(), backward.coalesce(), rows_KD)

    def apply(self, g_K: Tensor) -> Tensor:
        return self.z_MK @ (g_K[:, None] * self.rows_KD)

    def adjoint(self, residual_MD: Tensor) -> Tensor:
        return ((self.z_KM @ residual_MD) * self.rows_KD).sum(1)


def _conjugate_gradients(columns: _Columns, right_K: Tensor) -> Tensor:
    """Solve (AᵀA + ridge) g = right."""
    solution, residual = torch.zeros_like(right_K), right_K.clone()
    direction, square = residual.clone(), residual.dot(residual)
    goal = 1e-8 * square
    for _ in range(_STEPS):
        if square <= goal:
            break
        image = columns.adjoint(columns.apply(direction)) + _RIDGE * direction
        step = square / direction.dot(image)
        solution, residual = solution + step * direction, residual - step * image
        square, previous = residual.dot(residual), square
        direction = residual + square / previous * direction
    return solution
