"""Products of whole matrices, each by the fastest library at hand, with a choice of precision for the factors.

``compute_dtype`` is that of the factors (bfloat16 puts them on tensor cores, which sum in float32); results are in the
dtype of the first factor.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ...system.dense_product import linear


def product(
    a_ND: Tensor, W_FD: Tensor, bias_F: Tensor | None = None, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """a·Wᵀ + bias [N, F]; with one more dimension in front of each, those of several members at once.

    In float32 on a CPU by the better of the two libraries that torch carries (:mod:`tcsae.system.dense_product`).
    """
    if compute_dtype not in (None, a_ND.dtype):
        out = matmul(a_ND, W_FD.mT, compute_dtype)
        return out if bias_F is None else out.add_(bias_F.unsqueeze(-2))
    if a_ND.dim() == 3 and a_ND.is_cuda:
        return a_ND @ W_FD.mT if bias_F is None else torch.baddbmm(bias_F.unsqueeze(1), a_ND, W_FD.mT)
    if (
        a_ND.dim() == 3
    ):  # a CPU's time is in the products: one by one they are the calls, and the bits, of a member alone
        biases = [None] * len(a_ND) if bias_F is None else bias_F
        return torch.stack([product(*each) for each in zip(a_ND, W_FD, biases, strict=True)])
    return linear(a_ND, W_FD, bias_F)


def matmul(
    one: Tensor, other: Tensor, compute_dtype: torch.dtype | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """one·other, of matrices or of stacks of them, with factors in ``compute_dtype``.

    The result is in ``out_dtype``, the dtype of ``one`` unless given.
    """
    compute_dtype, out_dtype = compute_dtype or one.dtype, out_dtype or one.dtype
    one, other = one.to(compute_dtype), other.to(compute_dtype)
    if one.is_cuda and compute_dtype == torch.bfloat16 and out_dtype == torch.float32:
        multiply = torch.mm if one.dim() == 2 else torch.bmm
        return multiply(
            one, other, out_dtype=torch.float32
        )  # the sums as tensor cores have them, not rounded on the way out
    if one.dim() == 3 and not one.is_cuda:
        return torch.stack([matrix @ factor for matrix, factor in zip(one, other, strict=True)]).to(out_dtype)
    return (one @ other).to(out_dtype)


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """Triton's kernels where they can run: Triton is installed, and the tensor in float32 on CUDA (or Triton
    interprets).
    """
    if tensor.dtype != torch.float32 or not (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return _kernels()


@cache
def _kernels() -> ModuleType | None:
    try:
        from . import triton_kernels
    except ImportError:  # torch's builds for CPUs come without Triton
        return None
    return triton_kernels


# How often the rows of a table are read, on average, for slices to pay, of a table that the last cache may hold and of
# a larger one; what is larger; how large a slice is; its least width. Measured on two Intel cores with 2 MiB of cache
# each: three times faster at 180 reads, no gain at 20; and on two Zen 5 cores with 32 MiB, a table of 53 MB: a
# crosscoder's step of 231 ms against 308 at 57 reads.
_REREAD, _REREAD_LARGE, _LARGE_BYTES, _SLICE_BYTES, _NARROWEST = 64, 32, 2**25, 7 * 2**18, 32
# Fewer entries than this are never worth it. More than members that step together have (``memory.STACK_BELOW`` times
# ``codes.DENSE_ABOVE``): slices change the order of sums, and a member is to have the same bits in company and alone.
_MANY = 160_000


def weighted_rows(table: Tensor, index_E: Tensor, starts: Tensor, weights_E: Tensor) -> Tensor:
    """One weighted sum of rows of ``table`` [·, D] per bag, bag b holding the entries starts[b] … starts[b + 1]: [bags,
    D].
    """
    kernels = kernels_for(table)
    if kernels is not None:
        return kernels.weighted_rows(table, index_E, starts, weights_E)
    options = {"mode": 0, "per_sample_weights": weights_E, "include_last_offset": True}
    parts = [torch.embedding_bag(part, index_E, starts, **options)[0] for part in _slices(table, index_E.numel())]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def inner_products(a_RD: Tensor, W_CD: Tensor, column_E: Tensor, row_starts: Tensor) -> Tensor:
    """⟨a[r], W[c]⟩ at every entry (r, c) [E], entries of row r being row_starts[r] … row_starts[r + 1]."""
    kernels = kernels_for(a_RD)
    if kernels is not None:
        return kernels.inner_products(a_RD, W_CD, column_E, row_starts)
    found, slices = a_RD.new_zeros(column_E.numel()), _slices(W_CD, column_E.numel())
    with warnings.catch_warnings():
        # The second is what torch 2.11 says even when told not to check.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta|Sparse invariant checks")
        for part_RD, part_CD in zip(a_RD.split(slices[0].shape[1], 1), slices, strict=True):
            shape = (len(a_RD), len(W_CD))
            pattern = torch.sparse_csr_tensor(row_starts, column_E, found, shape, check_invariants=False)
            found = torch.sparse.sampled_addmm(pattern, part_RD, part_CD.t()).values()
    return found


def _slices(table: Tensor, n_reads: int) -> Sequence[Tensor]:
    reread = _REREAD_LARGE if table.nbytes > _LARGE_BYTES else _REREAD
    if table.is_cuda or n_reads < max(_MANY, reread * len(table)):
        return [table]
    width = max(_NARROWEST, _SLICE_BYTES // (table.element_size() * len(table)) // _NARROWEST * _NARROWEST)
    return [part.contiguous() for part in table.split(width, 1)]
