"""The temporal terms and their gradients on active entries alone.

Each term compares pairs of tokens, and its gradient at z_t[i] needs their z[i] only; where z_t[i] is not active,
neither relu nor topk passes a gradient on. So the work is one lookup per active entry and compared token, and no [R, F]
matrix is made:

    pairwise     Σ (z_t − z_s)²: 2 (z_t − z_s) for every s compared with t
    window_mean  Σ_t (z_t − z̄)² = (1/W) Σ_{t<s} (z_t − z_s)²: pairwise over all pairs of a window

The value of a term is read off its gradient: both are homogeneous (Σ (z_t − z_s)² of degree 2, Σ |z_t − z_s| of degree
1), so by Euler's theorem z·∂L/∂z is the degree times L, and where z is not active it adds nothing.

Members that see the same tokens are compared in one go (:mod:`.active_entries`): a member without the term, or with
another form of it, has no pairs in it.

Shapes: M members, N windows, W positions, F features, R = M·N·W rows, P pairs, K the most tokens that one is compared
with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..loss import terms as loss_terms
from ..loss.objective import TemporalTerm
from .active_entries import Codes, DenseCodes, SparseCodes
from .registry import GRADIENTS, temporal_gradient

_TINY = 1e-12  # as in terms.py


def add_temporal(
    slope: Tensor,
    codes: Codes,
    terms: Sequence[TemporalTerm],
    windows: tuple[int, int],
    partners: Sequence[Tensor | None],
    *,
    halves: bool = False,
) -> Tensor:
    """What :func:`..loss.terms.temporal` says of every member's codes [M]; λ2 times its gradient is added to ``slope``.

    Args:
        slope: ∂L/∂z at the active entries, like the codes' ``value``.
        codes: of N·W tokens, window after window, and so for every member.
        terms: of every member.
        windows: N and W.
        partners: of every member, [N, W−1], see :class:`..loss.terms.Pairs`.
        halves: rows are those of a single member, not window after window, but first all tokens at position 0, then all
            at position 1.

    """
    n_windows, w = windows
    row_NW = torch.arange(n_windows * w, device=codes.value.device)
    row_NW = row_NW.view(w, n_windows).t() if halves else row_NW.view(n_windows, w)
    loss_M = codes.value.new_zeros(codes.n_members)
    for chosen in _by_form(terms):
        gradient = GRADIENTS.get(terms[chosen[0]].form)
        if isinstance(codes, DenseCodes) or gradient is contrastive:
            loss_M += _of_matrices(slope, codes, terms, chosen, windows, partners, halves=halves)
            continue
        pairs = [_pairs(terms[m], row_NW, partners[m]) for m in chosen]
        if any(own_P.numel() for own_P, _ in pairs):
            compared = Compared(codes, terms, dict(zip(chosen, pairs, strict=True)), windows)
            loss_M += gradient(compared, slope)
    return loss_M


def _by_form(terms: Sequence[TemporalTerm]) -> list[list[int]]:
    """The members with an active term, those of one form together."""
    forms: dict[str, list[int]] = {}
    for member, term in enumerate(terms):
        if term.active:
            forms.setdefault(term.form, []).append(member)
    return list(forms.values())


class Compared:
    """Codes, and for every token the tokens that it is compared with; of the members whose pairs are given."""

    def __init__(
        self,
        codes: SparseCodes,
        terms: Sequence[TemporalTerm],
        pairs: dict[int, tuple[Tensor, Tensor]],
        windows: tuple[int, int],
    ):
        self.codes, self.term = codes, terms[min(pairs)]
        self.n_tokens = windows[0] * windows[1]
        counts = [pairs[m][0].numel() if m in pairs else 0 for m in range(codes.n_members)]
        if self.term.form == "window_mean":  # (1/N·W)(1/W) Σ over pairs, where pairwise takes their mean
            counts = [windows[0] * windows[1] ** 2 if count else 0 for count in counts]
        self.share = [1 / count if count else 0.0 for count in counts]
        self.pull = [term.weight * share for term, share in zip(terms, self.share, strict=True)]
        own_P = torch.cat([own_P + m * self.n_tokens for m, (own_P, _) in pairs.items()])
        other_P = torch.cat([other_P + m * self.n_tokens for m, (_, other_P) in pairs.items()])
        self.rows_KR, self.meets_KR = _neighbours(own_P, other_P, codes.shape[0])
        self.scope, self.weight = _scope(codes, terms), _feature_weights(codes, terms)
        self.value = codes.value if self.scope is None else codes.value * self.scope

    def others(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each of the K: the rows compared with, and their codes at the active entries."""
        for rows_R in self.rows_KR:
            other = self.codes.at_rows(rows_R)
            yield rows_R, other if self.scope is None else other.mul_(self.scope)

    def weighed(self, values: Tensor) -> Tensor:
        """``values``, in place, each times its feature's weight."""
        return values if self.weight is None else values.mul_(self.weight)


