"""Which step trains a configuration: by autograd, which is always right, or by hand, where that was derived.

By hand needs three things: a step for the architecture and its activation, and a gradient for the temporal term on
active entries. Each is registered where it is written; a test holds each to autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from ...errors import UsageError
from ...registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import TrainConfig
    from ..loss.objective import StepResult
    from .temporal_gradient import Compared

    Gradient = Callable[[Compared, Tensor], Tensor]

G = TypeVar("G", bound="Callable[..., Tensor]")
Step = Literal["autograd", "fast"]


@dataclass(frozen=True)
class HandWritten:
    """What the step by hand of an architecture knows: its activations, on which kinds of device."""

    activations: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")
    step: Callable[..., StepResult] | None = None
    """What members are stepped by, each by itself, called like ``autograd_step``; None: :mod:`..loop.stack` does."""


_OF_FIXED_K = ("topk", "batchtopk")
STEPS: Registry[HandWritten] = Registry(
    "hand-written step", {"sae": "train.step.by_hand", "txc": "train.step.crosscoder"}
)
GRADIENTS: Registry[Gradient] = Registry(
    "hand-written temporal gradient",
    dict.fromkeys(
        ("pairwise", "window_mean", "normalised", "cosine", "l1", "contrastive", "squared_norms"),
        "train.step.temporal_gradient",
    ),
)


def temporal_gradient(name: str) -> Callable[[G], G]:
    """Register the gradient of the temporal term ``name`` on active entries; optional, since autograd finds it too.

    The function takes a :class:`~tcsae.train.step.temporal_gradient.Compared` and ∂L/∂z at the active entries, adds λ2
    times the term's gradient to the latter, and returns the term of every member [M].
    """

    def add(function: G) -> G:
        GRADIENTS.add(name, function)
        return function

    return add


def choose_step(config: TrainConfig, form: str, device: str) -> tuple[Step, str]:
    """The step that ``config.run.step`` means for a configuration, and a reason where ``auto`` is not by hand.

    Args:
        config: of a member.
        form: the temporal term it trains with, ``none`` for none (a partner can replace the configured one).
        device: cpu, cuda …

    Raises:
        UsageError: ``fast`` was asked for where there is no step by hand.

    """
    lacking = _lacking(config, form, device)
    if config.run.step == "autograd":
        return "autograd", "asked for"
    if lacking is None:
        return "fast", ""
    what, known = lacking
    if config.run.step == "fast":
        there = f"there is one for {', '.join(known)}"
        raise UsageError(f"there is no hand-written step for {what} ({there}): use --step autograd or auto")
    return "autograd", f"no hand-written step for {what}"


def _lacking(config: TrainConfig, form: str, device: str) -> tuple[str, Iterable[str]] | None:
    """What there is no step by hand for, and what there is one for; None where nothing is lacking."""
    sae = config.sae
    if sae.architecture not in STEPS:
        return f"architecture '{sae.architecture}'", STEPS
    known = STEPS.get(sae.architecture)
    if sae.activation not in known.activations:
        return f"activation '{sae.activation}'", known.activations
    if form != "none" and form not in GRADIENTS:
        return f"temporal term '{form}'", GRADIENTS
    if config.data.view == "pairs" and config.data.pair_loss == "current" and sae.activation not in _OF_FIXED_K:
        return f"activation '{sae.activation}' where data.pair_loss is 'current'", _OF_FIXED_K
    if device not in known.devices:
        return f"device {device}", known.devices
    return None
