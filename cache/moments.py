"""Sums over tokens that can be taken shard by shard and put together: norms, means, variances, a histogram. Pure arithmetic.

Shapes: B rows, T positions, D model width, N tokens. Means and variances merge as Chan, Golub and LeVeque (1979) do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from .layout import PADDING, SPECIAL

_SHIFT = 12  # bits of float32 dropped by the histogram: 2048 bins per octave, each 0.05 % wide


def token_norms(x_BTD: torch.Tensor) -> np.ndarray:
    """‖x‖₂ of every token, float32 ``[B, T]``; not finite where the token is not."""
    # Row by row: the same shapes, hence the same bits, however many rows come at once.
    norms = [torch.linalg.vector_norm(row.float(), dim=-1) for row in x_BTD]
    return torch.stack(norms).numpy() if norms else np.empty(x_BTD.shape[:2], np.float32)


@dataclass
class Moments:
    """Count, mean vector and summed squared distance from it, of the tokens seen so far."""

    n: int
    mean_D: np.ndarray  # float64
    m2: float  # Σ_n ‖x_n − mean‖²

    @classmethod
    def none(cls, d_model: int) -> Moments:
        """Of no token."""
        return cls(0, np.zeros(d_model), 0.0)

    @classmethod
    def of(cls, x_ND: torch.Tensor) -> Moments:
        """Of these tokens, two passes."""
        if not len(x_ND):
            return cls.none(x_ND.shape[1])
        x = x_ND.float()
        mean = x.sum(0, dtype=torch.float64) / len(x)
        return cls(len(x), mean.numpy(), float((x - mean.float()).square_().sum(dtype=torch.float64)))

    def merged(self, other: Moments) -> Moments:
        """Of both sets of tokens."""
        n = self.n + other.n
        if not n:
            return self
        delta = other.mean_D - self.mean_D
        mean = self.mean_D + delta * (other.n / n)
        return Moments(n, mean, self.m2 + other.m2 + float(delta @ delta) * self.n * other.n / n)


@dataclass
class NormSums:
    """What the norms alone tell: histogram of ordinary tokens, sums per position and over special tokens."""

    context: int
    counts: np.ndarray = field(default_factory=lambda: np.zeros(1 << (31 - _SHIFT), np.int64))
    position_sum_T: np.ndarray = field(init=False)
    position_count_T: np.ndarray = field(init=False)
    special_sum: float = 0.0
    n_special: int = 0
    n_nonfinite: int = 0

    def __post_init__(self):
        self.position_sum_T = np.zeros(self.context)
        self.position_count_T = np.zeros(self.context, np.int64)

    def add(self, norms_BT: np.ndarray, flags_BT: np.ndarray) -> None:
        """Count the tokens of some rows."""
        finite = np.isfinite(norms_BT)
        token = finite & (flags_BT & PADDING == 0)
        special = token & (flags_BT & SPECIAL != 0)
        ordinary = norms_BT[token & ~special]
        self.counts += np.bincount(ordinary.view(np.uint32) >> _SHIFT, minlength=len(self.counts))
        self.position_sum_T += np.where(token, norms_BT, 0).sum(0, dtype=np.float64)
        self.position_count_T += token.sum(0)
        self.special_sum += float(norms_BT[special].sum(dtype=np.float64))
        self.n_special += int(special.sum())
        self.n_nonfinite += int((~finite).sum())

    def median(self) -> float:
        """Median norm of ordinary tokens, to 0.03 %; 0 without any."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        upto = np.cumsum(self.counts)
        return (self._value((total - 1) // 2, upto) + self._value(total // 2, upto)) / 2

    def _value(self, rank: int, upto: np.ndarray) -> float:
        """The norm of a rank (from 0), as if the norms of a bin lay evenly in it."""
        at = int(np.searchsorted(upto, rank, side="right"))
        share = (rank - int(upto[at]) + int(self.counts[at]) + 0.5) / int(self.counts[at])
        low, high = (float(np.uint32(bin_ << _SHIFT).view(np.float32)) for bin_ in (at, at + 1))
        return low + share * (high - low)

    def mean_by_position(self) -> np.ndarray:
        """Mean norm at every position, special tokens included; NaN where only padding lies."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.position_sum_T / self.position_count_T


def counted(norms_BT: np.ndarray, flags_BT: np.ndarray, limit: float) -> np.ndarray:
    """Which tokens enter means and training: neither special nor padding, finite, norm at most ``limit``; bool ``[B, T]``."""
    return (flags_BT & (SPECIAL | PADDING) == 0) & (norms_BT <= limit)


def merge(parts: Iterable[Moments], d_model: int) -> Moments:
    """All parts together, in the order given."""
    total = Moments.none(d_model)
    for part in parts:
        total = total.merged(part)
    return total
