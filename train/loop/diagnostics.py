"""Metrics of an SAE in training beside its loss, from one batch of the stream.

Shapes: N windows, W positions, D model width, F features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..loss.objective import TemporalTerm
from ..sae.protocol import RowTokens
from .member import Member, Update
from .temporal_buffer import TemporalBuffer

_SAMPLED_ROWS, _NEAR = 512, 0.95
_TIMED_WINDOWS, _TIMED_LENGTH, _TIMED_ROWS = 64, 5, 8
FEATURE_DECILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}  # of λ2 over features
Metrics = dict[str, float | None]


@torch.no_grad()
def diagnose(
    member: Member,
    update: Update,
    x_NWD: Tensor,
    mean_D: Tensor,
    *,
    share: float = 1.0,
    rows: RowTokens | None = None,
) -> Metrics:
    """All metrics of one logged step.

    Losses, L0 and explained variance are of the whole batch, as computed in the step; metrics of time are of the first
    few windows, encoded after the step.

    Args:
        member: the member after the step.
        update: the result of the step.
        x_NWD: the scaled inputs of the step.
        mean_D: the global mean of the scaled inputs, for the explained variance.
        share: share of the batch's windows that this process has.
        rows: which tokens count, if the inputs are whole rows.

    Returns:
        Loss terms and their weighted shares of the total, λ1, λ2, gradient norm, learning rate, L0, dead share,
        explained variance, near-duplicate share, temporal variation and lag correlations; None if undefined.

    """
    result = update.result
    window = x_NWD.shape[1] if member.sae.sees == "window" else 1  # tokens of one code
    x_counted = x_NWD if rows is None else x_NWD[rows.valid_NT]
    if update.objective.current_only:
        x_counted = x_NWD[:, 1]
    codes = x_counted.numel() / x_NWD.shape[-1] / window / share
    spread = float(member.world.mean((x_counted - mean_D).pow(2).sum(-1).mean(), share))
    z = _timed_codes(member, x_NWD, rows)
    metrics = {
        **loss_terms(update),
        "l0": float(result.fired_F.sum()) / codes,
        "dead_share": float(member.dead.float().mean()),
        "explained_variance": 1 - float(result.error) / spread if spread > 0 else None,
        "near_duplicates": near_duplicates(member.sae.W_dec),
        "temporal_variation": temporal_variation(z),
        **lag_correlations(z),
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}


def _timed_codes(member: Member, x_NWD: Tensor, rows: RowTokens | None) -> Tensor:
    """Codes [N, W, F] of consecutive tokens of one document; W is 1 if a code belongs to a whole window."""
    if rows is None:
        z = member.sae.encode(x_NWD[:_TIMED_WINDOWS])
        return z.unsqueeze(1) if member.sae.sees == "window" else z
    first, w = slice(_TIMED_ROWS), min(_TIMED_LENGTH, x_NWD.shape[1])
    valid_NT, documents_NT = rows.valid_NT[first], rows.documents_NT[first]
    z_NTF = member.sae.on_rows(x_NWD[first], rows.at(first)).features
    cut = [each.unfold(1, w, w).flatten(0, 1) for each in (valid_NT, documents_NT)]
    whole = cut[0].all(1) & (cut[1] == cut[1][:, :1]).all(1)
    return z_NTF.unfold(1, w, w).flatten(0, 1)[whole].transpose(1, 2)


def loss_terms(update: Update) -> Metrics:
    """The terms before the step changed the weights, and the weighted share of each in the total."""
    result, objective = update.result, update.objective
    total = float(result.total)
    weighted = {
        "reconstruction": float(result.reconstruction),
        "sparsity": objective.sparsity_weight * float(result.sparsity),
        "temporal": objective.temporal.weight * float(result.temporal),
        "auxiliary": objective.aux_weight * float(result.auxiliary),
    }
    metrics: Metrics = {"loss": total}
    metrics |= {name: float(getattr(result, name)) for name in weighted}
    metrics |= {f"{name}_share": value / total if total else None for name, value in weighted.items()}
    metrics["sparsity_weight"] = objective.sparsity_weight
    if objective.l0_aim:
        metrics["l0_aim"] = objective.l0_aim
    if objective.temporal.active:
        metrics |= _temporal_weights(objective.temporal)
    return metrics | {"grad_norm": float(update.grad_norm), "lr": update.lr}


def _temporal_weights(term: TemporalTerm) -> Metrics:
    """λ2, and deciles of it over the features that the term sees, where it differs between them."""
    metrics: Metrics = {"temporal_weight": term.weight}
    if term.feature_weights is not None:
        shares = term.feature_weights.new_tensor(list(FEATURE_DECILES.values()))
        found = torch.quantile(term.feature_weights[: term.n_features].float(), shares.float()) * term.weight
        metrics |= dict(zip((f"temporal_weight_{name}" for name in FEATURE_DECILES), found.tolist(), strict=True))
    return metrics


def temporal_variation(z_NWF: Tensor) -> float | None:
    """Σ ‖z_t − z_{t+1}‖² / Σ ½ (‖z_t‖² + ‖z_{t+1}‖²): 0 if codes never change, 2 if neighbours share no feature."""
    before, after = z_NWF[:, :-1], z_NWF[:, 1:]
    energy = before.pow(2).sum() / 2 + after.pow(2).sum() / 2
    return float((after - before).pow(2).sum() / energy) if energy > 0 else None


def lag_correlations(z_NWF: Tensor) -> Metrics:
    """Mean centred autocorrelation at every lag of the window, over the features that vary."""
    n, w, f = z_NWF.shape
    if w < 2:
        return {}
    buffer = TemporalBuffer(f, w, streams=n, device=z_NWF.device)
    for t in range(w):
        buffer.push(z_NWF[:, t])
    means_L = torch.nanmean(buffer.correlations(), dim=1).tolist()
    return {f"lag_correlation_{lag}": value for lag, value in enumerate(means_L, start=1)}


def near_duplicates(W_dec: Tensor) -> float:
    """Share of decoder rows (of an evenly spaced sample) that have a cosine above 0.95 with another row."""
    rows_FD = torch.nn.functional.normalize(W_dec, dim=-1)
    sampled = torch.linspace(0, len(rows_FD) - 1, min(_SAMPLED_ROWS, len(rows_FD)), device=W_dec.device).long()
    cosines = rows_FD[sampled] @ rows_FD.T
    cosines[torch.arange(len(sampled), device=W_dec.device), sampled] = -1
    return float((cosines.max(dim=-1).values > _NEAR).float().mean())
