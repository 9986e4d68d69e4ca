"""Codes z [R, F] as their active entries, and the three products of a training step on nothing but those.

An SAE's step is five matrix products of equal size. Only the encoder's has to be dense; the others touch z, which is
almost all zeros:

    decode      x̂ = z·W                one row of W added per active entry
    sampled     (a·Wᵀ) where z > 0     one inner product per active entry
    accumulate  vᵀ·a, v like z         one row of a added per active entry

:class:`SparseCodes` does them on the entries, :class:`DenseCodes` on whole matrices; the two answer alike, so a step is
written once.

A dictionary of nested groups has several residuals per token, one per prefix: ``decode_groups``, ``sampled_groups`` and
``accumulate_groups`` are the same three products with a row of [R, G, D] for every group, and do no more work.

Codes of several members that see the same tokens are one block-diagonal matrix: rows n of member m are at m·N + n, its
features at m·F + f, and every product of all of them is one call.

Shapes: M members, N tokens, R = M·N rows, D model width, F features of a member, C = M·F columns, E active entries, G
groups of features, given by the sizes of their prefixes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..sae.activation import Activation
from .matmul import inner_products, matmul, product, weighted_rows
from .top_k import count_true, largest, true_positions

# Share of active entries above which whole matrices are faster. Constants, never a timing: a resumed run must take the
# turns of the first. CPU: the steps cross at 0.15 on two Intel cores with AVX-512, at 0.30 on two of Zen 5 (2045 × 576
# × 4608, float32). CUDA: an estimate, since tensor cores multiply about 50 times faster than a gather brings rows.
DENSE_ABOVE = {"cpu": 0.15, "cuda": 0.01}
_TOO_SMALL = 2**16  # pre-activations (of all members), below which so many small operations cost more than they save


class _OfMembers:
    """What codes of several members can do whatever they are made of."""

    n_members: int
    value: Tensor

    def decode(self, W_CD: Tensor) -> Tensor:
        """z·W [R, D]."""
        raise NotImplementedError

    def sampled(self, a_RD: Tensor, W_CD: Tensor) -> Tensor:
        """(a·Wᵀ) at the active entries."""
        raise NotImplementedError

    def accumulate(self, values: Tensor, a_RD: Tensor) -> Tensor:
        """valuesᵀ·a [C, D] for ``values`` like ``value``."""
        raise NotImplementedError

    def of_columns(self, per_feature_C: Tensor) -> Tensor:
        """A number per feature, to be multiplied with ``value``."""
        raise NotImplementedError

    def members(self, values: Tensor) -> tuple[Tensor, ...]:
        """Every member's part of ``values``, which are like ``value``; views."""
        raise NotImplementedError

    def totals(self, values: Tensor) -> Tensor:
        """Sum of every member's ``values`` [M]."""
        return torch.stack([part.sum() for part in self.members(values)])

    def dots(self, one: Tensor, other: Tensor) -> Tensor:
        """Inner product of every member's ``one`` and ``other`` [M], both like ``value``."""
        parts = zip(self.members(one), self.members(other), strict=True)
        return torch.stack([torch.dot(a.view(-1), b.view(-1)) for a, b in parts])

    def add(self, values: Tensor, other: Tensor | float, factors: Sequence[float]) -> Tensor:
        """``values``, in place, plus the member's factor times ``other``, which is like ``value``, or 1."""
        if len(set(factors)) == 1:
            return values.add_(other, alpha=factors[0])
        others = self.members(other) if isinstance(other, Tensor) else [other] * self.n_members
        for part, more, factor in zip(self.members(values), others, factors, strict=True):
            if factor:
                part.add_(more, alpha=factor)
        return values

    def penalise(self, slope: Tensor, shares: Sequence[float], norms_C: Tensor | None) -> Tensor:
        """Σ z of every member [M], each z times its column's norm if given; a share of its gradient goes
        to ``slope``.
        """
        weights = 1.0 if norms_C is None else self.of_columns(norms_C)
        self.add(slope, weights, shares)
        return self.totals(self.value if norms_C is None else self.value * weights)