@temporal_gradient("window_mean")
@temporal_gradient("pairwise")
def squares(compared: Compared, slope: Tensor, factor: Sequence[float] | None = None) -> Tensor:
    """Mean over pairs of Σ (a − b)²; the gradient takes a ``factor`` of each member's."""
    pull = [2 * p * f for p, f in zip(compared.pull, factor or [1.0] * len(compared.pull), strict=True)]
    loss_M = slope.new_zeros(len(pull))
    for _, other in compared.others():
        difference = compared.weighed(torch.sub(compared.value, other, out=other))
        compared.codes.add(slope, difference, pull)
        loss_M += compared.codes.dots(compared.value, difference)
    return loss_M.mul_(loss_M.new_tensor(compared.share))


@temporal_gradient("l1")
def absolute(compared: Compared, slope: Tensor) -> Tensor:
    """Mean over pairs of Σ |a − b|."""
    loss_M = slope.new_zeros(len(compared.pull))
    for _, other in compared.others():
        sign = compared.weighed(torch.sub(compared.value, other, out=other).sign_())
        compared.codes.add(slope, sign, compared.pull)
        loss_M += compared.codes.dots(compared.value, sign)
    return loss_M.mul_(loss_M.new_tensor(compared.share))


@temporal_gradient("normalised")
def normalised(compared: Compared, slope: Tensor) -> Tensor:
    """Pairwise divided by the mean over tokens of Σ z²."""
    codes, share = compared.codes, compared.share
    size_M = codes.dots(compared.value, compared.value) / compared.n_tokens
    scale_M = 1 / size_M.clamp(min=_TINY)
    loss_M = squares(compared, slope, scale_M.tolist()) * scale_M
    weights_M = scale_M.new_tensor([p / s if s else 0.0 for p, s in zip(compared.pull, share, strict=True)])
    shrink_M = torch.where(size_M > _TINY, -2 / compared.n_tokens * loss_M * scale_M * weights_M, 0)
    codes.add(slope, compared.value, shrink_M.tolist())
    return loss_M


@temporal_gradient("squared_norms")
def norms(compared: Compared, slope: Tensor) -> Tensor:
    """Mean over pairs of ‖a‖² + ‖b‖²."""
    times_R = compared.meets_KR.sum(0).to(compared.value.dtype)
    gradient = compared.weighed(compared.value * compared.codes.of_rows(times_R))
    compared.codes.add(slope, gradient, [2 * p for p in compared.pull])
    return compared.codes.dots(gradient, compared.value).mul_(times_R.new_tensor(compared.share))


@temporal_gradient("cosine")
def cosine(compared: Compared, slope: Tensor) -> Tensor:
    """Mean over pairs of 1 − cos(a, b)."""
    codes = compared.codes
    inverse_R = torch.rsqrt(codes.row_sums(compared.value.square()) + _TINY)
    loss_M = inverse_R.new_tensor([float(share > 0) for share in compared.share])
    share_M = inverse_R.new_tensor(compared.share)
    for (rows_R, other), meets_R in zip(compared.others(), compared.meets_KR, strict=True):
        scale_R = inverse_R * inverse_R.index_select(0, rows_R) * meets_R
        cosine_R = codes.row_sums(compared.value * other) * scale_R
        loss_M -= cosine_R.view(len(loss_M), -1).sum(1) * share_M / 2
        # d cos(a, b) / da = b / (‖a‖‖b‖) − cos(a, b) a / ‖a‖²
        along = codes.of_rows(cosine_R * inverse_R.square())
        codes.add(slope, (compared.value * along).sub_(other.mul_(codes.of_rows(scale_R))), compared.pull)
    return loss_M


@temporal_gradient("contrastive")
def contrastive(compared: Compared, slope: Tensor) -> Tensor:
    """All pairs meet all others: taken from whole matrices, see :func:`_of_matrices`."""
    raise NotImplementedError


def _scope(codes: SparseCodes, terms: Sequence[TemporalTerm]) -> Tensor | None:
    """1 at the active entries that their member's term sees, else 0: outside its scope a term sees zeros, and pulls at
    none.
    """
    n_features = codes.shape[1]
    if all(term.n_features >= n_features for term in terms if term.active):
        return None
    number_F = torch.arange(n_features, device=codes.value.device)
    return codes.of_columns(torch.cat([number_F < term.n_features for term in terms]).to(codes.value.dtype))


