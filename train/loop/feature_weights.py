"""λ2 of every feature by itself (``temporal.per_feature``): how much each counts in the temporal term.

Rules (docs/METHOD.md): ``autocorrelation``: a_i ∝ max(ρ_i, 0), ρ_i the feature's own correlation with the next token.
``density``: a_i ∝ p_i^(−1/2), p_i the share of tokens on which it fires. Both are scaled so that the mean over active
entries is 1, which keeps λ2 what it is, and lie within a factor of 10.

Shapes: F features, N windows, W positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EVERY = 10  # steps between two looks at the codes of neighbours, and between two settings of the weights
WINDOWS = 256  # that are looked at
_KEPT = 0.98  # of a sum, from one look to the next: half is forgotten after 340 steps
_MOST = 10.0  # a_i, and its inverse, at most
_SEEN = 20  # active tokens (of those remembered) from which a feature has a weight of its own


class FeatureWeights:
    """Running statistics of the features, and the weights that follow.

    Args:
        rule: autocorrelation or density.
        n_features: F.
        device: where they are kept.

    Attributes:
        value_F: the weights; all 1 before the first look.

    """

    def __init__(self, rule: str, n_features: int, device: torch.device):
        self.rule, self.value_F = rule, torch.ones(n_features, device=device)
        self._fired_F, self._tokens = torch.zeros(n_features, device=device), 0.0
        # Σ a, Σ b, Σ a², Σ b², Σ a b over pairs of neighbours, and how many pairs
        self._sums_SF, self._pairs = torch.zeros(5, n_features, device=device), 0.0
        self._active_F = torch.zeros(n_features, device=device)  # on how many of these pairs' tokens

    def count(self, fired_F: Tensor, n_tokens: int) -> None:
        """Take note of who fired in a step."""
        self._fired_F += fired_F
        self._tokens += n_tokens

    def compare(self, sums_SF: Tensor) -> None:
        """Take note of :func:`neighbour_sums`."""
        self._sums_SF.mul_(_KEPT).add_(sums_SF[:5])
        self._active_F.mul_(_KEPT).add_(sums_SF[5])
        self._pairs = self._pairs * _KEPT + float(sums_SF[6, 0])

    def settle(self) -> None:
        """Set the weights by what is remembered, and forget a little."""
        density_F = self._fired_F / max(1.0, self._tokens)
        if self.rule == "density":
            wanted_F, known_F = density_F.clamp(min=1e-12).rsqrt(), self._fired_F >= _SEEN
        else:
            a, b, aa, bb, ab = self._sums_SF / max(1.0, self._pairs)
            spread_F = ((aa - a * a) * (bb - b * b)).clamp(min=0).sqrt()
            wanted_F = ((ab - a * b) / spread_F.clamp(min=1e-12)).clamp(0, 1)
            known_F = (self._active_F >= _SEEN) & (spread_F > 1e-12)
        self._fired_F *= _KEPT
        self._tokens *= _KEPT
        shares_F = density_F * known_F
        mean = (shares_F * wanted_F).sum() / shares_F.sum().clamp(min=1e-12)
        if float(mean) <= 0:  # nothing is known yet, or nobody resembles the next token
            self.value_F.fill_(1.0)
            return
        self.value_F = torch.where(known_F, (wanted_F / mean).clamp(1 / _MOST, _MOST), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        kept = {"value": self.value_F, "fired": self._fired_F, "tokens": self._tokens}
        return kept | {"sums": self._sums_SF, "active": self._active_F, "pairs": self._pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        for mine, name in (
            (self.value_F, "value"), (self._fired_F, "fired"), (self._sums_SF, "sums"), (self._active_F, "active"),
        ):  # fmt: skip
            mine.copy_(state[name])
        self._tokens, self._pairs = state["tokens"], state["pairs"]


def neighbour_sums(z_NWF: Tensor) -> Tensor:
    """Σ a, Σ b, Σ a², Σ b², Σ a b, active tokens and pairs [7, F], over the pairs (a, b) of neighbours in windows."""
    a, b = z_NWF[:, :-1].flatten(0, 1), z_NWF[:, 1:].flatten(0, 1)
    active_F = ((a > 0).sum(0) + (b > 0).sum(0)).to(a.dtype)
    pairs_F = torch.full_like(active_F, len(a))
    return torch.stack([a.sum(0), b.sum(0), (a * a).sum(0), (b * b).sum(0), (a * b).sum(0), active_F, pairs_F])
