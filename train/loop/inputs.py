"""What a stream does to the activations before members see them: device, float32, scale, and which tokens
are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...cache.statistics import StoreStatistics
from ...cache.store import ActivationStore
from ...errors import StoreError
from ..config import DataConfig, SAEConfig
from .geometric_median import geometric_median, sample_tokens


@dataclass(frozen=True)
class Inputs:
    """Scale and statistics that a run keeps from its first step to its last, even if the store grows meanwhile."""

    rows: int  # the first so many rows of the store
    scale: float  # from raw activations to what members see
    norm_limit: float | None  # raw norm beyond which tokens are left out
    mean_D: Tensor  # of the scaled inputs, float32
    spread: float  # Σ_d variance of the scaled inputs
    median_D: Tensor | None = (
        None  # geometric median of (a sample of) the scaled inputs, float32; where a member begins there
    )

    @classmethod
    def of(cls, data: DataConfig, statistics: StoreStatistics) -> Inputs:
        """From a store's statistics.

        Raises:
            StoreError: the store holds NaN or infinity, or no token that counts.

        """
        if statistics.has_nonfinite:
            bad = f"{data.store} holds NaN or infinity in {statistics.n_nonfinite} tokens"
            raise StoreError(f"{bad}: find them with 'pipeline verify {data.store}' and extract those rows again")
        if statistics.n_tokens == 0:
            raise StoreError(f"{data.store} holds no token that is neither special nor padding: extract longer text")
        scale = statistics.rms_scale if data.scale == "rms" else 1.0
        return cls(
            rows=statistics.rows,
            scale=scale,
            norm_limit=data.norm_filter * statistics.median_norm if data.norm_filter else None,
            mean_D=torch.from_numpy(statistics.mean_D * scale).float(),
            spread=statistics.variance * scale**2,
        )

    def with_median(self, store: ActivationStore) -> Inputs:
        """The same with the geometric median, which takes a look at up to 128 chunks of the store."""
        median_D = geometric_median(sample_tokens(store, self.rows, self.norm_limit))
        return replace(self, median_D=median_D * self.scale)

    def centre(self, sae: SAEConfig) -> Tensor:
        """Where b_dec begins unless it is at zero, [D]."""
        return self.median_D if sae.b_dec == "geometric_median" and self.median_D is not None else self.mean_D

    def prepare(self, x_NWD: Tensor, device: torch.device) -> Tensor:
        """Stored bfloat16 windows as scaled float32 on ``device``."""
        x_NWD = x_NWD.to(device, non_blocking=True).float()
        return x_NWD if self.scale == 1.0 else x_NWD.mul_(self.scale)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "rows": self.rows,
            "scale": self.scale,
            "norm_limit": self.norm_limit,
            "mean": self.mean_D,
            "spread": self.spread,
            "median": self.median_D,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Inputs:
        """The inverse of :meth:`state_dict`."""
        return cls(
            state["rows"], state["scale"], state["norm_limit"], state["mean"], state["spread"], state.get("median")
        )
