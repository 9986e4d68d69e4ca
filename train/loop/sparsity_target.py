"""The controller that makes L0 land where it is told (``loss.target_l0``), instead of a search for λ1.

The logarithm of what it steers moves every few steps by K_p (e − e') + K_i e, with e = log(L0 / target) and e' the one
before: a proportional-integral controller in its incremental form. L0 follows late, since weights have to move first,
and it begins at half the dictionary, far from any target. Both would make a plain integral overshoot by orders of
magnitude, so that relu's features die. Here it moves no faster than if e were small, and waits while L0 approaches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

EVERY = 5  # steps between two corrections: on a GPU, reading L0 waits for the device
# Tried on real activations (docs/LOG.md). More oscillates, less is late.
_PROPORTIONAL, _INTEGRAL = 1.0, 0.5
_FAR, _NEAR = 1.0, 0.2  # |e| beyond which the proportional and the integral part grow no further
_CLOSE = 0.1  # |e| below which the integral part does not wait for L0
_SOON, _SMOOTHING = 80, 0.3  # corrections in which L0 would be there, if it approaches; memory of how fast it does
_LEAST = 0.1  # L0 that a dead dictionary counts as
_WITHIN = 0.03  # of the target, where a run says nothing


class SparsityTarget:
    """What λ1 is to be multiplied with so that ``target`` features are active per token.

    Args:
        target: L0.
        device: where tokens are counted.

    """

    def __init__(self, target: float, device: torch.device):
        self.target, self._log_factor, self._error, self._approach = target, 0.0, math.nan, 0.0
        self._steps, self._tokens = 0, 0
        self._fired = torch.zeros((), dtype=torch.int64, device=device)
        self.l0 = math.nan
        """Active features per token, over the steps before the last correction."""

    @property
    def factor(self) -> float:
        """Of λ1; of the aim of a quadratic penalty, its inverse."""
        return math.exp(self._log_factor)

    def observe(self, fired_F: Tensor, n_tokens: int) -> None:
        """Take note of a step, and correct the factor once every few.

        Args:
            fired_F: tokens on which each feature was active.
            n_tokens: of how many.

        """
        self._fired += fired_F.sum()
        self._tokens += n_tokens
        self._steps += 1
        if self._steps < EVERY:
            return
        self.l0 = int(self._fired) / self._tokens
        error, before = math.log(max(self.l0, _LEAST) / self.target), self._error
        if math.isnan(before):
            self._log_factor += _PROPORTIONAL * _within(_FAR, error)
        else:
            self._approach += _SMOOTHING * (abs(before) - abs(error) - self._approach)
            self._log_factor += _PROPORTIONAL * (_within(_FAR, error) - _within(_FAR, before))
            if abs(error) < _CLOSE or self._approach < abs(error) / _SOON:
                self._log_factor += _INTEGRAL * _within(_NEAR, error)
        self._error, self._steps, self._tokens = error, 0, 0
        self._fired.zero_()

    def missed(self) -> str | None:
        """A sentence about an L0 that is not the target's, or None."""
        if math.isnan(self.l0):
            return f"the run is too short to bring L0 to the target {self.target:g}: train for more steps"
        off = abs(self.l0 / self.target - 1)
        if off <= _WITHIN:
            return None
        what = f"L0 ended at {self.l0:.4g}, {off:.0%} from the target {self.target:g}"
        return f"{what}: train for more steps, or begin at another --l1"

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        kept = {"log_factor": self._log_factor, "error": self._error, "approach": self._approach, "l0": self.l0}
        return kept | {"steps": self._steps, "tokens": self._tokens, "fired": int(self._fired)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self._log_factor, self._error, self.l0 = state["log_factor"], state["error"], state["l0"]
        self._approach = state["approach"]
        self._steps, self._tokens = state["steps"], state["tokens"]
        self._fired.fill_(state["fired"])


def _within(limit: float, error: float) -> float:
    return min(limit, max(-limit, error))
