"""Codes z [N, F] as their active entries, and the three products of a training step on nothing but those.

An SAE's step is five matrix products of equal size. Only the encoder's has to be dense; the others touch z, which is almost
all zeros:

    decode      x̂ = z·W                one row of W added per active entry
    sampled     (a·Wᵀ) where z > 0     one inner product per active entry
    accumulate  vᵀ·a, v like z         one row of a added per active entry

:class:`SparseCodes` does them on the entries, :class:`DenseCodes` on whole matrices; the two answer alike, so a step is
written once. torch's embedding_bag and sampled_addmm do the work: of the ways torch offers they measured fastest on a CPU
(``benchmarks/products.py`` repeats the measurement), and they run on CUDA too.

Shapes: N tokens, D model width, F features, E active entries.
"""

from __future__ import annotations

import os
import warnings
from functools import cache, cached_property
from types import ModuleType

import torch
from torch import Tensor

from .activation import Activation
from .products import matmul, product

# Share of active entries above which whole matrices are faster. Constants, never a timing: a resumed run must take the turns of
# the first. CPU: the steps cross at 0.30 on two Zen 5 cores (2048 × 576 × 4608, float32). CUDA: an estimate, since tensor cores
# multiply about 50 times faster than a gather brings rows.
DENSE_ABOVE = {"cpu": 0.25, "cuda": 0.01}
_TOO_SMALL = 2**17  # pre-activations, below which starting so many small operations costs more than it saves


