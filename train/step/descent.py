"""From gradients to new weights, alone or in a stack, with as few passes over memory as there can be: of a wide
dictionary this part of a step takes what reading and writing its weights takes.

Shapes: D model width, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def clip(parameters: Sequence[Sequence[nn.Parameter]], limit: float) -> list[Tensor]:
    """Shrink the gradient of every member to norm ``limit`` where it is longer (:func:`torch.nn.utils.clip_grad_norm_`,
    for all members in as few calls as for one).

    Args:
        parameters: of every member; all have gradients for the same ones.
        limit: 0: none is shrunk.

    Returns:
        Every member's norm before.

    """
    gradients = [p.grad for own in parameters for p in own if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    norm_M = torch.linalg.vector_norm(norms.view(len(parameters), -1), dim=1)
    if limit:
        shrink_M = (limit / (norm_M + 1e-6)).clamp_(max=1.0)
        # On a CPU it costs nothing to look, and a product with 1 would read and write all of it.
        if norm_M.device.type != "cpu" or bool((shrink_M < 1).any()) or not bool(shrink_M.isfinite().all()):
            each = len(gradients) // len(parameters)
            shrink = [factor for factor in shrink_M.unbind() for _ in range(each)]
            torch._foreach_mul_(gradients, shrink)  # pyright: ignore[reportPrivateImportUsage]
    return list(norm_M.unbind())


def lies_transposed(weight: Tensor) -> bool:
    """Whether a matrix [D, F] is [F, D] in memory."""
    return weight.dim() == 2 and not weight.is_contiguous() and weight.t().is_contiguous()


@torch.no_grad()
def descend(optimiser: torch.optim.Optimizer, transposed: Sequence[Tensor]) -> None:
    """The optimiser's step.

    Args:
        optimiser: of parameters with gradients.
        transposed: those of them that lie transposed in memory. Given as [D, F], fused optimisers copy the gradient
            before they read it; so they are given as [F, D], in the order of their memory.

    """
    with _as_they_lie(transposed):
        optimiser.step()


@contextmanager
def _as_they_lie(weights: Sequence[Tensor]) -> Iterator[None]:
    def turn() -> None:
        for weight in weights:
            gradient, weight.grad = weight.grad, None
            weight.data = weight.data.t()
            weight.grad = None if gradient is None else gradient.t()

    turn()
    try:
        yield
    finally:
        turn()
