"""One training step through autograd: right for every architecture, term and partner, and the reference for every
faster path.

A step leaves its gradients in ``.grad`` of the parameters and returns the terms of the loss; the trainer clips and
steps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..loss import terms as loss_terms
from ..loss.objective import Objective, StepResult
from ..sae.protocol import RowTokens, SAEOutput, SparseAutoencoder

_TERMS = ("reconstruction", "sparsity", "temporal", "auxiliary", "error")


def autograd_step(
    sae: SparseAutoencoder,
    x_NWD: Tensor,
    objective: Objective,
    *,
    partner_NP: Tensor | None = None,
    dead_F: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    rows: RowTokens | None = None,
) -> StepResult:
    """Loss of a batch of windows, or of whole rows, and its gradients.

    Args:
        sae: in training mode; gradients are accumulated into its parameters.
        x_NWD: scaled activations, float32.
        objective: the terms and their weights.
        partner_NP: see :class:`..loss.terms.Pairs`; for the partners that are not neighbours.
        dead_F: bool [F], the features that the auxiliary term revives.
        compute_dtype: bfloat16 runs the products under autocast; losses are float32 throughout.
        rows: which tokens count, where ``x_NWD`` holds whole rows; the others are in no term.

    """
    all_x_NWD = x_NWD
    with autocast(x_NWD.device, compute_dtype):
        if objective.current_only:
            # Two calls, so that batchtopk's largest are chosen among the current tokens, and among the earlier ones.
            earlier_NF, x_NWD = sae.encode(x_NWD[:, 0]), x_NWD[:, 1]
            out = sae(x_NWD)
            features_NWF = torch.stack([earlier_NF, out.features], 1)
        else:
            out = sae(x_NWD) if rows is None else sae(x_NWD, rows)
            features_NWF = out.features
    if rows is not None:
        x_NWD, out = rows.counted(x_NWD), out.each(rows.counted)
    total, found = weighted_terms(
        sae, x_NWD, out, objective, dead_F=dead_F, compared=(features_NWF, all_x_NWD), partner_NP=partner_NP
    )
    total.backward()
    sae.after_backward(out)
    return step_result(total, found, out)


def weighted_terms(
    sae: SparseAutoencoder,
    x: Tensor,
    out: SAEOutput,
    objective: Objective,
    *,
    dead_F: Tensor | None = None,
    compared: tuple[Tensor, Tensor] | None = None,
    partner_NP: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its terms, unweighted, by name.

    Args:
        sae: in training mode.
        x: scaled activations [.., D], float32, all of which count.
        out: what the SAE makes of them.
        objective: the terms and their weights.
        dead_F: bool [F], the features that the auxiliary term revives.
        compared: codes [N, W, F] and activations [N, W, D] of the temporal term; None: there is nothing to compare.
        partner_NP: see :class:`..loss.terms.Pairs`.

    """
    found = {"reconstruction": sae.reconstruction_loss(x, out, objective)}
    with torch.set_grad_enabled(objective.sparsity_weight > 0):
        found["sparsity"] = sae.sparsity_loss(out, objective)
    with torch.no_grad():  # reported only
        found["error"] = sae.prefix_error(x, out, sae.n_features)
    total = found["reconstruction"]
    if objective.sparsity_weight > 0:
        total = total + objective.sparsity_weight * found["sparsity"]
    if objective.temporal.active and compared is not None:
        z_NWF, x_NWD = compared
        found["temporal"] = loss_terms.temporal(
            loss_terms.at_least_float32(z_NWF), objective.temporal, partner_NP, x_NWD
        )
        total = total + objective.temporal.weight * found["temporal"]
    if objective.aux_weight > 0:
        auxiliary = sae.auxiliary_loss(x, out, dead_F, objective)
        if auxiliary is not None:
            found["auxiliary"] = auxiliary
            total = total + objective.aux_weight * auxiliary
    return total, found


def step_result(total: Tensor, found: dict[str, Tensor], out: SAEOutput) -> StepResult:
    """What a step reports of its loss and of who fired."""
    zero = torch.zeros((), device=total.device)
    terms = {name: found[name].detach().float() if name in found else zero for name in _TERMS}
    return StepResult(total=total.detach().float(), fired_F=(out.counted > 0).flatten(0, -2).sum(0), **terms)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Products in ``dtype``; nothing for float32 or None."""
    return nullcontext() if dtype in (None, torch.float32) else torch.autocast(device.type, dtype=dtype)
