"""The temporal terms and their gradients on active entries alone.

Each term compares pairs of tokens, and its gradient at z_t[i] needs their z[i] only; where z_t[i] is not active, neither relu
nor topk passes a gradient on. So the work is one lookup per active entry and compared token, and no [N, F] matrix is made:

    pairwise     Σ (z_t − z_s)²: 2 (z_t − z_s) for every s compared with t
    window_mean  Σ_t (z_t − z̄)² = (1/W) Σ_{t<s} (z_t − z_s)²: pairwise over all pairs of a window

Pairs are counted from both sides: an entry that meets an active one brings half of what the pair has there, one that meets
none brings all of it. This sums small differences, never large products, and loses no digits where codes hardly change.

Shapes: N windows, W positions, F features, M = N·W tokens, P pairs, R the most tokens that one token is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import losses
from .codes import Codes, DenseCodes, SparseCodes
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
    if isinstance(codes, DenseCodes) or term.form == "contrastive":
        return _through_autograd(codes, term, windows, partner_NP)
    own_P, other_P = _pairs(term, windows, partner_NP, codes.value.device)
    if own_P.numel() == 0:
        return codes.value.new_zeros(()), torch.zeros_like(codes.value)
    compared = _Compared(codes, term, own_P, other_P)
    if term.form == "window_mean":
        # (1/M)(1/W) Σ over pairs, where pairwise takes the mean over P pairs.
        n_windows, w = windows
        share = own_P.numel() / (n_windows * w * w)
        loss, gradient = compared.squares()
        return loss * share, gradient.mul_(share)
    if term.partner == "l2":
        return compared.norms()
    forms = {"pairwise": compared.squares, "normalised": compared.normalised, "l1": compared.absolute}
    return forms.get(term.form, compared.cosine)()


class _Compared:
    """Codes and pairs of tokens, as the tokens that each token is compared with."""

    def __init__(self, codes: SparseCodes, term: TemporalTerm, own_P: Tensor, other_P: Tensor):
        self.codes, self.n_pairs = codes, own_P.numel()
        self.rows_RM, self.meets_RM = _neighbours(own_P, other_P, codes.shape[0])
        n_features = codes.shape[1]
        # Outside its scope the term sees zeros, and its gradient is zero.
        inside_F = torch.arange(n_features, device=codes.value.device) < term.n_features
        self.scope = None if term.n_features >= n_features else codes.of_columns(inside_F.to(codes.value.dtype))
        self.value = codes.value if self.scope is None else codes.value * self.scope

    def others(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each of the R: the rows compared with, and their codes at the active entries."""
        for rows_M in self.rows_RM:
            other = self.codes.at_rows(rows_M)
            yield rows_M, other if self.scope is None else other.mul_(self.scope)

    def squares(self) -> tuple[Tensor, Tensor]:
        """Mean over pairs of Σ (a − b)²."""
        loss, gradient = self.value.new_zeros(()), torch.zeros_like(self.value)
        for _, other in self.others():
            met = other > 0
            difference = torch.sub(self.value, other, out=other)
            gradient.add_(difference)
            loss += torch.dot(difference, difference)
            difference.masked_fill_(met, 0)
            loss += torch.dot(difference, difference)
        return loss / (2 * self.n_pairs), gradient.mul_(2 / self.n_pairs)

    def absolute(self) -> tuple[Tensor, Tensor]:
        """Mean over pairs of Σ |a − b|."""
        loss, gradient = self.value.new_zeros(()), torch.zeros_like(self.value)
        for _, other in self.others():
            met = other > 0
            difference = torch.sub(self.value, other, out=other)
            gradient.add_(difference.sign())
            loss += difference.abs_().sum()
            loss += difference.masked_fill_(met, 0).sum()
        return loss / (2 * self.n_pairs), gradient.div_(self.n_pairs)

    def normalised(self) -> tuple[Tensor, Tensor]:
        """Pairwise divided by the mean over tokens of Σ z²."""
        loss, gradient = self.squares()
        n_tokens = self.codes.shape[0]
        size = self.value.square().sum() / n_tokens
        scale = 1 / size.clamp(min=_TINY)
        slope = torch.where(size > _TINY, -2 / n_tokens * loss * scale * scale, 0)
        return loss * scale, gradient.mul_(scale).add_(self.value * slope)

    def norms(self) -> tuple[Tensor, Tensor]:
        """Mean over pairs of ‖a‖² + ‖b‖²."""
        times_M = self.meets_RM.sum(0).to(self.value.dtype) / self.n_pairs
        gradient = self.value * self.codes.of_rows(times_M)
        return torch.dot(gradient, self.value), gradient.mul_(2)

    def cosine(self) -> tuple[Tensor, Tensor]:
        """Mean over pairs of 1 − cos(a, b)."""
        codes = self.codes
        inverse_M = torch.rsqrt(codes.row_sums(self.value.square()) + _TINY)
        loss, gradient = self.value.new_ones(()), torch.zeros_like(self.value)
        for (rows_M, other), meets_M in zip(self.others(), self.meets_RM, strict=True):
            scale_M = inverse_M * inverse_M.index_select(0, rows_M) * meets_M
            cosine_M = codes.row_sums(self.value * other) * scale_M
            loss -= cosine_M.sum() / (2 * self.n_pairs)
            # d cos(a, b) / da = b / (‖a‖‖b‖) − cos(a, b) a / ‖a‖²
            along = codes.of_rows(cosine_M * inverse_M.square())
            gradient.sub_(other.mul_(codes.of_rows(scale_M))).add_(self.value * along)
        return loss, gradient.div_(self.n_pairs)


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


