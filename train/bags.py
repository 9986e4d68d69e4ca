"""The products of sparse codes: weighted sums of a table's rows, and inner products at given places.

torch's embedding_bag and sampled_addmm do the work: of the ways torch offers they measured fastest on a CPU
(``benchmarks/products.py`` repeats the measurement). On CUDA Triton's kernels do it (:mod:`.kernels`), or torch's where there
is no Triton. On a CPU a table whose rows are read again and again is cut into slices of its width, each of which stays in a
core's cache while it is read.

Shapes: R rows, D model width, C columns, E entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .products import kernels_for

# How often the rows of a table are read, on average, for slices to pay; how large a slice is; its least width. Measured on two
# Intel cores with 2 MiB of cache each: three times faster at 180 reads, no gain at 20.
_REREAD, _SLICE_BYTES, _NARROWEST = 64, 7 * 2**18, 32
# Fewer entries than this are never worth it. More than members that step together have (``memory.STACK_BELOW`` times
# ``codes.DENSE_ABOVE``): slices change the order of sums, and a member is to have the same bits in company and alone.
_MANY = 2**18


def weighted_rows(table: Tensor, index_E: Tensor, starts: Tensor, weights_E: Tensor) -> Tensor:
    """One weighted sum of rows of ``table`` [·, D] per bag, bag b holding the entries starts[b] … starts[b + 1]: [bags, D]."""
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
    if table.is_cuda or n_reads < max(_MANY, _REREAD * len(table)):
        return [table]
    width = max(_NARROWEST, _SLICE_BYTES // (table.element_size() * len(table)) // _NARROWEST * _NARROWEST)
    return [part.contiguous() for part in table.split(width, 1)]
