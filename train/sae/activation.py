"""What turns pre-activations into codes: four activations as one small specification and pure functions.

Shapes: N tokens (any leading dimensions), F features. Pre-activations are x·W_enc + b_enc in the scale the SAE works
in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from ...errors import UsageError
from ..config import ActivationKind


@dataclass(frozen=True)
class Activation:
    """Which activation, with its one or two numbers.

    ``k`` is the number of active features per token (topk: exactly, batchtopk: on average over the batch).
    ``bandwidth`` is the width ε of the rectangle that stands in for the derivative of the step in jumprelu.

    Raises:
        UsageError: an unknown kind, or a ``k`` that is missing or meaningless.

    """

    kind: ActivationKind = "relu"
    k: int | None = None
    bandwidth: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in get_args(ActivationKind):
            raise UsageError(
                f"activation '{self.kind}' is unknown: choose one of {', '.join(get_args(ActivationKind))}"
            )
        counted = self.kind in ("topk", "batchtopk")
        if counted and (self.k is None or self.k < 1):
            raise UsageError(f"activation '{self.kind}' needs k ≥ 1, but k is {self.k}: give --k")
        if not counted and self.k is not None:
            raise UsageError(
                f"activation '{self.kind}' has no k, but k is {self.k}: leave it out or choose topk or batchtopk"
            )
        if self.bandwidth <= 0:
            raise UsageError(f"the jumprelu bandwidth is {self.bandwidth}: it must be positive")


def top_k(pre_NF: Tensor, k: int) -> Tensor:
    """The k largest pre-activations of every token, negative ones cut to zero; gradient through the kept
    entries only.
    """
    kept = torch.topk(pre_NF, k, dim=-1, sorted=False)
    return torch.zeros_like(pre_NF).scatter(-1, kept.indices, torch.relu(kept.values))


def batch_top_k(pre_NF: Tensor, k: int) -> Tensor:
    """The k·N largest positive pre-activations of the whole batch (Bussmann et al., arXiv 2412.06410, eq 4)."""
    flat = pre_NF.reshape(-1)
    kept = torch.topk(flat, min(k * (flat.numel() // pre_NF.shape[-1]), flat.numel()), sorted=False)
    return torch.zeros_like(flat).scatter(0, kept.indices, torch.relu(kept.values)).view_as(pre_NF)


def jump_relu(pre_NF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """relu(pre) where pre > threshold, else 0, with a straight-through gradient to the threshold (arXiv 2407.14435, eq
    11).
    """
    return _JumpReLU.apply(pre_NF, threshold_F, bandwidth)  # type: ignore[return-value]


def step_function(pre_NF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """1 where pre > threshold, else 0: its sum is the L0 of jumprelu, with the pseudo-derivative of arXiv 2407.14435,
    eq 12.
    """
    return _Step.apply(pre_NF, threshold_F, bandwidth)  # type: ignore[return-value]


def _rectangle(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype) / bandwidth


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.relu(pre) * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        pre, threshold = ctx.saved_tensors
        to_threshold = -threshold * _rectangle(pre, threshold, ctx.bandwidth) * grad
        return grad * (pre > threshold.clamp(min=0)), to_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        pre, threshold = ctx.saved_tensors
        return None, (-_rectangle(pre, threshold, ctx.bandwidth) * grad).sum_to_size(threshold.shape), None
