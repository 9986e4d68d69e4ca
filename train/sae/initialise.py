"""Where training begins: the paper's initialisation and the field's, each from its own generator.

Shapes: D model width, F features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kaiming_uniform(d_model: int, n_features: int, generator: torch.Generator) -> Tensor:
    """[D, F] uniform in ±√(6 / d_model): gain √2 (a = 0) and the fan-in of the encoder, which is d_model.

    ``torch.nn.init.kaiming_uniform_`` on this layout would take n_features for the fan-in.
    """
    bound = math.sqrt(6 / d_model)
    return (torch.rand(d_model, n_features, generator=generator) * 2 - 1) * bound


def orthogonal(n_features: int, d_model: int, generator: torch.Generator) -> Tensor:
    """[F, D] with orthonormal rows where F ≤ D, else with orthonormal columns: rows of norm √(D/F) on average."""
    tall = torch.randn(max(n_features, d_model), min(n_features, d_model), generator=generator)
    q, r = torch.linalg.qr(tall)
    q = q * torch.sign(torch.diagonal(r))
    return q if n_features >= d_model else q.T
