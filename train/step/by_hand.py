"""One training step by hand: the numbers of :func:`.autograd.dense_step`, at a fraction of its cost where codes are
sparse.

No autograd graph. With g = ∂L/∂x̂, one dense product and four on active entries (:mod:`.active_entries`):

    pre   = (x − b_dec) W_enc + b_enc               dense; z = relu, topk … of it
    x̂     = z W_dec + b_dec                         g = 2 (x̂ − x) / N
    ∂L/∂z = g W_decᵀ + λ1 + λ2 ∂L_temp/∂z           at active entries: elsewhere the activation stops it
    ∂L/∂W_dec = zᵀ g        ∂L/∂W_enc = (x − b_dec)ᵀ ∂L/∂z
    ∂L/∂b_enc = Σ_n ∂L/∂z   ∂L/∂b_dec = Σ_n g − W_enc ∂L/∂b_enc

A dictionary of nested groups has one residual per prefix: with g_p that of prefix p, a feature of group h sees
Σ_{p ≥ h} g_p in the place of g, and b_dec all of them. Prefixes are decoded group by group, each adding to the one
before, so that the products are no more than those of one residual.

The gradient of W_enc is made as [F, D]: keep W_enc feature-major (shape [D, F], strides (1, D)) and nothing is
transposed.

Members of a sweep that see the same batch are stepped in the same calls (:func:`stacked_step`): their weights lie one
after the other, and their codes are one block-diagonal matrix (:mod:`.active_entries`).

Shapes: M members, N windows, W positions, T = N·W tokens, R = M·T rows, D model width, F features, C = M·F columns, G
groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..loss.objective import Objective, StepResult
from ..loss.terms import variance
from ..sae.activation import Activation
from ..sae.temporal_sae import TemporalSAE
from .active_entries import Codes, codes_of
from .fused_relu import FusedCodes, can_fuse, fused_codes
from .jumprelu import JumpReLUCodes, jumprelu_codes, l0_penalty, to_thresholds
from .matmul import product
from .registry import STEPS, HandWritten
from .temporal_gradient import add_temporal

_TERMS = ("reconstruction", "sparsity", "temporal", "auxiliary", "error")

STEPS.add("sae", HandWritten(activations=("relu", "topk", "batchtopk", "jumprelu")))


@dataclass(frozen=True)
class Stacked:
    """The weights of M SAEs, or gradients of these; W_enc feature-major as it lies in memory."""

    W_enc: Tensor  # [M, F, D]
    b_enc: Tensor  # [M, F]
    W_dec: Tensor  # [M, F, D]
    b_dec: Tensor  # [M, D]
    threshold: Tensor | None = None  # [M, F], of jumprelu

    @classmethod
    def of(cls, sae: TemporalSAE) -> Stacked:
        """A stack of one; a view."""
        threshold = (
            (sae.threshold.unsqueeze(0),) if sae.threshold is not None and sae.activation.kind == "jumprelu" else ()
        )
        return cls(*(weight.unsqueeze(0) for weight in (sae.W_enc.t(), sae.b_enc, sae.W_dec, sae.b_dec)), *threshold)

    def part(self, of: slice) -> Stacked:
        """Some of the members; a view."""
        return Stacked(self.W_enc[of], self.b_enc[of], self.W_dec[of], self.b_dec[of])


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
        sae: in training mode.
        x_NWD: scaled activations in the dtype of the weights.
        objective: the terms and their weights.
        partner_NP: see :class:`..loss.terms.Pairs`; for the partners that are not neighbours.
        dead_F: bool [F], the features AuxK revives.
        compute_dtype: of the dense products' factors, bfloat16 or the weights' own; sums and everything else stay in
            the weights' dtype.
        dense_above: share of active entries from which whole matrices are used; None: as measured
            (``codes.DENSE_ABOVE``).

    """
    dead_MF = None if dead_F is None else dead_F.unsqueeze(0)
    options = {"dead_MF": dead_MF, "compute_dtype": compute_dtype, "dense_above": dense_above}
    (result,), gradients = stacked_step(Stacked.of(sae), [sae], x_NWD, [objective], [partner_NP], **options)
    _accumulate(sae.W_enc, gradients.W_enc[0].t())
    _accumulate(sae.b_enc, gradients.b_enc[0])
    _accumulate(sae.W_dec, gradients.W_dec[0])
    _accumulate(sae.b_dec, gradients.b_dec[0])
    if gradients.threshold is not None and isinstance(sae.threshold, nn.Parameter):
        _accumulate(sae.threshold, gradients.threshold[0])
    return result


