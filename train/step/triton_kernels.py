"""Triton kernels for CUDA: what surrounds the matrix products in one pass, and the products of sparse codes.

Every kernel sums in float32 whatever it reads, and none uses atomics: partial sums are written and added in a fixed
order, so a step repeats bit for bit. Products of whole matrices stay with cuBLAS, which runs bfloat16 on tensor cores
and sums in float32. Triton's interpreter (``TRITON_INTERPRET=1``) runs the same source on a CPU, which is how tests
hold it to float64.

Shapes: M members, N windows, W positions, R = M·N·W rows (tokens of one member after another), D model width, F
features of a member, C = M·F columns, E active entries.
"""

# pyright: reportArgumentType=false, reportMissingImports=false
# (a constexpr parameter takes plain numbers, and torch's builds for CPUs come without Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WINDOWS, _FEATURES = 16, 128  # tile of the two passes over [M, F]
_ENTRIES, _WIDTH = (
    8,
    256,
)  # tile of the sparse products: entries at a time, so that several rows are on their way, and D


def forward_codes(
    pre_RF: Tensor, w: int, codes_dtype: torch.dtype, n_members: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ReLU of the pre-activations and, in the same pass, everything the loss wants to know of the codes.

    Args:
        pre_RF: contiguous pre-activations, for every member of its N·w tokens, window after window.
        w: positions of a window.
        codes_dtype: of the codes, which go into matrix products.
        n_members: M.

    Returns:
        Codes z [R, F]; Σ_n z [C]; the number of tokens on which each feature is active [C], int64; and Σ (z_t −
        z_{t+1})² over the pairs of all windows [C].

    """
    n_windows, n_features = pre_RF.shape[0] // n_members // w, pre_RF.shape[1]
    n_blocks = triton.cdiv(n_windows, _WINDOWS)
    z = torch.empty_like(pre_RF, dtype=codes_dtype)
    partial = torch.empty(3, n_blocks, n_members * n_features, device=pre_RF.device, dtype=torch.float32)
    grid = (n_blocks, triton.cdiv(n_features, _FEATURES), n_members)
    with torch.cuda.device_of(pre_RF):  # Triton starts kernels on the current device, wherever the tensors are
        _forward_codes[grid](pre_RF, z, partial, n_windows, n_features, n_blocks, W=w, BN=_WINDOWS, BF=_FEATURES)
    sums, counts, changes = partial.sum(1)
    return z, sums, counts.long(), changes


def backward_codes(
    z_RF: Tensor, to_codes_RF: Tensor, w: int, sparsity_C: Tensor, temporal_C: Tensor, n_members: int = 1
) -> tuple[Tensor, Tensor]:
    """The gradient at the active codes, in one pass: reconstruction, sparsity and temporal term.

    Args:
        z_RF: codes, as :func:`forward_codes` gave them.
        to_codes_RF: g·W_decᵀ; overwritten.
        w: positions of a window.
        sparsity_C: λ1 over the number of tokens per feature, times the norm of its decoder row if norms count.
        temporal_C: λ2 / P with P the number of pairs, zero for the features that the temporal term does not see.
        n_members: M.

    Returns:
        ``to_codes_RF``, now ∂L/∂z at the active entries and zero elsewhere, and its sum over tokens [C] in float32.

    """
    n_windows, n_features = z_RF.shape[0] // n_members // w, z_RF.shape[1]
    n_blocks = triton.cdiv(n_windows, _WINDOWS)
    partial = torch.empty(n_blocks, n_members * n_features, device=z_RF.device, dtype=torch.float32)
    grid = (n_blocks, triton.cdiv(n_features, _FEATURES), n_members)
    tensors = (z_RF, to_codes_RF, sparsity_C, temporal_C, partial)
    with torch.cuda.device_of(z_RF):
        _backward_codes[grid](*tensors, n_windows, n_features, W=w, BN=_WINDOWS, BF=_FEATURES)
    return to_codes_RF, partial.sum(0)


def weighted_rows(table: Tensor, index_E: Tensor, starts: Tensor, weights_E: Tensor) -> Tensor:
    """One weighted sum of rows of ``table`` [·, D] per bag, entries starts[b] … starts[b + 1] belonging to bag b:
    [bags, D].
    """
    table = table.contiguous()
    n_bags, width = starts.numel() - 1, table.shape[1]
    out = torch.empty(n_bags, width, device=table.device, dtype=torch.float32)
    grid = (n_bags, triton.cdiv(width, _WIDTH))
    with torch.cuda.device_of(table):
        _weighted_rows[grid](table, index_E, starts, weights_E, out, width, BE=_ENTRIES, BD=_WIDTH)
    return out


def inner_products(a_ND: Tensor, W_FD: Tensor, column_E: Tensor, row_starts: Tensor) -> Tensor:
    """⟨a[n], W[f]⟩ at every entry (n, f) [E], entries of row n being row_starts[n] … row_starts[n + 1]."""
    a_ND, W_FD = a_ND.contiguous(), W_FD.contiguous()
    out = torch.empty(column_E.numel(), device=a_ND.device, dtype=torch.float32)
    with torch.cuda.device_of(a_ND):
        _inner_products[(len(a_ND),)](a_ND, W_FD, column_E, row_starts, out, a_ND.shape[1], BE=_ENTRIES, BD=_WIDTH)
    return out


@triton.jit
def _forward_codes(
    pre, z, partial, n_windows, n_features, n_blocks, W: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr
):
    block = tl.program_id(0)
    window = block * BN + tl.arange(0, BN)
    feature = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (window < n_windows)[:, None] & (feature < n_features)[None, :]
    member = tl.program_id(2).to(tl.int64)
    # int64: R·F passes 2³¹ at 32k tokens of 65k features.
    place = (member * n_windows + window)[:, None] * W * n_features + feature[None, :]
    total = tl.zeros((BF,), tl.float32)
    count = tl.zeros((BF,), tl.float32)
    change = tl.zeros((BF,), tl.float32)
    before = tl.zeros((BN, BF), tl.float32)
    for t in range(W):
        raw = tl.load(pre + place, mask=inside, other=0.0).to(tl.float32)
        # Not maximum(raw, 0): a NaN has to stay one.
        now = tl.where(raw <= 0.0, 0.0, raw)
        tl.store(z + place, now.to(z.dtype.element_ty), mask=inside)
        now = now.to(z.dtype.element_ty).to(tl.float32)
        total += tl.sum(now, axis=0)
        count += tl.sum((now > 0.0).to(tl.float32), axis=0)
        if t > 0:
            change += tl.sum((now - before) * (now - before), axis=0)
        before = now
        place += n_features
    n_columns = tl.num_programs(2) * n_features
    out = partial + block * n_columns + member * n_features + feature
    tl.store(out, total, mask=feature < n_features)
    tl.store(out + n_blocks * n_columns, count, mask=feature < n_features)
    tl.store(out + 2 * n_blocks * n_columns, change, mask=feature < n_features)


@triton.jit
def _backward_codes(
    z, slope, sparsity, temporal, partial, n_windows, n_features, W: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr
):
    block = tl.program_id(0)
    window = block * BN + tl.arange(0, BN)
    feature = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (window < n_windows)[:, None] & (feature < n_features)[None, :]
    member = tl.program_id(2).to(tl.int64)
    place = (member * n_windows + window)[:, None] * W * n_features + feature[None, :]
    column = member * n_features + feature
    penalty = tl.load(sparsity + column, mask=feature < n_features, other=0.0).to(tl.float32)
    pull = 2.0 * tl.load(temporal + column, mask=feature < n_features, other=0.0).to(tl.float32)
    total = tl.zeros((BF,), tl.float32)
    before = tl.zeros((BN, BF), tl.float32)
    now = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
    for t in range(W):
        after = tl.zeros((BN, BF), tl.float32)
        apart = tl.zeros((BN, BF), tl.float32)
        if t + 1 < W:
            after = tl.load(z + place + n_features, mask=inside, other=0.0).to(tl.float32)
            apart += now - after
        if t > 0:
            apart += now - before
        value = tl.load(slope + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(now == 0.0, 0.0, value + penalty[None, :] + pull[None, :] * apart)
        tl.store(slope + place, value.to(slope.dtype.element_ty), mask=inside)
        total += tl.sum(value, axis=0)
        before = now
        now = after
        place += n_features
    tl.store(partial + block * tl.num_programs(2) * n_features + column, total, mask=feature < n_features)


@triton.jit
def _weighted_rows(table, index, starts, weights, out, width, BE: tl.constexpr, BD: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    first = tl.load(starts + bag)
    last = tl.load(starts + bag + 1)
    for begin in range(first, last, BE):
        entry = begin + tl.arange(0, BE)
        real = entry < last
        row = tl.load(index + entry, mask=real, other=0).to(tl.int64)
        weight = tl.load(weights + entry, mask=real, other=0.0).to(tl.float32)
        inside = real[:, None] & (place < width)[None, :]
        rows = tl.load(table + row[:, None] * width + place[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * rows, axis=0)
    tl.store(out + bag * width + place, total, mask=place < width)


@triton.jit
def _inner_products(a, weight, column, starts, out, width, BE: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + row)
    last = tl.load(starts + row + 1)
    for begin in range(first, last, BE):
        entry = begin + tl.arange(0, BE)
        real = entry < last
        feature = tl.load(column + entry, mask=real, other=0).to(tl.int64)
        total = tl.zeros((BE,), tl.float32)
        for left in range(0, width, BD):
            place = left + tl.arange(0, BD)
            mine = tl.load(a + row * width + place, mask=place < width, other=0.0).to(tl.float32)
            inside = real[:, None] & (place < width)[None, :]
            rows = tl.load(weight + feature[:, None] * width + place[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(mine[None, :] * rows, axis=1)
        tl.store(out + entry, total, mask=real)
