"""Decoder rows of norm 1: made so, kept so, and gradients without what would only be undone.

What is changed in place is changed block by block on a CPU: a block is read once and stays in the caches for every
operation on it, where whole matrices would go to memory and back for each.

Shapes: D width of a row, F rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_LEAST = 1e-12
_BLOCK = 1 << 18
"""Elements of a block: 1 MB in float32, of which two or three fit the caches of any processor of today."""


def unit_rows(rows_FD: Tensor) -> Tensor:
    """The rows with norm 1."""
    return rows_FD / rows_FD.norm(dim=-1, keepdim=True).clamp(min=_LEAST)


@torch.no_grad()
def make_unit(rows_FD: Tensor) -> None:
    """Give the rows norm 1, in place; a stack of such matrices, too."""
    for (rows,) in _blocks(rows_FD):
        rows.div_(rows.norm(dim=-1, keepdim=True).clamp(min=_LEAST))


@torch.no_grad()
def drop_radial(gradient_FD: Tensor, rows_FD: Tensor) -> None:
    """Take out of the gradient of each unit row, in place, what points along the row."""
    for gradient, rows in _blocks(gradient_FD, rows_FD):
        gradient.addcmul_((gradient * rows).sum(-1, keepdim=True), rows, value=-1)


def _blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each of some matrices of one shape, as views."""
    first = matrices[0]
    if first.dim() > 2:
        for parts in zip(*matrices, strict=True):
            yield from _blocks(*parts)
    elif first.device.type != "cpu":
        yield matrices
    else:
        n_rows = max(1, _BLOCK // first.shape[-1])
        yield from zip(*(matrix.split(n_rows) for matrix in matrices), strict=True)
