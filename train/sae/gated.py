"""The gated SAE: which features are active and how much are decided apart. Read and evaluated, not trained here.

Shapes: D model width, F features; any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .temporal_sae import TemporalSAE


class GatedSAE(nn.Module):
    """z = [x' W_enc + b_gate > 0] · relu(x' W_enc · exp(r_mag) + b_mag) with x' = x − b_dec (arXiv
    2404.16014, eq 5–8).
    """

    def __init__(
        self, weights: Mapping[str, Tensor], *, subtract_b_dec: bool = True, metadata: dict[str, Any] | None = None
    ):
        super().__init__()
        self.W_enc, self.W_dec = nn.Parameter(weights["W_enc"]), nn.Parameter(weights["W_dec"])
        self.b_dec, self.r_mag = nn.Parameter(weights["b_dec"]), nn.Parameter(weights["r_mag"])
        self.b_gate, self.b_mag = nn.Parameter(weights["b_gate"]), nn.Parameter(weights["b_mag"])
        self.d_model, self.n_features = self.W_enc.shape
        self.subtract_b_dec, self.metadata = subtract_b_dec, dict(metadata or {})

    def encode(self, x: Tensor) -> Tensor:
        """Activations [.., D] → codes [.., F]."""
        shared = ((x - self.b_dec) if self.subtract_b_dec else x) @ self.W_enc
        return (shared + self.b_gate > 0) * torch.relu(shared * self.r_mag.exp() + self.b_mag)

    def decode(self, z: Tensor) -> Tensor:
        """Codes [.., F] → reconstruction [.., D]."""
        return z @ self.W_dec + self.b_dec


AnySAE = TemporalSAE | GatedSAE