def _neighbours(own_P: Tensor, other_P: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Whom each token is compared with, from both sides: rows [R, M], and a mask of those that are real.

    Where a token has fewer than R, it stands in itself: it does not differ from itself.
    """
    one, another = torch.cat([own_P, other_P]), torch.cat([other_P, own_P])
    counts = torch.bincount(one, minlength=n_tokens)
    starts = counts.cumsum(0) - counts
    one, order = torch.sort(one, stable=True)
    rank = torch.arange(one.numel(), device=one.device) - starts[one]
    rows = torch.arange(n_tokens, device=one.device).repeat(int(counts.max()), 1)
    rows[rank, one] = another[order]
    meets = torch.zeros_like(rows, dtype=torch.bool)
    meets[rank, one] = True
    return rows, meets


def _through_autograd(
    codes: Codes, term: TemporalTerm, windows: tuple[int, int], partner_NP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The term and its gradient from whole matrices, where nothing is sparse about them."""
    z_NWF = codes.dense().view(*windows, -1)
    if term.form == "pairwise" and term.partner != "l2" and partner_NP is None:
        return _pairwise(codes, z_NWF, term)
    with torch.enable_grad():
        z_NWF = z_NWF.detach().requires_grad_()
        loss = losses.temporal(z_NWF, term, partner_NP)
        (gradient,) = torch.autograd.grad(loss, z_NWF)
    return loss.detach(), codes.gathered(gradient.view(codes.shape))


def _pairwise(codes: Codes, z_NWF: Tensor, term: TemporalTerm) -> tuple[Tensor, Tensor]:
    """The paper's own form, by hand in half the passes over memory."""
    w, lag, inside = z_NWF.shape[1], term.lag, slice(0, term.n_features)
    gradient = torch.zeros_like(z_NWF)
    difference = z_NWF[:, : max(0, w - lag), inside] - z_NWF[:, lag:, inside]
    n_pairs = max(1, difference.shape[0] * difference.shape[1])
    gradient[:, : max(0, w - lag), inside].add_(difference, alpha=2 / n_pairs)
    gradient[:, lag:, inside].sub_(difference, alpha=2 / n_pairs)
    return torch.dot(difference.view(-1), difference.view(-1)) / n_pairs, gradient.view(codes.shape)
