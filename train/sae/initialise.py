"""Where training begins: the paper's initialisation and the field's, each from its own generator.

Shapes: D model width, F features. Weights are drawn on the CPU so that every device starts from the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import SAEConfig
from .temporal_sae import TemporalSAE


@torch.no_grad()
def initialise(sae: TemporalSAE, config: SAEConfig, seed: int, centre_D: Tensor | None = None) -> None:
    """Fill ``sae`` as ``config`` says.

    Args:
        sae: overwritten in place.
        config: which initialisation, and whether the decoder's rows have unit norm.
        seed: of the one generator everything is drawn from.
        centre_D: mean or median of the scaled inputs, where b_dec begins unless the configuration says zero.

    """
    generator = torch.Generator().manual_seed(seed)
    d, f = sae.d_model, sae.n_features
    if config.initial == "paper":
        sae.W_enc.copy_(kaiming_uniform(d, f, generator))
        decoder = orthogonal(f, d, generator)
        sae.W_dec.copy_(_unit_rows(decoder) if config.decoder == "unit" else decoder)
    else:
        sae.W_dec.copy_(_unit_rows(torch.randn(f, d, generator=generator)))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    if config.b_dec != "zero" and centre_D is not None:
        sae.b_dec.copy_(centre_D)
    if sae.activation.kind == "jumprelu" and sae.threshold is not None:
        sae.threshold.fill_(config.threshold)


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


def _unit_rows(rows_FD: Tensor) -> Tensor:
    return rows_FD / rows_FD.norm(dim=-1, keepdim=True).clamp(min=1e-12)
