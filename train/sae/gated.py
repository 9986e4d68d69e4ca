"""The gated SAE: which features are active, and how much, are decided apart (arXiv 2404.16014).

Shapes: D model width, F features, any leading dimensions.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..config import SAEConfig
from ..loss import terms
from ..loss.objective import Objective
from ..loss.terms import at_least_float32
from .protocol import SAEOutput, SparseAutoencoder
from .registry import architecture
from .unit_rows import unit_rows


@architecture("gated")
class GatedSAE(SparseAutoencoder):
    """z = [x' W_enc + b_gate > 0] · relu(x' W_enc · exp(r_mag) + b_mag) with x' = x − b_dec (eq 5–8).

    Args:
        d_model: width of the activations.
        n_features: size of the dictionary.
        subtract_b_dec: whether x' is x − b_dec or x.
        metadata: where the SAE belongs; saved with it.

    """

    def __init__(
        self, d_model: int, n_features: int, *, subtract_b_dec: bool = True, metadata: dict[str, Any] | None = None
    ):
        super().__init__(d_model, n_features, metadata=metadata)
        self.subtract_b_dec = subtract_b_dec
        self.W_enc = nn.Parameter(torch.zeros(n_features, d_model).t())
        self.W_dec = nn.Parameter(torch.zeros(n_features, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.b_gate, self.b_mag, self.r_mag = (nn.Parameter(torch.zeros(n_features)) for _ in range(3))

    @classmethod
    def build(cls, config: SAEConfig, d_model: int) -> Self:
        """See :class:`SparseAutoencoder`."""
        return cls(d_model, config.width)

    @torch.no_grad()
    def initialise(self, config: SAEConfig, seed: int, centre_D: Tensor | None = None) -> None:
        """Random unit decoder rows, the encoder their transpose, gate and magnitude alike."""
        generator = torch.Generator().manual_seed(seed)
        self.W_dec.copy_(unit_rows(torch.randn(self.n_features, self.d_model, generator=generator)))
        self.W_enc.copy_(self.W_dec.T)
        if config.b_dec != "zero" and centre_D is not None:
            self.b_dec.copy_(centre_D)

    @classmethod
    def auxiliary_weight(cls, config: SAEConfig, aux_weight: float) -> float:
        """The gate's own reconstruction counts once (eq 8)."""
        return 1.0

    def forward(self, x: Tensor) -> SAEOutput:
        """Everything about activations ``x`` [.., D]; ``parts["gate"]`` holds the gate's pre-activations."""
        shared = (x - self.b_dec if self.subtract_b_dec else x) @ self.W_enc
        gate = shared + self.b_gate
        z = (gate > 0) * torch.relu(shared * self.r_mag.exp() + self.b_mag)
        return SAEOutput(self.decode(z), z, gate, {"gate": gate})

    def sparsity_loss(self, out: SAEOutput, objective: Objective) -> Tensor:
        """Mean over tokens of Σ relu(gate): the step passes no gradient, so sparsity pulls at the gate (eq 8)."""
        return terms.l1(torch.relu(at_least_float32(out.parts["gate"])))

    def auxiliary_loss(self, x: Tensor, out: SAEOutput, dead_F: Tensor | None, objective: Objective) -> Tensor | None:
        """Error of the reconstruction from relu(gate) through a frozen decoder, by which the gate learns (eq 8)."""
        frozen = torch.relu(out.parts["gate"]) @ self.W_dec.detach() + self.b_dec.detach()
        return terms.reconstruction(x, at_least_float32(frozen))

    def settings(self) -> dict[str, Any]:
        """See :class:`SparseAutoencoder`."""
        return {"subtract_b_dec": self.subtract_b_dec}