def _feature_weights(codes: SparseCodes, terms: Sequence[TemporalTerm]) -> Tensor | None:
    """λ2 of the entries' features in units of their member's; None where it is the same for all."""
    if all(term.feature_weights is None for term in terms):
        return None
    ones_F = codes.value.new_ones(codes.shape[1])
    weights = [ones_F if term.feature_weights is None else term.feature_weights.to(ones_F) for term in terms]
    return codes.of_columns(torch.cat(weights))


def _pairs(term: TemporalTerm, row_NW: Tensor, partner_NP: Tensor | None) -> tuple[Tensor, Tensor]:
    """The compared tokens as two lists [P] of rows; ``row_NW`` is that of every token."""
    w = row_NW.shape[1]
    if term.form == "window_mean":
        first, second = torch.triu_indices(w, w, offset=1, device=row_NW.device)
        return row_NW[:, first].reshape(-1), row_NW[:, second].reshape(-1)
    if partner_NP is None:
        return row_NW[:, : max(0, w - term.lag)].reshape(-1), row_NW[:, term.lag :].reshape(-1)
    exists = partner_NP >= 0
    return row_NW[:, :-1][exists], row_NW.reshape(-1)[partner_NP[exists]]


def _neighbours(own_P: Tensor, other_P: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Whom each token is compared with, from both sides: rows [K, R], and a mask of those that are real.

    Where a token has fewer than K, it stands in itself: it does not differ from itself.
    """
    one, another = torch.cat([own_P, other_P]), torch.cat([other_P, own_P])
    counts = torch.bincount(one, minlength=n_rows)
    starts = counts.cumsum(0) - counts
    one, order = torch.sort(one, stable=True)
    rank = torch.arange(one.numel(), device=one.device) - starts[one]
    rows = torch.arange(n_rows, device=one.device).repeat(int(counts.max()), 1)
    rows[rank, one] = another[order]
    meets = torch.zeros_like(rows, dtype=torch.bool)
    meets[rank, one] = True
    return rows, meets


def _of_matrices(
    slope: Tensor,
    codes: Codes,
    terms: Sequence[TemporalTerm],
    chosen: Sequence[int],
    windows: tuple[int, int],
    partners: Sequence[Tensor | None],
    *,
    halves: bool,
) -> Tensor:
    """The term of the ``chosen`` members from whole matrices, where nothing is sparse about them."""
    z_MNWF, slopes = (
        codes.dense().view(codes.n_members, *(windows[::-1] if halves else windows), -1),
        codes.members(slope),
    )
    z_MNWF = z_MNWF.transpose(1, 2) if halves else z_MNWF
    loss_M = z_MNWF.new_zeros(codes.n_members)
    for m in chosen:
        term, z_NWF = terms[m], z_MNWF[m]
        if isinstance(codes, DenseCodes) and term.form == "pairwise" and partners[m] is None and not halves:
            loss_M[m] = _pairwise(slopes[m].view(z_NWF.shape), z_NWF, term)
            continue
        with torch.enable_grad():
            z_NWF = z_NWF.detach().requires_grad_()
            loss = loss_terms.temporal(z_NWF, term, partners[m])
            (gradient,) = torch.autograd.grad(loss, z_NWF)
        loss_M[m] = loss.detach()
        in_rows = gradient.transpose(0, 1) if halves else gradient
        slopes[m].add_(codes.gathered(in_rows.flatten(0, 1), m), alpha=term.weight)
    return loss_M


def _pairwise(slope_NWF: Tensor, z_NWF: Tensor, term: TemporalTerm) -> Tensor:
    """The paper's own form, by hand in half the passes over memory."""
    w, lag, inside = z_NWF.shape[1], term.lag, slice(0, term.n_features)
    difference = z_NWF[:, : max(0, w - lag), inside] - z_NWF[:, lag:, inside]
    n_pairs = max(1, difference.shape[0] * difference.shape[1])
    weighed = difference
    if term.feature_weights is not None:
        weighed = difference * term.feature_weights[inside].to(difference.dtype)
    slope_NWF[:, : max(0, w - lag), inside].add_(weighed, alpha=2 * term.weight / n_pairs)
    slope_NWF[:, lag:, inside].sub_(weighed, alpha=2 * term.weight / n_pairs)
    return torch.dot(difference.view(-1), weighed.view(-1)) / n_pairs