@torch.no_grad()
def stacked_step(
    weights: Stacked,
    saes: Sequence[TemporalSAE],
    x_NWD: Tensor,
    objectives: Sequence[Objective],
    partners: Sequence[Tensor | None],
    *,
    dead_MF: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    dense_above: float | None = None,
) -> tuple[list[StepResult], Stacked]:
    """Losses of M SAEs on one batch of windows, and their gradients; arguments as of :func:`sparse_step`, one per SAE.

    Args:
        weights: of the SAEs.
        saes: all of one activation, which they and their running thresholds are asked for.
        x_NWD: what all of them see.
        objectives: of one ``decoder_norms``, ``groups`` and auxiliary term, and all of them with an aim for L0 or none;
            otherwise each its own. With ``current_only`` a single one, of an activation that fixes k.
        partners: each its own.
        dead_MF: bool [M, F].
        compute_dtype: see there.
        dense_above: see there.

    """
    windows, halves = (x_NWD.shape[0], x_NWD.shape[1]), objectives[0].current_only
    # Of pairs whose current token alone counts, all earlier tokens come first, and rows count from ``first`` on.
    x, first = (x_NWD.transpose(0, 1).flatten(0, 1), windows[0]) if halves else (x_NWD.flatten(0, 1), 0)
    n_tokens, W_dec_CD = len(x) - first, weights.W_dec.flatten(0, 1)
    centred = x - weights.b_dec.unsqueeze(1) if saes[0].subtract_b_dec else x.expand(len(saes), -1, -1)
    pre = _products(centred, weights, compute_dtype)
    options = {"dense_above": dense_above, "compute_dtype": compute_dtype}
    codes = _codes(saes, pre.view(-1, pre.shape[-1]), objectives, weights.threshold, windows[1], options)
    counted = codes.from_row(first) if first and not isinstance(codes, FusedCodes) else codes
    sizes, shares = zip(*objectives[0].groups or ((pre.shape[-1], 1.0),), strict=True)
    residual, to_reconstruction, errors_MG = _residuals(codes, weights, x, sizes, shares, first)
    # A feature whose weights are NaN is never positive; its pre-activation must still poison the loss, or it would go
    # unseen.
    errors_MG += 0 * pre[:, :1].sum((1, 2)).unsqueeze(1)
    terms = {"reconstruction": (errors_MG * errors_MG.new_tensor(shares)).sum(1), "error": errors_MG[:, -1]}
    norms_C = W_dec_CD.norm(dim=-1) if objectives[0].decoder_norms and weights.threshold is None else None
    to_threshold = None
    if isinstance(codes, FusedCodes):
        to_codes, to_b_enc, more = _fused_slope(codes, to_reconstruction, W_dec_CD, objectives, norms_C, sizes)
    else:
        to_codes = codes.sampled_groups(to_reconstruction, W_dec_CD, sizes)
        more = _add_own_terms(to_codes, codes, objectives, norms_C, windows, partners)
        if first:  # k is fixed: Σ z is reported, and has no weight
            more["sparsity"] = counted.totals(counted.value) / n_tokens
        if isinstance(codes, JumpReLUCodes) and weights.threshold is not None:
            aims, l1 = zip(*((each.l0_aim, each.sparsity_weight) for each in objectives), strict=True)
            more["sparsity"], pull_R = l0_penalty(codes, aims, l1)  # it pulls at the thresholds alone
            to_threshold = to_thresholds(codes, to_codes, weights.threshold, saes[0].activation.bandwidth, pull_R)
        to_codes = codes.restricted(to_codes)
        to_b_enc = codes.column_sums(to_codes)
    gradients = Stacked(
        W_enc=codes.accumulate(to_codes, centred.flatten(0, 1)).view(weights.W_enc.shape),
        b_enc=to_b_enc.view(weights.b_enc.shape),
        W_dec=codes.accumulate_groups(codes.value, to_reconstruction, sizes).view(weights.W_dec.shape),
        b_dec=to_reconstruction[:, 0].view(centred.shape).sum(1),
        threshold=to_threshold,
    )
    del to_codes
    if norms_C is not None:
        _shrink_rows(gradients, weights, codes, norms_C, [each.sparsity_weight / n_tokens for each in objectives])
    if objectives[0].aux_weight > 0 and dead_MF is not None and bool(dead_MF.any()):
        # Padded together a call is saved; on a CPU the bits of a member alone come first, and they depend on a matrix's
        # width.
        together = [slice(m, m + 1) for m in range(len(saes))] if x.device.type == "cpu" else [slice(None)]
        more["auxiliary"] = torch.cat(
            [
                _add_auxiliary(
                    gradients.part(of),
                    weights.part(of),
                    pre[of, first:],
                    centred[of, first:],
                    residual[of, first:],
                    dead_MF[of],
                    objectives[0],
                )
                for of in together
            ]
        )
    if saes[0].subtract_b_dec:
        for W_enc, b_enc, b_dec in zip(weights.W_enc, gradients.b_enc, gradients.b_dec, strict=True):
            b_dec.sub_(W_enc.t() @ b_enc)
    if saes[0].activation.function.threshold == "running":
        for sae, values in zip(saes, counted.members(counted.value), strict=True):
            sae.track_threshold(values)
    return _results(terms | more, objectives, counted.column_counts().view(len(saes), -1)), gradients


