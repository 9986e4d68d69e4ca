"""The terms of the loss as pure functions; each cites its equation.

Shapes: N windows, W positions of a window, D model width, F features, P pairs. Every window holds consecutive, valid
tokens of one document, so every pair inside a window is valid. All terms are means over tokens, pairs or windows,
summed over width. "Paper" is the TC-SAE paper.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .objective import TemporalTerm

_TINY = 1e-12


def reconstruction(x_NWD: Tensor, reconstruction_NWD: Tensor) -> Tensor:
    """Mean over tokens of Σ_d (x − x̂)² (paper, eq 7, first term)."""
    return (x_NWD - reconstruction_NWD).pow(2).sum(-1).mean()


def l1(z_NWF: Tensor, row_norms_F: Tensor | None = None) -> Tensor:
    """Mean over tokens of Σ_i z_i, each weighted with its decoder row's norm if given (paper, eq 7, second term)."""
    return (z_NWF if row_norms_F is None else z_NWF * row_norms_F).sum(-1).mean()


def pairs(z_NWF: Tensor, lag: int = 1, partner_NP: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The codes to be compared, two tensors [P, F].

    Without ``partner_NP``: every (t, t + lag) inside a window. With it ([N, W−1], flat index n·W + t of a token of the
    batch, −1 for none): token t of window n and its partner.
    """
    n, w, f = z_NWF.shape
    if partner_NP is None:
        return z_NWF[:, : w - lag].reshape(-1, f), z_NWF[:, lag:].reshape(-1, f)
    own = torch.arange(n * w, device=z_NWF.device).view(n, w)[:, :-1]
    exists = partner_NP >= 0
    flat = z_NWF.reshape(-1, f)
    return flat[own[exists]], flat[partner_NP[exists]]


def temporal(z_NWF: Tensor, term: TemporalTerm, partner_NP: Tensor | None = None) -> Tensor:
    """L_temp of the batch: the term's form over its pairs (or windows), within its scope.

    Zero where the batch has no pair.
    """
    z_NWF = z_NWF[..., : term.n_features]
    if term.form == "window_mean":
        return window_mean(z_NWF)
    a, b = pairs(z_NWF, term.lag, partner_NP)
    if len(a) == 0:
        return z_NWF.sum() * 0
    if term.partner == "l2":
        return squared_norms(a, b)
    if term.form == "normalised":
        return pairwise(a, b) / z_NWF.pow(2).sum(-1).mean().clamp(min=_TINY)
    if term.form == "contrastive":
        window_P = (
            None
            if partner_NP is not None
            else torch.arange(len(z_NWF), device=a.device).repeat_interleave(z_NWF.shape[1] - term.lag)
        )
        return contrastive(a, b, term.temperature, cosine_similarity=term.similarity == "cosine", group_P=window_P)
    return {"pairwise": pairwise, "cosine": cosine, "l1": absolute}[term.form](a, b)


def pairwise(a_PF: Tensor, b_PF: Tensor) -> Tensor:
    """Mean over pairs of Σ_i (a − b)² (paper, eq 2 = eq 6)."""
    return (a_PF - b_PF).pow(2).sum(-1).mean()


def window_mean(z_NWF: Tensor) -> Tensor:
    """Mean over tokens of Σ_i (z_t − z̄)², z̄ the window's mean, gradient through z̄ (paper, text of section 4.2)."""
    return (z_NWF - z_NWF.mean(1, keepdim=True)).pow(2).sum(-1).mean()


def squared_norms(a_PF: Tensor, b_PF: Tensor) -> Tensor:
    """Mean over pairs of ‖a‖² + ‖b‖²: the pairwise term without its cross term, the control for shrinkage."""
    return (a_PF.pow(2) + b_PF.pow(2)).sum(-1).mean()


def cosine(a_PF: Tensor, b_PF: Tensor) -> Tensor:
    """Mean over pairs of 1 − cos(a, b); a pair with an all-zero code counts as cos = 0."""
    return 1 - (_unit(a_PF) * _unit(b_PF)).sum(-1).mean()


def absolute(a_PF: Tensor, b_PF: Tensor) -> Tensor:
    """Mean over pairs of Σ_i |a − b|."""
    return (a_PF - b_PF).abs().sum(-1).mean()


def contrastive(
    a_PF: Tensor, b_PF: Tensor, temperature: float, *, cosine_similarity: bool, group_P: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE: among all b, a's own partner should be the most similar, and the other way round.

    Similarity is the cosine (paper of Temporal SAE, arXiv 2511.05541) or the raw dot product (its code), over
    ``temperature``. Pairs of one ``group_P`` (a window) are no negatives of each other: they share tokens, and z_t
    would be its own negative.
    """
    if cosine_similarity:
        a_PF, b_PF = _unit(a_PF), _unit(b_PF)
    logits_PP = a_PF @ b_PF.T / temperature
    if group_P is not None:
        related = (group_P[:, None] == group_P[None, :]).fill_diagonal_(False)
        logits_PP = logits_PP.masked_fill(related, float("-inf"))
    own_P = torch.arange(len(a_PF), device=a_PF.device)
    return (functional.cross_entropy(logits_PP, own_P) + functional.cross_entropy(logits_PP.T, own_P)) / 2


def aux_k(residual_ND: Tensor, pre_NF: Tensor, W_dec: Tensor, dead_F: Tensor, k: int) -> Tensor:
    """Mean over tokens of ‖e − ê‖², ê the reconstruction of the residual e by the k strongest dead features.

    ``residual_ND`` is a target: pass it detached. Zero where no feature is dead (arXiv 2406.04093, appendix A.2).
    """
    dead = dead_F.nonzero().squeeze(-1)
    if len(dead) == 0:
        return pre_NF.new_zeros(())
    strongest = torch.topk(pre_NF[:, dead], min(k, len(dead)), dim=-1, sorted=False)
    codes = torch.zeros_like(pre_NF[:, dead]).scatter(-1, strongest.indices, torch.relu(strongest.values))
    return (residual_ND - codes @ W_dec[dead]).pow(2).sum(-1).mean()


def _unit(a_PF: Tensor) -> Tensor:
    # Not functional.normalize: the gradient of a norm at an all-zero code would be NaN.
    return a_PF * torch.rsqrt(a_PF.pow(2).sum(-1, keepdim=True) + _TINY)
