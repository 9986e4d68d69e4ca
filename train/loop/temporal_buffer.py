"""The circular temporal buffer: lag correlations of every feature, updated while tokens arrive.

It holds the last T code vectors and, per feature and lag, the sum of products and the two sums over the same pairs. The
memory is O(FT) however many tokens arrive, as the TC-SAE paper describes. Several streams can be processed side by
side.

Shapes: B streams side by side, F features, T length of the buffer; lags 1 … T−1.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TemporalBuffer:
    """Lag correlations of features over consecutive tokens.

    Args:
        n_features: F.
        length: T, at least 2.
        streams: B, the number of tokens that arrive together, one per stream.
        device: where the sums are kept, in float64.

    Raises:
        ValueError: the length is below 2, so that there are no lags.

    """

    def __init__(self, n_features: int, length: int, *, streams: int = 1, device: torch.device | str = "cpu"):
        if length < 2:
            raise ValueError(f"a buffer of {length} has no lags: its length must be at least 2")
        self.length = length
        self._last_TBF = torch.zeros(length, streams, n_features, device=device)
        self._run_B = torch.zeros(
            streams, dtype=torch.int64, device=device
        )  # consecutive tokens in the buffer, per stream
        self._head = 0
        lags = (length - 1, n_features)
        self.products_LF = torch.zeros(lags, dtype=torch.float64, device=device)  # Σ z_t z_{t−τ}
        self.leading_LF = torch.zeros(lags, dtype=torch.float64, device=device)  # Σ z_t over the same pairs
        self.trailing_LF = torch.zeros(lags, dtype=torch.float64, device=device)  # Σ z_{t−τ} over the same pairs
        self.pairs_L = torch.zeros(length - 1, dtype=torch.int64, device=device)
        self.sum_F = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.squares_F = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.tokens = 0

    @torch.no_grad()
    def push(self, z_BF: Tensor, fresh_B: Tensor | None = None) -> None:
        """Add the next token of every stream.

        Args:
            z_BF: the codes of the tokens.
            fresh_B: bool; true where a new window or document begins, so that the token does not follow the last one.

        """
        if fresh_B is not None:
            self._run_B[fresh_B] = 0
        z_BF = z_BF.float()
        for lag in range(1, self.length):
            known_B = self._run_B >= lag
            now, before = z_BF[known_B].double(), self._last_TBF[(self._head - lag) % self.length][known_B].double()
            self.products_LF[lag - 1] += (now * before).sum(0)
            self.leading_LF[lag - 1] += now.sum(0)
            self.trailing_LF[lag - 1] += before.sum(0)
            self.pairs_L[lag - 1] += known_B.sum()
        self._last_TBF[self._head] = z_BF
        self._head = (self._head + 1) % self.length
        self._run_B += 1
        self.sum_F += z_BF.double().sum(0)
        self.squares_F += z_BF.double().pow(2).sum(0)
        self.tokens += len(z_BF)

    def correlations(self, *, centred: bool = True) -> Tensor:
        """Autocorrelation [T−1, F] at lags 1 … T−1; NaN if a feature never varied (or fired), or a lag has no pair.

        Centred: the covariance of the pairs about the feature's overall mean, divided by its variance. Uncentred: E[z_t
        z_{t−τ}] / E[z²].
        """
        pairs_L1 = self.pairs_L[:, None].double()
        product_LF = self.products_LF / pairs_L1
        second_F = self.squares_F / max(self.tokens, 1)
        if not centred:
            return torch.where(second_F > 0, product_LF / second_F, torch.nan)
        mean_F = self.sum_F / max(self.tokens, 1)
        variance_F = second_F - mean_F.pow(2)
        covariance_LF = product_LF - mean_F * (self.leading_LF + self.trailing_LF) / pairs_L1 + mean_F.pow(2)
        # A variance smaller than the rounding errors of its two parts counts as zero.
        return torch.where(variance_F > 1e-12 * second_F, covariance_LF / variance_F, torch.nan)
