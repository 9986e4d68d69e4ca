"""One dense training step through autograd: the reference for every faster path.

A step leaves its gradients in ``.grad`` of the parameters and returns the terms of the loss; the trainer clips and
steps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..loss import terms as loss_terms
from ..loss.objective import Objective, StepResult
from ..sae.activation import step_function
from ..sae.temporal_sae import TemporalSAE

_THRESHOLD_MOMENTUM = 0.99
_TERMS = ("reconstruction", "sparsity", "temporal", "auxiliary")


def dense_step(
    sae: TemporalSAE,
    x_NWD: Tensor,
    objective: Objective,
    *,
    partner_NP: Tensor | None = None,
    dead_F: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> StepResult:
    """Loss of a batch of windows and its gradients, for every activation, temporal term and partner.

    Args:
        sae: in training mode; gradients are accumulated into its parameters.
        x_NWD: scaled activations, float32.
        objective: the terms and their weights.
        partner_NP: see :func:`..loss.terms.pairs`; for the partners that are not neighbours.
        dead_F: bool [F], the features AuxK revives.
        compute_dtype: bfloat16 runs the products under autocast; losses are float32 throughout.

    """
    with _autocast(x_NWD.device, compute_dtype):
        pre = sae.pre_activations(x_NWD)
        z = sae.activate(pre)
        reconstruction = sae.decode(z)
    pre, z, reconstruction = pre.float(), z.float(), reconstruction.float()
    terms = {
        "reconstruction": loss_terms.reconstruction(x_NWD, reconstruction),
        "sparsity": _sparsity(sae, pre, z, objective),
    }
    total = terms["reconstruction"]
    if objective.sparsity_weight > 0:
        total = total + objective.sparsity_weight * terms["sparsity"]
    if objective.temporal.active:
        terms["temporal"] = loss_terms.temporal(z, objective.temporal, partner_NP)
        total = total + objective.temporal.weight * terms["temporal"]
    if objective.aux_weight > 0 and dead_F is not None and bool(dead_F.any()):
        residual = (x_NWD - reconstruction).detach().flatten(0, 1)
        terms["auxiliary"] = loss_terms.aux_k(residual, pre.flatten(0, 1), sae.W_dec, dead_F, objective.aux_k)
        total = total + objective.aux_weight * terms["auxiliary"]
    total.backward()
    if sae.activation.kind == "batchtopk":
        track_threshold(sae, z.detach())
    zero = torch.zeros((), device=x_NWD.device)
    found = {name: terms[name].detach() if name in terms else zero for name in _TERMS}
    return StepResult(total=total.detach(), fired_F=(z > 0).flatten(0, 1).sum(0), **found)


@torch.no_grad()
def track_threshold(sae: TemporalSAE, z: Tensor) -> None:
    """Follow the smallest code that batchtopk let pass: its threshold outside training (arXiv 2412.06410, eq 5)."""
    assert sae.threshold is not None  # noqa: S101 - for the type checker
    passed = z[z > 0]
    if passed.numel() == 0:
        return
    smallest = passed.min()
    fresh = sae.threshold < 0
    follow = _THRESHOLD_MOMENTUM * sae.threshold + (1 - _THRESHOLD_MOMENTUM) * smallest
    sae.threshold.copy_(torch.where(fresh, smallest, follow))


def _sparsity(sae: TemporalSAE, pre: Tensor, z: Tensor, objective: Objective) -> Tensor:
    """Σ z of relu (also reported, without weight, for topk and batchtopk), L0 of jumprelu."""
    if sae.activation.kind == "jumprelu" and sae.threshold is not None:
        return step_function(pre, sae.threshold, sae.activation.bandwidth).sum(-1).mean()
    return loss_terms.l1(z, sae.W_dec.norm(dim=-1) if objective.decoder_norms else None)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype in (None, torch.float32) else torch.autocast(device.type, dtype=dtype)
