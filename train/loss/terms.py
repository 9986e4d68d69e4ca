"""The terms of the loss as pure functions; each cites its equation.

Shapes: N windows, W positions of a window, D model width, F features, P pairs. Every window holds consecutive, valid
tokens of one document, so every pair inside a window is valid. All terms are means over tokens, pairs or windows,
summed over width. "Paper" is the TC-SAE paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .objective import TemporalTerm
from .registry import TERMS, temporal_term

_TINY = 1e-12


def reconstruction(x_NWD: Tensor, reconstruction_NWD: Tensor) -> Tensor:
    """Mean over tokens of Σ_d (x − x̂)² (paper, eq 7, first term)."""
    return (x_NWD - reconstruction_NWD).pow(2).sum(-1).mean()


def l1(z_NWF: Tensor, row_norms_F: Tensor | None = None) -> Tensor:
    """Mean over tokens of Σ_i z_i, each weighted with its decoder row's norm if given (paper, eq 7, second term)."""
    return (z_NWF if row_norms_F is None else z_NWF * row_norms_F).sum(-1).mean()


@dataclass(frozen=True)
class Pairs:
    """Which tokens of a batch a temporal term compares.

    Attributes:
        lag: distance of the two, where they lie in one window.
        partner_NP: None: every (t, t + lag) inside a window. Otherwise [N, W−1], the flat index n·W + t of the token
            that token t of window n is compared with, −1 for none.
        x_NWD: the scaled activations that the codes are of; None where nobody has them.
        similarity, temperature: of the ``contrastive`` term.

    """

    lag: int = 1
    partner_NP: Tensor | None = None
    x_NWD: Tensor | None = None
    similarity: str = "cosine"
    temperature: float = 0.1

    def of(self, values_NWX: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of every pair: two tensors [P, X] from values [N, W, X] of the tokens (codes, activations …)."""
        n, w, width = values_NWX.shape
        if self.partner_NP is None:
            return values_NWX[:, : w - self.lag].reshape(-1, width), values_NWX[:, self.lag :].reshape(-1, width)
        own = torch.arange(n * w, device=values_NWX.device).view(n, w)[:, :-1]
        exists = self.partner_NP >= 0
        flat = values_NWX.reshape(-1, width)
        return flat[own[exists]], flat[self.partner_NP[exists]]

    def window(self, z_NWF: Tensor) -> Tensor | None:
        """The window of every pair [P]; None where the two sides come from different windows."""
        if self.partner_NP is not None:
            return None
        return torch.arange(len(z_NWF), device=z_NWF.device).repeat_interleave(z_NWF.shape[1] - self.lag)


def temporal(
    z_NWF: Tensor, term: TemporalTerm, partner_NP: Tensor | None = None, x_NWD: Tensor | None = None
) -> Tensor:
    """L_temp of the batch: the term's form over its pairs (or windows), within its scope.

    Zero where the batch has no pair.
    """
    z_NWF = z_NWF[..., : term.n_features]
    if term.feature_weights is not None:
        degree = TERMS.get(term.form).degree
        assert degree is not None  # noqa: S101 - checked with the configuration
        z_NWF = z_NWF * term.feature_weights[: term.n_features].pow(1 / degree).to(z_NWF.dtype)
    form, pairs = TERMS.get(term.form), Pairs(term.lag, partner_NP, x_NWD, term.similarity, term.temperature)
    has_pairs = z_NWF.shape[1] > term.lag if partner_NP is None else bool((partner_NP >= 0).any())
    if not (form.whole_windows or has_pairs):
        return z_NWF.sum() * 0
    return form.function(z_NWF, pairs)


@temporal_term("pairwise", degree=2)
def pairwise(z_NWF: Tensor, pairs: Pairs) -> Tensor:
    """Mean over pairs of Σ_i (a − b)² (paper, eq 2 = eq 6)."""
    a_PF, b_PF = pairs.of(z_NWF)
    return (a_PF - b_PF).pow(2).sum(-1).mean()


@temporal_term("window_mean", whole_windows=True, least_window=1, degree=2)
def window_mean(z_NWF: Tensor, pairs: Pairs) -> Tensor:  # noqa: ARG001 - a window is compared with its own mean
    """Mean over tokens of Σ_i (z_t − z̄)², z̄ the window's mean, gradient through z̄ (paper, text of section 4.2)."""
    return (z_NWF - z_NWF.mean(1, keepdim=True)).pow(2).sum(-1).mean()


@temporal_term("normalised", mean_over_windows=False)
def normalised(z_NWF: Tensor, pairs: Pairs) -> Tensor:
    """Pairwise over the batch's mean of Σ_i z_i²: shrinking earns nothing."""
    return pairwise(z_NWF, pairs) / z_NWF.pow(2).sum(-1).mean().clamp(min=_TINY)


@temporal_term("cosine")
def cosine(z_NWF: Tensor, pairs: Pairs) -> Tensor:
    """Mean over pairs of 1 − cos(a, b); a pair with an all-zero code counts as cos = 0."""
    a_PF, b_PF = pairs.of(z_NWF)
    return 1 - (_unit(a_PF) * _unit(b_PF)).sum(-1).mean()


@temporal_term("l1", degree=1)
def absolute(z_NWF: Tensor, pairs: Pairs) -> Tensor:
    """Mean over pairs of Σ_i |a − b|."""
    a_PF, b_PF = pairs.of(z_NWF)
    return (a_PF - b_PF).abs().sum(-1).mean()


@temporal_term("squared_norms", degree=2)
def squared_norms(z_NWF: Tensor, pairs: Pairs) -> Tensor:
    """Mean over pairs of ‖a‖² + ‖b‖²: pairwise without its cross term. The partner ``l2``, a control for shrinkage."""
    a_PF, b_PF = pairs.of(z_NWF)
    return (a_PF.pow(2) + b_PF.pow(2)).sum(-1).mean()


@temporal_term("contrastive", mean_over_windows=False)
def contrastive(z_NWF: Tensor, pairs: Pairs) -> Tensor:
    """Symmetric InfoNCE: among all b, a's own partner should be the most similar, and the other way round.

    Similarity is the cosine (paper of Temporal SAE, arXiv 2511.05541) or the raw dot product (its code), over the
    temperature. Pairs of one window are no negatives of each other: they share tokens, and z_t would be its own
    negative.
    """
    a_PF, b_PF = pairs.of(z_NWF)
    if pairs.similarity == "cosine":
        a_PF, b_PF = _unit(a_PF), _unit(b_PF)
    logits_PP = a_PF @ b_PF.T / pairs.temperature
    window_P = pairs.window(z_NWF)
    if window_P is not None:
        related = (window_P[:, None] == window_P[None, :]).fill_diagonal_(False)
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


def variance(residual_ND: Tensor) -> Tensor:
    """Mean over tokens of Σ_d (e − ē)², ē the batch's mean: what AuxK is divided by where it is normalised."""
    return (residual_ND - residual_ND.mean(0)).pow(2).sum(-1).mean().clamp(min=_TINY)


def _unit(a_PF: Tensor) -> Tensor:
    # Not functional.normalize: the gradient of a norm at an all-zero code would be NaN.
    return a_PF * torch.rsqrt(a_PF.pow(2).sum(-1, keepdim=True) + _TINY)


def at_least_float32(value: Tensor) -> Tensor:
    """Losses are computed in float32 or better: what autocast made bfloat16 is widened."""
    return value.float() if value.dtype.itemsize < 4 else value