class SparseCodes(_OfMembers):
    """Codes by their active entries, in row-major order.

    Args:
        pre_RF: pre-activations; kept, never changed: other tokens' codes are looked up in them.
        mask_RF: which of them are active, all of these positive.
        flat_E: the active positions r·F + f, ascending.
        all_positive: whether the mask is just pre_RF > 0, which makes a lookup cheaper.
        n_members: M.

    Attributes:
        value: [E] the active codes.

    """

    def __init__(self, pre_RF: Tensor, mask_RF: Tensor, flat_E: Tensor, *, all_positive: bool, n_members: int = 1):
        self.shape, self._pre, self._mask, self._flat = pre_RF.shape, pre_RF, mask_RF, flat_E
        self._all_positive, self.n_members = all_positive, n_members
        self._groups: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        n_rows, n_features = self.shape
        self._n_columns = n_members * n_features
        self.value = pre_RF.view(-1).index_select(0, flat_E)
        edges = torch.arange(n_rows + 1, device=flat_E.device) * n_features
        # int32 halves the traffic of everything below; E stays far under 2³¹ wherever pre_RF fits the memory.
        self._row_starts = torch.searchsorted(flat_E, edges, out_int32=True)
        rows = torch.arange(n_rows, device=flat_E.device, dtype=torch.int32)
        self._row = torch.repeat_interleave(rows, self._row_starts.diff(), output_size=flat_E.numel())
        self._column = torch.sub(flat_E, self._row, alpha=n_features).int()
        if n_members > 1:
            self._column += self._row // (n_rows // n_members) * n_features

    def members(self, values: Tensor) -> tuple[Tensor, ...]:
        """Every member's part of ``values``, which are like ``value``; views."""
        return (values,) if self.n_members == 1 else values.split(self._entries)

    def from_row(self, first: int) -> SparseCodes:
        """The codes of the rows from ``first`` on, of a single member."""
        low = int(self._row_starts[first])
        flat = self._flat[low:] - first * self.shape[1]
        return SparseCodes(self._pre[first:], self._mask[first:], flat, all_positive=self._all_positive)

    def decode(self, W_CD: Tensor) -> Tensor:
        """z·W [R, D]."""
        return weighted_rows(W_CD, self._column, self._row_starts, self.value)

    def sampled(self, a_RD: Tensor, W_CD: Tensor) -> Tensor:
        """(a·Wᵀ) at the active entries, like ``value``."""
        return inner_products(a_RD, W_CD, self._column, self._row_starts)

    def accumulate(self, values: Tensor, a_RD: Tensor) -> Tensor:
        """valuesᵀ·a [C, D] for ``values`` like ``value``: Σ_r values[r, c]·a[r]."""
        order, rows, column_starts = self._by_column
        return weighted_rows(a_RD, rows, column_starts, values.index_select(0, order))

    def column_sums(self, values: Tensor) -> Tensor:
        """Σ_r of ``values`` [C]."""
        return values.new_zeros(self._n_columns).index_add_(0, self._column, values)

    def column_counts(self) -> Tensor:
        """On how many tokens each feature is active, int64 [C]."""
        return torch.bincount(self._column, minlength=self._n_columns)

    def row_sums(self, values: Tensor) -> Tensor:
        """Σ_f of ``values`` [R]."""
        return values.new_zeros(self.shape[0]).index_add_(0, self._row, values)

    def of_columns(self, per_feature_C: Tensor) -> Tensor:
        """A number per feature, brought to every active entry."""
        return per_feature_C.index_select(0, self._column)

    def of_rows(self, per_token_R: Tensor) -> Tensor:
        """A number per token, brought to every active entry."""
        return per_token_R.index_select(0, self._row)

    def at_rows(self, rows_R: Tensor) -> Tensor:
        """z[rows_R[r], f] for every active entry (r, f)."""
        shift_R = (rows_R - torch.arange(self.shape[0], device=rows_R.device)) * self.shape[1]
        flat = shift_R.index_select(0, self._row).add_(self._flat)
        other = self._pre.view(-1).index_select(0, flat)
        return other.clamp_(min=0) if self._all_positive else other.mul_(self._mask.view(-1).index_select(0, flat))

    def decode_groups(self, W_CD: Tensor, sizes: Sequence[int]) -> Tensor:
        """What each group of features adds to z·W [R, G, D]."""
        if len(sizes) == 1:
            return self.decode(W_CD).unsqueeze(1)
        starts, _ = self._by_group(sizes)
        return weighted_rows(W_CD, self._column, starts, self.value).view(self.shape[0], len(sizes), -1)

    def sampled_groups(self, a_RGD: Tensor, W_CD: Tensor, sizes: Sequence[int]) -> Tensor:
        """(a·Wᵀ) at the active entries, a being that of the entry's group."""
        if len(sizes) == 1:
            return self.sampled(a_RGD.squeeze(1), W_CD)
        return inner_products(a_RGD.flatten(0, 1), W_CD, self._column, self._by_group(sizes)[0])

    def accumulate_groups(self, values: Tensor, a_RGD: Tensor, sizes: Sequence[int]) -> Tensor:
        """valuesᵀ·a [C, D], a being that of the entry's group."""
        if len(sizes) == 1:
            return self.accumulate(values, a_RGD.squeeze(1))
        order, _, column_starts = self._by_column
        rows = self._by_group(sizes)[1].index_select(0, order)
        return weighted_rows(a_RGD.flatten(0, 1), rows, column_starts, values.index_select(0, order))

    def _by_group(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same entries with one row r·G + g for every row and group: where each starts, and each entry's row.

        The entries of a row are in the order of their features, so those of a group lie side by side.
        """
        sizes = tuple(sizes)
        if sizes not in self._groups:
            n_rows, n_features = self.shape
            first = torch.tensor((0, *sizes[:-1]), device=self._flat.device)
            edges = (torch.arange(n_rows, device=first.device).unsqueeze(1) * n_features + first).flatten()
            edges = torch.cat([edges, edges.new_tensor([n_rows * n_features])])
            starts = torch.searchsorted(self._flat, edges, out_int32=True)
            rows = torch.arange(len(edges) - 1, device=first.device, dtype=torch.int32)
            of_entry = torch.repeat_interleave(rows, starts.diff(), output_size=self._flat.numel())
            self._groups[sizes] = starts, of_entry
        return self._groups[sizes]

    def restricted(self, values: Tensor) -> Tensor:
        """``values`` with whatever lies outside the active entries set to zero: here nothing lies outside."""
        return values

    def gathered(self, dense_NF: Tensor, member: int = 0) -> Tensor:
        """The entries of a dense matrix at a member's active positions."""
        return dense_NF.reshape(-1).index_select(0, self.members(self._flat)[member] - member * dense_NF.numel())

    def dense(self) -> Tensor:
        """Z [R, F] as a new matrix."""
        return self._pre * self._mask

    @cached_property
    def _entries(self) -> list[int]:
        """How many entries each member has."""
        return self._row_starts[:: self.shape[0] // self.n_members].diff().tolist()

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order that sorts the entries by column, their rows in that order, and where each column starts."""
        columns, order = torch.sort(self._column, stable=True)
        edges = torch.arange(self._n_columns + 1, device=columns.device, dtype=torch.int32)
        return order, self._row.index_select(0, order), torch.searchsorted(columns, edges, out_int32=True)


class DenseCodes(_OfMembers):
    """The same answers from whole matrices, ``value`` being z [R, F] itself."""

    _out: torch.dtype | None = None  # of sums; None: that of the codes

    def __init__(self, pre_RF: Tensor, mask_RF: Tensor, compute_dtype: torch.dtype | None = None, n_members: int = 1):
        self.shape, self._mask, self._compute = pre_RF.shape, mask_RF, compute_dtype or pre_RF.dtype
        self.n_members = n_members
        self.value = pre_RF * mask_RF

    def members(self, values: Tensor) -> tuple[Tensor, ...]:
        """Every member's part of ``values``, which are like ``value``; views."""
        return values.chunk(self.n_members)

    def from_row(self, first: int) -> DenseCodes:
        """The codes of the rows from ``first`` on, of a single member."""
        return DenseCodes(self.value[first:], self._mask[first:], self._compute)

    def decode(self, W_CD: Tensor) -> Tensor:
        """z·W [R, D]."""
        return matmul(self._apart(self.value), self._apart(W_CD), self._compute, self._out).view(len(self.value), -1)

    def sampled(self, a_RD: Tensor, W_CD: Tensor) -> Tensor:
        """(a·Wᵀ) at the active entries, zero elsewhere."""
        return self.restricted(self.product(a_RD, W_CD))

    def product(self, a_RD: Tensor, W_CD: Tensor) -> Tensor:
        """a·Wᵀ [R, F]."""
        return product(self._apart(a_RD), self._apart(W_CD), compute_dtype=self._compute).view(self.shape)

    def accumulate(self, values: Tensor, a_RD: Tensor) -> Tensor:
        """valuesᵀ·a [C, D]."""
        return matmul(self._apart(values).mT, self._apart(a_RD), self._compute, self._out).view(-1, a_RD.shape[1])

    def decode_groups(self, W_CD: Tensor, sizes: Sequence[int]) -> Tensor:
        """What each group of features adds to z·W [R, G, D]."""
        if len(sizes) == 1:
            return self.decode(W_CD).unsqueeze(1)
        z, W = self._apart(self.value), self._apart(W_CD)
        of = columns_of(sizes)
        parts = [matmul(z[..., part], W[..., part, :], self._compute, self._out).flatten(0, -2) for part in of]
        return torch.stack(parts, 1)

    def sampled_groups(self, a_RGD: Tensor, W_CD: Tensor, sizes: Sequence[int]) -> Tensor:
        """(a·Wᵀ) at the active entries, zero elsewhere, a being that of the entry's group."""
        return self.restricted(self.product_groups(a_RGD, W_CD, sizes))

    def product_groups(self, a_RGD: Tensor, W_CD: Tensor, sizes: Sequence[int]) -> Tensor:
        """a·Wᵀ [R, F], a being that of the feature's group."""
        if len(sizes) == 1:
            return self.product(a_RGD.squeeze(1), W_CD)
        W, found = self._apart(W_CD), a_RGD.new_empty(self.shape)
        for group, part in enumerate(columns_of(sizes)):
            a = self._apart(a_RGD[:, group].contiguous())
            self._apart(found)[..., part] = product(a, W[..., part, :], compute_dtype=self._compute)
        return found

    def accumulate_groups(self, values: Tensor, a_RGD: Tensor, sizes: Sequence[int]) -> Tensor:
        """valuesᵀ·a [C, D], a being that of the feature's group."""
        if len(sizes) == 1:
            return self.accumulate(values, a_RGD.squeeze(1))
        parts = [
            matmul(self._apart(values)[..., part].mT, self._apart(a_RGD[:, group]), self._compute, self._out)
            for group, part in enumerate(columns_of(sizes))
        ]
        return torch.cat(parts, -2).view(-1, a_RGD.shape[-1])

    def column_sums(self, values: Tensor) -> Tensor:
        """Σ_r of ``values`` [C]."""
        return self._apart(values).sum(-2).view(-1)

    def column_counts(self) -> Tensor:
        """On how many tokens each feature is active, int64 [C]."""
        return self._apart(self._mask).sum(-2).view(-1)

    def of_columns(self, per_feature_C: Tensor) -> Tensor:
        """A number per feature, to be multiplied with ``value``."""
        if self.n_members == 1:
            return per_feature_C.expand(self.shape)
        rows = self.shape[0] // self.n_members
        return per_feature_C.view(self.n_members, 1, -1).expand(-1, rows, -1).reshape(self.shape)

    def restricted(self, values: Tensor) -> Tensor:
        """``values``, in place, with everything outside the active entries set to zero."""
        return values.mul_(self._mask)

    def gathered(self, dense_NF: Tensor, member: int = 0) -> Tensor:
        """A dense matrix at a member's active positions, zero elsewhere."""
        return dense_NF * self.members(self._mask)[member]

    def dense(self) -> Tensor:
        """Z [R, F] itself."""
        return self.value

    def _apart(self, matrix: Tensor) -> Tensor:
        """Rows or columns of all members, member by member: [M, ·, ·] where there are several."""
        return matrix if self.n_members == 1 else matrix.view(self.n_members, -1, matrix.shape[-1])


def columns_of(sizes: Sequence[int]) -> list[slice]:
    """The features of every group, from the sizes of the prefixes."""
    return [slice(first, last) for first, last in itertools.pairwise((0, *sizes))]


Codes = SparseCodes | DenseCodes


def codes_of(
    pre_RF: Tensor,
    activation: Activation,
    *,
    dense_above: float | None = None,
    compute_dtype: torch.dtype | None = None,
    n_members: int = 1,
    n_races: int | None = None,
) -> Codes:
    """The codes of contiguous pre-activations under relu, topk or batchtopk (in training).

    Dense or sparse by their own density: ``dense_above`` is the share of active entries where that changes (DENSE_ABOVE
        unless
    given), ``compute_dtype`` that of the dense products' factors. ``n_races`` are the equal parts of the rows within
    each of which batchtopk chooses; by default one per member.
    """
    if activation.kind == "relu":
        mask, flat = pre_RF > 0, None
    else:
        over_batch = activation.kind == "batchtopk"
        mask, flat = largest(pre_RF, activation.k or 0, over_batch=over_batch, n_members=n_races or n_members)
    active = count_true(mask) if flat is None else flat.numel()
    if is_dense(active, pre_RF, dense_above):
        return DenseCodes(pre_RF, mask, compute_dtype, n_members)
    flat, all_positive = (true_positions(mask, active), True) if flat is None else (flat, False)
    return SparseCodes(pre_RF, mask, flat, all_positive=all_positive, n_members=n_members)


def is_dense(active: int, pre_RF: Tensor, dense_above: float | None) -> bool:
    """Whether whole matrices are faster for so many active entries; see :func:`codes_of`."""
    if dense_above is not None:
        return active > dense_above * pre_RF.numel()
    return active > DENSE_ABOVE.get(pre_RF.device.type, 0.0) * pre_RF.numel() or pre_RF.numel() < _TOO_SMALL
