"""Learning rate and warm-ups as pure functions of the step; a checkpoint therefore needs no state of a schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..config import OptimiserConfig


def learning_rate(step: int, steps: int, config: OptimiserConfig) -> float:
    """The rate of step ``step`` (from 0) of ``steps``.

    Linear warm-up, then constant, then linear or cosine decay to ``final_lr`` times the rate over the last
    ``decay_share`` of the steps.
    """
    warmup, decay = rate_lengths(steps, config)
    rising = (step + 1) / warmup if step < warmup else 1.0
    falling = (steps - step) / decay if steps - step < decay else 1.0
    if config.decay == "cosine":
        falling = (1 - math.cos(math.pi * falling)) / 2
    return config.lr * min(rising, config.final_lr + (1 - config.final_lr) * falling)


def rate_lengths(steps: int, config: OptimiserConfig) -> tuple[int, int]:
    """Steps over which the learning rate grows at the beginning, and falls at the end, of ``steps``."""
    return min(config.warmup, int(config.warmup_share * steps)), int(config.decay_share * steps)


def warmup_factor(step: int, steps: int, share: float) -> float:
    """A factor that grows linearly from zero to one over the first ``share`` of the run."""
    length = int(share * steps)
    return min(1.0, step / length) if length else 1.0


def set_rate(optimisers: Iterable[torch.optim.Optimizer], step: int, steps: int, config: OptimiserConfig) -> float:
    """Set the learning rate of step ``step`` of ``steps`` in all optimisers and return it.

    A parameter group's own factor ``times`` is applied to the group's rate, but not to the returned one.
    """
    lr = learning_rate(step, steps, config)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = lr * group.get("times", 1)
    return lr
