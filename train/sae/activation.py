"""What turns pre-activations into codes: a small specification, and one class per activation behind it.

Shapes: N tokens (any leading dimensions), F features. Pre-activations are x·W_enc + b_enc in the scale the SAE works
in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import UsageError
from .registry import ACTIVATIONS, activation

if TYPE_CHECKING:
    from .temporal_sae import TemporalSAE


@dataclass(frozen=True)
class Activation:
    """Which activation, with its one or two numbers.

    ``k`` is the number of active features per token (topk: exactly, batchtopk: on average over the batch).
    ``bandwidth`` is the width ε of the rectangle that stands in for the derivative of the step in jumprelu.

    Raises:
        UsageError: an unknown kind, or a ``k`` that is missing or meaningless.

    """

    kind: str = "relu"
    k: int | None = None
    bandwidth: float = 0.05

    def __post_init__(self) -> None:
        fixes_k = ACTIVATIONS.get(self.kind).fixes_k
        if fixes_k and (self.k is None or self.k < 1):
            raise UsageError(f"activation '{self.kind}' needs k ≥ 1, but k is {self.k}: give --k")
        if not fixes_k and self.k is not None:
            has_k = ", ".join(name for name in ACTIVATIONS if ACTIVATIONS.get(name).fixes_k)
            raise UsageError(
                f"activation '{self.kind}' has no k, but k is {self.k}: leave it out or choose one of {has_k}"
            )
        if self.bandwidth <= 0:
            raise UsageError(f"the jumprelu bandwidth is {self.bandwidth}: it must be positive")

    @property
    def function(self) -> ActivationFunction:
        """What it does."""
        return ACTIVATIONS.get(self.kind)()


class ActivationFunction:
    """Base of all activations: a new one overrides :meth:`codes` and whatever else differs."""

    fixes_k: ClassVar[bool] = False
    """Whether L0 is k by construction: then no λ1 is needed, and AuxK revives dead features."""
    default_l1: ClassVar[float] = 1.5
    """λ1 where the configuration leaves it open; L0 ≈ 50 on a real model (docs/LOG.md)."""
    threshold: ClassVar[Literal["none", "per_feature", "running"]] = "none"
    """per_feature: a parameter [F]. running: one number that training keeps, used outside training mode."""

    def codes(self, pre: Tensor, sae: TemporalSAE) -> Tensor:
        """Pre-activations [.., F] → codes [.., F], ≥ 0."""
        raise NotImplementedError

    def sparsity(self, pre: Tensor, z: Tensor, sae: TemporalSAE) -> Tensor | None:
        """What λ1 weighs, a mean over tokens; None: Σ z."""
        return None


@activation("relu")
class ReLU(ActivationFunction):
    """max(pre, 0)."""

    def codes(self, pre: Tensor, sae: TemporalSAE) -> Tensor:
        """See base."""
        return torch.relu(pre)


@activation("topk")
class TopK(ActivationFunction):
    """The k largest of every token."""

    fixes_k = True

    def codes(self, pre: Tensor, sae: TemporalSAE) -> Tensor:
        """See base."""
        return top_k(pre, sae.activation.k or 0)


@activation("batchtopk")
class BatchTopK(ActivationFunction):
    """The k·N largest of a batch of N tokens while training; above a threshold otherwise (arXiv 2412.06410)."""

    fixes_k = True
    threshold = "running"

    def codes(self, pre: Tensor, sae: TemporalSAE) -> Tensor:
        """See base."""
        assert sae.threshold is not None  # noqa: S101 - for the type checker
        if sae.training or sae.threshold < 0:
            return batch_top_k(pre, sae.activation.k or 0)
        return torch.relu(pre) * (pre > sae.threshold)


@activation("jumprelu")
class JumpReLU(ActivationFunction):
    """relu(pre) where pre exceeds the feature's learned threshold; λ1 weighs L0 (arXiv 2407.14435)."""

    default_l1 = 0.3
    threshold = "per_feature"

    def codes(self, pre: Tensor, sae: TemporalSAE) -> Tensor:
        """See base."""
        assert sae.threshold is not None  # noqa: S101 - for the type checker
        return jump_relu(pre, sae.threshold, sae.activation.bandwidth)

    def sparsity(self, pre: Tensor, z: Tensor, sae: TemporalSAE) -> Tensor | None:
        """L0, with a pseudo-derivative to the thresholds."""
        assert sae.threshold is not None  # noqa: S101 - for the type checker
        return step_function(pre, sae.threshold, sae.activation.bandwidth).sum(-1).mean()


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