def _products(centred_MTD: Tensor, weights: Stacked, compute_dtype: torch.dtype | None) -> Tensor:
    """Pre-activations [M, T, F]."""
    if len(centred_MTD) > 1:
        return product(centred_MTD, weights.W_enc, weights.b_enc, compute_dtype)
    return product(centred_MTD[0], weights.W_enc[0], weights.b_enc[0], compute_dtype).unsqueeze(0)


def _residuals(
    codes: Codes, weights: Stacked, x_TD: Tensor, sizes: Sequence[int], shares: Sequence[float], first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual of the whole dictionary [M, T, D], ∂L/∂x̂ that the features of each group see [R, G, D], and the mean
    squared error of every prefix [M, G]; zero for tokens before the first that counts.
    """
    n_members, n_tokens = len(weights.b_dec), len(x_TD) - first
    residual = codes.decode_groups(weights.W_dec.flatten(0, 1), sizes).view(n_members, len(x_TD), len(sizes), -1)
    for group in range(1, len(sizes)):
        residual[:, :, group] += residual[:, :, group - 1]
    residual.add_(weights.b_dec[:, None, None]).sub_(x_TD.unsqueeze(1))
    residual[:, :first] = 0
    errors_MG = residual.square().sum((1, 3)) / n_tokens
    to_reconstruction = residual * (residual.new_tensor(shares) * (2 / n_tokens)).unsqueeze(1)
    for group in reversed(range(len(sizes) - 1)):
        to_reconstruction[:, :, group] += to_reconstruction[:, :, group + 1]
    return residual[:, :, -1], to_reconstruction.flatten(0, 1), errors_MG


def _codes(
    saes: Sequence[TemporalSAE],
    pre_RF: Tensor,
    objectives: Sequence[Objective],
    threshold_MF: Tensor | None,
    w: int,
    options: dict[str, Any],
) -> Codes:
    activation = saes[0].activation
    if threshold_MF is not None:
        return jumprelu_codes(pre_RF, threshold_MF, activation.bandwidth, **options)
    if objectives[0].current_only:
        return codes_of(pre_RF, activation, **options, n_races=2)
    if activation.kind == "relu" and all(can_fuse(pre_RF, each) for each in objectives):
        return fused_codes(pre_RF, w, **options, n_members=len(saes))
    return codes_of(pre_RF, activation, **options, n_members=len(saes))


def _add_own_terms(
    to_codes: Tensor,
    codes: Codes,
    objectives: Sequence[Objective],
    norms_C: Tensor | None,
    windows: tuple[int, int],
    partners: Sequence[Tensor | None],
) -> dict[str, Tensor]:
    """The terms of the loss that codes have to themselves [M]; their part of ∂L/∂z is added to ``to_codes``."""
    n_tokens, terms = windows[0] * windows[1], {}
    if not isinstance(codes, JumpReLUCodes):
        shares = [each.sparsity_weight / n_tokens for each in objectives]
        terms["sparsity"] = codes.penalise(to_codes, shares, norms_C) / n_tokens
    if any(each.temporal.active for each in objectives):
        halves = objectives[0].current_only
        terms["temporal"] = add_temporal(
            to_codes, codes, [each.temporal for each in objectives], windows, partners, halves=halves
        )
    return terms


def _fused_slope(
    codes: FusedCodes,
    to_reconstruction_RGD: Tensor,
    W_dec_CD: Tensor,
    objectives: Sequence[Objective],
    norms_C: Tensor | None,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """∂L/∂z and these terms in one pass, at active entries alone; and ∂L/∂z summed over tokens [C]."""
    to_codes, to_b_enc = codes.slopes(to_reconstruction_RGD, W_dec_CD, objectives, norms_C, sizes)
    n_tokens, shape = codes.shape[0] // codes.n_members, (codes.n_members, -1)
    terms = {"sparsity": (codes.sums if norms_C is None else codes.sums * norms_C).view(shape).sum(1) / n_tokens}
    if any(each.temporal.active for each in objectives):
        terms["temporal"] = codes.temporal([each.temporal for each in objectives])
    return to_codes, to_b_enc, terms


def _shrink_rows(gradients: Stacked, weights: Stacked, codes: Codes, norms_C: Tensor, shares: Sequence[float]) -> None:
    """Σ z ‖W_dec‖ pulls on the rows themselves."""
    sums_C = codes.sums if isinstance(codes, FusedCodes) else codes.column_sums(codes.value)
    shrink_MF = (sums_C / norms_C.clamp(min=1e-30)).view(len(shares), -1)
    shrink_MF *= shrink_MF.new_tensor(shares).unsqueeze(1)
    gradients.W_dec.addcmul_(weights.W_dec, shrink_MF.unsqueeze(2))


def _add_auxiliary(
    gradients: Stacked,
    weights: Stacked,
    pre_MTF: Tensor,
    centred_MTD: Tensor,
    residual_MTD: Tensor,
    dead_MF: Tensor,
    objective: Objective,
) -> Tensor:
    """AuxK, a step on the sub-dictionary of dead features: the strongest reconstruct what is left
    (:func:`..loss.terms.aux_k`).

    Members have as many dead features as they have: to be of one shape, each has the most of any, some of them always
        zero.
    """
    n_members, n_tokens, n_features = pre_MTF.shape
    counts = dead_MF.sum(1).tolist()
    if not any(counts):
        return residual_MTD.new_zeros(n_members)
    most, columns_Q = max(counts), dead_MF.view(-1).nonzero().view(-1)
    padded = []
    for member, (pre_TF, columns) in enumerate(zip(pre_MTF, columns_Q.split(counts), strict=True)):
        chosen = pre_TF.index_select(1, columns - member * n_features)
        padded.append(chosen if len(columns) == most else functional.pad(chosen, (0, most - len(columns))))
    places = [torch.arange(count, device=pre_MTF.device) + member * most for member, count in enumerate(counts)]
    place_Q = torch.cat(places)
    W_dec = weights.W_dec.new_zeros(n_members * most, weights.W_dec.shape[2])
    W_dec.index_copy_(0, place_Q, weights.W_dec.flatten(0, 1).index_select(0, columns_Q))
    strongest = Activation("topk", k=min(objective.aux_k, most))
    codes = codes_of(torch.cat(padded), strongest, n_members=n_members)
    error = codes.decode(W_dec).add_(residual_MTD.flatten(0, 1))
    loss_M = error.view(residual_MTD.shape).square().sum((1, 2)) / n_tokens
    to_reconstruction = error.mul_(2 * objective.aux_weight / n_tokens)
    if objective.aux_normalised:
        variance_M = torch.stack([variance(residual_TD) for residual_TD in residual_MTD])
        loss_M /= variance_M
        to_reconstruction.view(residual_MTD.shape).div_(variance_M[:, None, None])
    to_codes = codes.sampled(to_reconstruction, W_dec)
    for gradient, more in (
        (gradients.W_enc.flatten(0, 1), codes.accumulate(to_codes, centred_MTD.flatten(0, 1))),
        (gradients.b_enc.flatten(0, 1), codes.column_sums(to_codes)),
        (gradients.W_dec.flatten(0, 1), codes.accumulate(codes.value, to_reconstruction)),
    ):
        gradient.index_add_(0, columns_Q, more.index_select(0, place_Q))
    return loss_M * (dead_MF.any(1))


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:  # the fused optimiser walks memory: a gradient must lie as its parameter does
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def _results(terms: dict[str, Tensor], objectives: Sequence[Objective], fired_MF: Tensor) -> list[StepResult]:
    """What every member's step reports, from its terms [M]."""
    zero_M = terms["reconstruction"].new_zeros(len(objectives))
    found = {name: terms.get(name, zero_M).float() for name in _TERMS}
    weights = {
        "sparsity": [each.sparsity_weight for each in objectives],
        "temporal": [each.temporal.weight for each in objectives],
        "auxiliary": [each.aux_weight for each in objectives],
    }
    total_M = found["reconstruction"]
    for name, factors in weights.items():
        factor = factors[0] if len(set(factors)) == 1 else total_M.new_tensor(factors)
        total_M = total_M + found[name] * factor
    columns = {name: values.unbind() for name, values in (found | {"total": total_M, "fired_F": fired_MF}).items()}
    return [StepResult(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
