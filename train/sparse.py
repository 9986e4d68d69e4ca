"""One training step by hand: the numbers of :func:`.step.dense_step`, at a fraction of its cost where codes are sparse.

No autograd graph. With g = ∂L/∂x̂, one dense product and four on active entries (:mod:`.codes`):

    pre   = (x − b_dec) W_enc + b_enc               dense; z = relu or topk of it
    x̂     = z W_dec + b_dec                         g = 2 (x̂ − x) / N
    ∂L/∂z = g W_decᵀ + λ1 + λ2 ∂L_temp/∂z           at active entries: elsewhere relu and topk stop it
    ∂L/∂W_dec = zᵀ g        ∂L/∂W_enc = (x − b_dec)ᵀ ∂L/∂z
    ∂L/∂b_enc = Σ_n ∂L/∂z   ∂L/∂b_dec = Σ_n g − W_enc ∂L/∂b_enc

The gradient of W_enc is made as [F, D]: keep W_enc feature-major (shape [D, F], strides (1, D)) and nothing is transposed.

Shapes: N windows, W positions, M = N·W tokens, D model width, F features, K dead features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import consistency
from .activation import Activation
from .codes import Codes, codes_of
from .fused import FusedCodes, can_fuse, fused_codes
from .objective import Objective, StepResult
from .products import product
from .sae import TemporalSAE
from .step import track_threshold


def supports(sae: TemporalSAE) -> bool:
    """Whether :func:`sparse_step` can train this SAE: with every temporal term, and every activation but jumprelu."""
    return sae.training and sae.activation.kind in ("relu", "topk", "batchtopk")


@torch.no_grad()
def sparse_step(
    sae: TemporalSAE,
    x_NWD: Tensor,
    objective: Objective,
    *,
    partner_NP: Tensor | None = None,
    dead_F: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    dense_above: float | None = None,
) -> StepResult:
    """Loss of a batch of windows and its gradients, added to ``.grad`` of the parameters.

    Args:
        sae: one that :func:`supports` accepts.
        x_NWD: scaled activations in the dtype of the weights.
        objective: the terms and their weights.
        partner_NP: see :func:`.losses.pairs`; for the partners that are not neighbours.
        dead_F: bool [F], the features AuxK revives.
        compute_dtype: of the dense products' factors, bfloat16 or the weights' own; sums and everything else stay in the
            weights' dtype.
        dense_above: share of active entries from which whole matrices are used; None: as measured (``codes.DENSE_ABOVE``).

    """
    x = x_NWD.flatten(0, 1)
    centred = x - sae.b_dec if sae.subtract_b_dec else x
    pre = product(centred, sae.W_enc.t(), sae.b_enc, compute_dtype)
    codes = _codes(sae, pre, objective, x_NWD.shape[1], dense_above, compute_dtype)
    residual = codes.decode(sae.W_dec).add_(sae.b_dec).sub_(x)
    # A feature whose weights are NaN is never positive; its pre-activation must still poison the loss, or it would go unseen.
    terms = {"reconstruction": residual.square().sum() / len(x) + 0 * pre[:1].sum()}
    to_reconstruction = residual * (2 / len(x))
    norms = sae.W_dec.norm(dim=-1) if objective.decoder_norms else None
    if isinstance(codes, FusedCodes):
        to_codes, to_b_enc, more = _fused_slope(codes, to_reconstruction, sae.W_dec, objective, norms)
    else:
        windows = (x_NWD.shape[0], x_NWD.shape[1])
        to_codes, to_b_enc, more = _slope(codes, to_reconstruction, sae.W_dec, objective, norms, windows, partner_NP)
    gradients = _Gradients(
        W_enc=codes.accumulate(to_codes, centred), b_enc=to_b_enc, W_dec=codes.accumulate(codes.value, to_reconstruction)
    )
    if norms is not None:
        # Σ z ‖W_dec‖ pulls on the rows themselves.
        sums = codes.sums if isinstance(codes, FusedCodes) else codes.column_sums(codes.value)
        shrink = sums * (objective.sparsity_weight / len(x)) / norms.clamp(min=1e-30)
        gradients.W_dec.addcmul_(sae.W_dec, shrink.unsqueeze(1))
    if objective.aux_weight > 0 and dead_F is not None and bool(dead_F.any()):
        dead_K = dead_F.nonzero().view(-1)
        more["auxiliary"] = _add_auxiliary(gradients, sae, pre, centred, residual, dead_K, objective)
    _deposit(sae, gradients, to_reconstruction)
    if sae.activation.kind == "batchtopk":
        track_threshold(sae, codes.value)
    return _result(terms | more, objective, codes.column_counts())


def _codes(
    sae: TemporalSAE,
    pre_MF: Tensor,
    objective: Objective,
    w: int,
    dense_above: float | None,
    compute_dtype: torch.dtype | None,
) -> Codes:
    if sae.activation.kind == "relu" and can_fuse(pre_MF, objective):
        return fused_codes(pre_MF, w, dense_above=dense_above, compute_dtype=compute_dtype)
    return codes_of(pre_MF, sae.activation, dense_above=dense_above, compute_dtype=compute_dtype)


def _slope(
    codes: Codes,
    to_reconstruction_MD: Tensor,
    W_dec: Tensor,
    objective: Objective,
    norms_F: Tensor | None,
    windows: tuple[int, int],
    partner_NP: Tensor | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """∂L/∂z at the active entries, its sum over tokens [F], and the terms of the loss that codes have to themselves."""
    to_codes = codes.sampled(to_reconstruction_MD, W_dec)
    weight = objective.sparsity_weight / codes.shape[0]
    if norms_F is None:
        to_codes.add_(weight)
        total = codes.value.sum()
    else:
        per_entry = codes.of_columns(norms_F)
        to_codes.add_(per_entry, alpha=weight)
        total = (codes.value * per_entry).sum()
    terms = {"sparsity": total / codes.shape[0]}
    if objective.temporal.active:
        terms["temporal"], pull = consistency.temporal(codes, objective.temporal, windows, partner_NP)
        to_codes.add_(pull, alpha=objective.temporal.weight)
    to_codes = codes.restricted(to_codes)
    return to_codes, codes.column_sums(to_codes), terms


def _fused_slope(
    codes: FusedCodes, to_reconstruction_MD: Tensor, W_dec: Tensor, objective: Objective, norms_F: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same in one pass."""
    to_codes, to_b_enc = codes.slopes(to_reconstruction_MD, W_dec, objective, norms_F)
    terms = {"sparsity": (codes.sums if norms_F is None else codes.sums * norms_F).sum() / codes.shape[0]}
    if objective.temporal.active:
        terms["temporal"] = codes.changes[: objective.temporal.n_features].sum() / max(1, codes.n_pairs)
    return to_codes, to_b_enc, terms


