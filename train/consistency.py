"""The temporal terms and their gradients on active entries alone.

Each term compares pairs of tokens, and its gradient at z_t[i] needs their z[i] only; where z_t[i] is not active, neither relu
nor topk passes a gradient on. So the work is one lookup per active entry and compared token, and no [N, F] matrix is made:

    pairwise     Σ (z_t − z_s)²: 2 (z_t − z_s) for every s compared with t
    window_mean  Σ_t (z_t − z̄)² = (1/W) Σ_{t<s} (z_t − z_s)²: pairwise over all pairs of a window

Pairs are counted from both sides: an entry whose partner is active too brings half of the pair's share, one whose partner is not
brings all of it. This sums small differences, never large products, and so loses no digits where codes hardly change.

Shapes: N windows, W positions, F features, M = N·W tokens, P pairs, R the most tokens that one token is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import losses
from .codes import Codes
from .objective import TemporalTerm

_TINY = 1e-12  # as in losses.py


def temporal(
    codes: Codes, term: TemporalTerm, windows: tuple[int, int], partner_NP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What :func:`.losses.temporal` says of the codes, and its gradient at their active entries.

    Args:
        codes: of N·W tokens, window after window.
        term: form, partner and scope; its weight is not applied.
        windows: N and W.
        partner_NP: see :func:`.losses.pairs`.

    """
    if term.form == "contrastive":
        return _through_autograd(codes, term, windows, partner_NP)
    own_P, other_P = _pairs(term, windows, partner_NP, codes.value.device)
    if own_P.numel() == 0:
        return codes.value.new_zeros(()), torch.zeros_like(codes.value)
    compared = _Compared(codes, term, _neighbours(own_P, other_P, codes.shape[0]), own_P.numel())
    if term.form == "window_mean":
        # (1/M)(1/W) Σ over pairs, where pairwise takes the mean over P pairs.
        n_windows, w = windows
        share = own_P.numel() / (n_windows * w * w)
        loss, gradient = compared.differences(squared=True)
        return loss * share, gradient * share
    if term.partner == "l2":
        return compared.squared_norms()
    if term.form == "cosine":
        return compared.cosine()
    if term.form == "normalised":
        return compared.normalised()
    return compared.differences(squared=term.form == "pairwise")


class _Compared:
    """Codes and, for each token, the tokens [R, M] it is compared with (−1: fewer than R)."""

    def __init__(self, codes: Codes, term: TemporalTerm, rows_RM: Tensor, n_pairs: int):
        self.codes, self.rows_RM, self.n_pairs = codes, rows_RM, n_pairs
        n_features = codes.shape[1]
        # Outside its scope the term sees zeros, and its gradient is zero.
        inside_F = torch.arange(n_features, device=codes.value.device) < term.n_features
        self.scope = None if term.n_features >= n_features else codes.of_columns(inside_F.to(codes.value.dtype))
        self.value = codes.value if self.scope is None else codes.value * self.scope

    def others(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each of the R: the row compared with, its codes at the active entries, and 1 where there is one, else 0."""
        for rows_M in self.rows_RM:
            other, exists = self.codes.at_rows(rows_M)
            yield rows_M, other if self.scope is None else other.mul_(self.scope), exists

    def differences(self, *, squared: bool) -> tuple[Tensor, Tensor]:
        """Mean over pairs of Σ (a − b)² or Σ |a − b|."""
        loss, gradient = self.value.new_zeros(()), torch.zeros_like(self.value)
        for _, other, exists in self.others():
            share = (other > 0).to(other.dtype).mul_(-0.5).add_(1)
            difference = self.codes.restricted(torch.sub(self.value, other, out=other).mul_(exists))
            gradient.add_(difference if squared else difference.sign(), alpha=2 if squared else 1)
            loss += share.mul_(difference.square_() if squared else difference.abs_()).sum()
        return loss / self.n_pairs, gradient.div_(self.n_pairs)

    def normalised(self) -> tuple[Tensor, Tensor]:
        """Pairwise divided by the mean over tokens of Σ z²."""
        loss, gradient = self.differences(squared=True)
        n_tokens = self.codes.shape[0]
        size = self.value.square().sum() / n_tokens
        scale = 1 / size.clamp(min=_TINY)
        slope = torch.where(size > _TINY, -2 / n_tokens * loss * scale * scale, 0)
        return loss * scale, gradient.mul_(scale).add_(self.value * slope)

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Mean over pairs of ‖a‖² + ‖b‖²."""
        times_M = (self.rows_RM >= 0).sum(0).to(self.value.dtype) / self.n_pairs
        gradient = self.value * self.codes.of_rows(times_M)
        return (gradient * self.value).sum(), gradient.mul_(2)

    def cosine(self) -> tuple[Tensor, Tensor]:
        """Mean over pairs of 1 − cos(a, b)."""
        codes = self.codes
        inverse_M = torch.rsqrt(codes.row_sums(self.value.square()) + _TINY)
        gradient = torch.zeros_like(self.value)
        total = self.value.new_zeros(())
        for rows_M, other, _ in self.others():
            scale_M = inverse_M * inverse_M.index_select(0, rows_M.clamp(min=0))
            cosine_M = codes.row_sums(self.value * other) * scale_M
            total += cosine_M.sum()
            # d cos(a, b) / da = b / (‖a‖‖b‖) − cos(a, b) a / ‖a‖²
            along = codes.of_rows(cosine_M * inverse_M.square())
            gradient.sub_(other.mul_(codes.of_rows(scale_M))).add_(self.value * along)
        return 1 - total / (2 * self.n_pairs), codes.restricted(gradient.div_(self.n_pairs))


def _pairs(
    term: TemporalTerm, windows: tuple[int, int], partner_NP: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The compared tokens as two lists [P] of flat indices n·W + t."""
    n_windows, w = windows
    tokens = torch.arange(n_windows * w, device=device).view(n_windows, w)
    if term.form == "window_mean":
        first, second = torch.triu_indices(w, w, offset=1, device=device)
        return tokens[:, first].reshape(-1), tokens[:, second].reshape(-1)
    if partner_NP is None:
        return tokens[:, : max(0, w - term.lag)].reshape(-1), tokens[:, term.lag :].reshape(-1)
    exists = partner_NP >= 0
    return tokens[:, :-1][exists], partner_NP[exists]


def _neighbours(own_P: Tensor, other_P: Tensor, n_tokens: int) -> Tensor:
    """Whom each token is compared with, from both sides: [R, M], −1 where a token has fewer than R."""
    one, another = torch.cat([own_P, other_P]), torch.cat([other_P, own_P])
    counts = torch.bincount(one, minlength=n_tokens)
    starts = counts.cumsum(0) - counts
    one, order = torch.sort(one, stable=True)
    rank = torch.arange(one.numel(), device=one.device) - starts[one]
    rows = one.new_full((int(counts.max()), n_tokens), -1)
    rows[rank, one] = another[order]
    return rows


def _through_autograd(
    codes: Codes, term: TemporalTerm, windows: tuple[int, int], partner_NP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A term whose pairs all see each other, so that nothing is sparse about it."""
    with torch.enable_grad():
        z_NWF = codes.dense().view(*windows, -1).requires_grad_()
        loss = losses.temporal(z_NWF, term, partner_NP)
        (gradient,) = torch.autograd.grad(loss, z_NWF)
    return loss.detach(), codes.gathered(gradient.view(codes.shape))