class SparseCodes:
    """Codes by their active entries, in row-major order.

    Args:
        pre_NF: pre-activations; kept, never changed: other tokens' codes are looked up in them.
        mask_NF: which of them are active, all of these positive.
        flat_E: the active positions n·F + f, ascending.
        all_positive: whether the mask is just pre_NF > 0, which makes a lookup cheaper.

    Attributes:
        value: [E] the active codes.

    """

    def __init__(self, pre_NF: Tensor, mask_NF: Tensor, flat_E: Tensor, *, all_positive: bool):
        self.shape, self._pre, self._mask, self._flat = pre_NF.shape, pre_NF, mask_NF, flat_E
        self._all_positive = all_positive
        n_tokens, n_features = self.shape
        self.value = pre_NF.view(-1).index_select(0, flat_E)
        edges = torch.arange(n_tokens + 1, device=flat_E.device) * n_features
        # int32 halves the traffic of everything below; E stays far under 2³¹ wherever pre_NF fits the memory.
        self._row_starts = torch.searchsorted(flat_E, edges, out_int32=True)
        rows = torch.arange(n_tokens, device=flat_E.device, dtype=torch.int32)
        self._row = torch.repeat_interleave(rows, self._row_starts.diff(), output_size=flat_E.numel())
        self._column = torch.sub(flat_E, self._row, alpha=n_features).int()

    def decode(self, W_FD: Tensor) -> Tensor:
        """z·W [N, D]."""
        return _bags(W_FD, self._column, self._row_starts, self.value)

    def sampled(self, a_ND: Tensor, W_FD: Tensor) -> Tensor:
        """(a·Wᵀ) at the active entries, like ``value``."""
        kernels = kernels_for(a_ND)
        if kernels is not None:
            return kernels.inner_products(a_ND, W_FD, self._column, self._row_starts)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            warnings.filterwarnings(
                "ignore", message="Sparse invariant checks"
            )  # torch 2.11 says so even when told not to check
            pattern = torch.sparse_csr_tensor(self._row_starts, self._column, self.value, self.shape, check_invariants=False)
            return torch.sparse.sampled_addmm(pattern, a_ND, W_FD.t(), beta=0.0).values()

    def accumulate(self, values: Tensor, a_ND: Tensor) -> Tensor:
        """valuesᵀ·a [F, D] for ``values`` like ``value``: Σ_n values[n, f]·a[n]."""
        order, rows, column_starts = self._by_column
        return _bags(a_ND, rows, column_starts, values.index_select(0, order))

    def column_sums(self, values: Tensor) -> Tensor:
        """Σ_n of ``values`` [F]."""
        return values.new_zeros(self.shape[1]).index_add_(0, self._column, values)

    def column_counts(self) -> Tensor:
        """On how many tokens each feature is active, int64 [F]."""
        return torch.bincount(self._column, minlength=self.shape[1])

    def row_sums(self, values: Tensor) -> Tensor:
        """Σ_f of ``values`` [N]."""
        return values.new_zeros(self.shape[0]).index_add_(0, self._row, values)

    def of_columns(self, per_feature_F: Tensor) -> Tensor:
        """A number per feature, brought to every active entry."""
        return per_feature_F.index_select(0, self._column)

    def of_rows(self, per_token_N: Tensor) -> Tensor:
        """A number per token, brought to every active entry."""
        return per_token_N.index_select(0, self._row)

    def at_rows(self, rows_N: Tensor) -> Tensor:
        """z[rows_N[n], f] for every active entry (n, f)."""
        shift_N = (rows_N - torch.arange(self.shape[0], device=rows_N.device)) * self.shape[1]
        flat = shift_N.index_select(0, self._row).add_(self._flat)
        other = self._pre.view(-1).index_select(0, flat)
        return other.clamp_(min=0) if self._all_positive else other.mul_(self._mask.view(-1).index_select(0, flat))

    def restricted(self, values: Tensor) -> Tensor:
        """``values`` with whatever lies outside the active entries set to zero: here nothing lies outside."""
        return values

    def gathered(self, dense_NF: Tensor) -> Tensor:
        """The entries of a dense matrix at the active positions, like ``value``."""
        return dense_NF.reshape(-1).index_select(0, self._flat)

    def dense(self) -> Tensor:
        """Z [N, F] as a new matrix."""
        return self._pre * self._mask

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order that sorts the entries by column, their rows in that order, and where each column starts."""
        columns, order = torch.sort(self._column, stable=True)
        edges = torch.arange(self.shape[1] + 1, device=columns.device, dtype=torch.int32)
        return order, self._row.index_select(0, order), torch.searchsorted(columns, edges, out_int32=True)


class DenseCodes:
    """The same answers from whole matrices, ``value`` being z [N, F] itself."""

    def __init__(self, pre_NF: Tensor, mask_NF: Tensor, compute_dtype: torch.dtype | None = None):
        self.shape, self._mask, self._compute = pre_NF.shape, mask_NF, compute_dtype or pre_NF.dtype
        self.value = pre_NF * mask_NF

    def decode(self, W_FD: Tensor) -> Tensor:
        """z·W [N, D]."""
        return matmul(self.value, W_FD, self._compute)

    def sampled(self, a_ND: Tensor, W_FD: Tensor) -> Tensor:
        """(a·Wᵀ) at the active entries, zero elsewhere."""
        return self.restricted(product(a_ND, W_FD, compute_dtype=self._compute))

    def accumulate(self, values: Tensor, a_ND: Tensor) -> Tensor:
        """valuesᵀ·a [F, D]."""
        return matmul(values.t(), a_ND, self._compute)

    def column_sums(self, values: Tensor) -> Tensor:
        """Σ_n of ``values`` [F]."""
        return values.sum(0)

    def column_counts(self) -> Tensor:
        """On how many tokens each feature is active, int64 [F]."""
        return self._mask.sum(0)

    def of_columns(self, per_feature_F: Tensor) -> Tensor:
        """A number per feature, to be broadcast over the tokens."""
        return per_feature_F

    def restricted(self, values: Tensor) -> Tensor:
        """``values``, in place, with everything outside the active entries set to zero."""
        return values.mul_(self._mask)

    def gathered(self, dense_NF: Tensor) -> Tensor:
        """``dense_NF`` at the active positions, zero elsewhere."""
        return dense_NF * self._mask

    def dense(self) -> Tensor:
        """Z [N, F] itself."""
        return self.value


Codes = SparseCodes | DenseCodes


def codes_of(
    pre_NF: Tensor, activation: Activation, *, dense_above: float | None = None, compute_dtype: torch.dtype | None = None
) -> Codes:
    """The codes of contiguous pre-activations under relu, topk or batchtopk (in training).

    Dense or sparse by their own density: ``dense_above`` is the share of active entries where that changes (DENSE_ABOVE unless
    given), ``compute_dtype`` that of the dense products' factors.
    """
    if activation.kind == "relu":
        mask, flat = pre_NF > 0, None
    else:
        mask, flat = largest(pre_NF, activation.k or 0, over_batch=activation.kind == "batchtopk")
    active = int(mask.count_nonzero()) if flat is None else flat.numel()
    if is_dense(active, pre_NF, dense_above):
        return DenseCodes(pre_NF, mask, compute_dtype)
    return SparseCodes(pre_NF, mask, true_positions(mask) if flat is None else flat, all_positive=flat is None)


def is_dense(active: int, pre_NF: Tensor, dense_above: float | None) -> bool:
    """Whether whole matrices are faster for so many active entries; see :func:`codes_of`."""
    if dense_above is not None:
        return active > dense_above * pre_NF.numel()
    return active > DENSE_ABOVE.get(pre_NF.device.type, 0.0) * pre_NF.numel() or pre_NF.numel() < _TOO_SMALL


def largest(pre_NF: Tensor, k: int, *, over_batch: bool) -> tuple[Tensor, Tensor]:
    """The positive ones among the k largest of every row, or among the k·N largest of all.

    The maxima of 4k groups per row bound the k-th largest from below: k groups have a maximum at least that large. Only what
    passes this bound, little more than k per row, is looked at again. Among equal values torch.topk keeps an arbitrary one, and
    so does this.

    Returns:
        A mask [N, F], and the positions n·F + f that it marks, ascending.

    """
    n_tokens, n_features = pre_NF.shape
    n_groups = 4 * k
    kept, rows = (k * n_tokens, 1) if over_batch else (k, n_tokens)
    if n_groups * 2 > n_features:
        bound = pre_NF.new_zeros(())
    else:
        groups = pre_NF[:, : n_features // n_groups * n_groups].unflatten(1, (-1, n_groups)).amax(1)
        bound = groups.view(rows, -1).topk(kept, sorted=False).values.amin(1, keepdim=True)
    smallest = torch.finfo(pre_NF.dtype).smallest_normal
    mask = pre_NF >= bound.clamp(min=smallest)
    flat = true_positions(mask)
    surplus = _surplus(pre_NF.view(-1).index_select(0, flat), flat // (n_features * n_tokens // rows), rows, kept)
    mask.view(-1)[flat[surplus]] = False
    return mask, flat[~surplus]


def _surplus(values_C: Tensor, rows_C: Tensor, n_rows: int, kept: int) -> Tensor:
    """Which of the candidates, given with their ascending rows, are not among the ``kept`` largest of their row: a mask [C]."""
    counts = torch.bincount(rows_C, minlength=n_rows)
    widest = int(counts.max()) if n_rows else 0
    if widest <= kept:
        return torch.zeros_like(rows_C, dtype=torch.bool)
    starts = counts.cumsum(0) - counts
    place = rows_C * widest + torch.arange(rows_C.numel(), device=rows_C.device) - starts.index_select(0, rows_C)
    padded = values_C.new_full((n_rows * widest,), -torch.inf).index_copy_(0, place, values_C).view(n_rows, widest)
    surplus = torch.ones(n_rows, widest, dtype=torch.bool, device=values_C.device)
    surplus.scatter_(1, padded.topk(kept, sorted=False).indices, value=False)
    return surplus.view(-1).index_select(0, place)


def true_positions(mask: Tensor) -> Tensor:
    """Where a contiguous mask is true, as ascending positions in its flat form."""
    flat = mask.view(-1)
    if flat.is_cuda or flat.numel() % 8:
        return flat.nonzero().view(-1)
    # Eight flags at a time: in a sparse mask most words are zero. Measured three times faster than nonzero at a density of 1 %.
    words = flat.view(torch.int64).nonzero().view(-1)
    if words.numel() > flat.numel() // 32:
        return flat.nonzero().view(-1)
    inside = flat.view(-1, 8).index_select(0, words).view(-1).nonzero().view(-1)
    return words.index_select(0, inside >> 3).mul_(8).add_(inside & 7)


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """Triton's kernels where they can run: Triton is installed, and the tensor in float32 on CUDA (or Triton interprets)."""
    if tensor.dtype != torch.float32 or not (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return _kernels()


@cache
def _kernels() -> ModuleType | None:
    try:
        from . import kernels
    except ImportError:  # torch's builds for CPUs come without Triton
        return None
    return kernels


def _bags(table: Tensor, index_E: Tensor, starts: Tensor, weights_E: Tensor) -> Tensor:
    """One weighted sum of rows of ``table`` per bag, bag b holding the entries starts[b] … starts[b + 1]."""
    kernels = kernels_for(table)
    if kernels is not None:
        return kernels.weighted_rows(table, index_E, starts, weights_E)
    return torch.embedding_bag(table, index_E, starts, mode=0, per_sample_weights=weights_E, include_last_offset=True)[0]