@dataclass
class _Gradients:
    """Of the weights that codes are made with and decoded by, feature-major."""

    W_enc: Tensor  # [F, D]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, D]


def _add_auxiliary(
    gradients: _Gradients,
    sae: TemporalSAE,
    pre_MF: Tensor,
    centred_MD: Tensor,
    residual_MD: Tensor,
    dead_K: Tensor,
    objective: Objective,
) -> Tensor:
    """AuxK, a step on the sub-dictionary of dead features: the strongest reconstruct what is left (:func:`.losses.aux_k`)."""
    strongest = Activation("topk", k=min(objective.aux_k, dead_K.numel()))
    codes = codes_of(pre_MF.index_select(1, dead_K), strongest)
    W_dec = sae.W_dec.index_select(0, dead_K)
    error = codes.decode(W_dec).add_(residual_MD)
    loss = error.square().sum() / len(error)
    to_reconstruction = error.mul_(2 * objective.aux_weight / len(error))
    to_codes = codes.sampled(to_reconstruction, W_dec)
    gradients.W_enc.index_add_(0, dead_K, codes.accumulate(to_codes, centred_MD))
    gradients.b_enc.index_add_(0, dead_K, codes.column_sums(to_codes))
    gradients.W_dec.index_add_(0, dead_K, codes.accumulate(codes.value, to_reconstruction))
    return loss


def _deposit(sae: TemporalSAE, gradients: _Gradients, to_reconstruction_MD: Tensor) -> None:
    to_b_dec = to_reconstruction_MD.sum(0)
    if sae.subtract_b_dec:
        to_b_dec.sub_(sae.W_enc @ gradients.b_enc)
    _accumulate(sae.W_enc, gradients.W_enc.t())
    _accumulate(sae.b_enc, gradients.b_enc)
    _accumulate(sae.W_dec, gradients.W_dec)
    _accumulate(sae.b_dec, to_b_dec)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:  # the fused optimiser walks memory: a gradient must lie as its parameter does
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def _result(terms: dict[str, Tensor], objective: Objective, fired_F: Tensor) -> StepResult:
    zero = terms["reconstruction"].new_zeros(())
    found = {name: terms.get(name, zero).float() for name in ("reconstruction", "sparsity", "temporal", "auxiliary")}
    total = (
        found["reconstruction"]
        + objective.sparsity_weight * found["sparsity"]
        + objective.temporal.weight * found["temporal"]
        + objective.aux_weight * found["auxiliary"]
    )
    return StepResult(total=total, fired_F=fired_F, **found)
