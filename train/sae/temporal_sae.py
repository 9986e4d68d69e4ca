"""The sparse autoencoder: an encoder, a decoder, an activation (TC-SAE paper, eq 4 and 5).

Shapes: D = d_model, F = n_features, any leading dimensions.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ...errors import RunError
from ..config import SAEConfig
from ..loss.objective import Objective
from ..loss.terms import at_least_float32
from .activation import Activation, step_function
from .initialise import kaiming_uniform, orthogonal
from .protocol import SAEOutput, SparseAutoencoder
from .registry import ACTIVATIONS, architecture
from .unit_rows import unit_rows

_THRESHOLD_MOMENTUM = {"calibrated": 0.99, "running": 0.999}  # the latter as published; the former is set anew at last


@architecture("sae")
class TemporalSAE(SparseAutoencoder):
    """A sparse autoencoder. New ones are all zero; :meth:`initialise` fills them.

    Args:
        d_model: width of the activations.
        n_features: size of the dictionary.
        activation: see :class:`~tcsae.train.sae.activation.Activation`.
        subtract_b_dec: whether the encoder sees x − b_dec (as in eq 4) or x (as in Gemma Scope).
        metadata: where the SAE belongs (model_name, hook_name, layer …); saved with it.

    Attributes:
        threshold: jumprelu: the learned thresholds [n_features]; batchtopk: the running threshold [] used outside
            training mode (−1 until one was measured); otherwise None.

    """

    threshold: Tensor | None

    def __init__(
        self,
        d_model: int,
        n_features: int,
        activation: Activation = Activation(),  # noqa: B008 - frozen
        *,
        subtract_b_dec: bool = True,
        metadata: dict[str, Any] | None = None,
    ):
        super().__init__(d_model, n_features, metadata=metadata)
        self.activation, self.subtract_b_dec = activation, subtract_b_dec
        self.threshold_momentum = _THRESHOLD_MOMENTUM["calibrated"]
        # Feature-major in memory: the step by hand writes its gradient one feature at a time.
        self.W_enc = nn.Parameter(torch.zeros(n_features, d_model).t())
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(torch.zeros(n_features, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        kind = activation.function.threshold
        if kind == "per_feature":
            self.threshold = nn.Parameter(torch.zeros(n_features))
        else:
            self.register_buffer("threshold", torch.tensor(-1.0) if kind == "running" else None)

    @property
    def label(self) -> str:
        """See :class:`SparseAutoencoder`."""
        return self.activation.kind if type(self) is TemporalSAE else self.architecture

    @classmethod
    def build(cls, config: SAEConfig, d_model: int) -> Self:
        """See :class:`SparseAutoencoder`."""
        sae = cls(d_model, config.width, activation_of(config))
        sae.threshold_momentum = _THRESHOLD_MOMENTUM[config.threshold_rule]
        return sae

    @torch.no_grad()
    def initialise(self, config: SAEConfig, seed: int, centre_D: Tensor | None = None) -> None:
        """Fill the weights: ``tied`` (random unit decoder rows, the encoder their transpose) or ``paper``."""
        # Drawn on the CPU, so that every device starts from the same numbers.
        generator = torch.Generator().manual_seed(seed)
        d, f = self.d_model, self.n_features
        if config.initial == "paper":
            self.W_enc.copy_(kaiming_uniform(d, f, generator))
            decoder = orthogonal(f, d, generator)
            self.W_dec.copy_(unit_rows(decoder) if config.decoder == "unit" else decoder)
        else:
            self.W_dec.copy_(unit_rows(torch.randn(f, d, generator=generator)))
            self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.zero_()
        if config.b_dec != "zero" and centre_D is not None:
            self.b_dec.copy_(centre_D)
        if isinstance(self.threshold, nn.Parameter):
            self.threshold.fill_(config.threshold)

    @classmethod
    def fixes_sparsity(cls, config: SAEConfig) -> bool:
        """See :class:`SparseAutoencoder`."""
        return activation_of(config).function.fixes_k

    @classmethod
    def default_l1(cls, config: SAEConfig) -> float:
        """See :class:`SparseAutoencoder`."""
        return activation_of(config).function.default_l1

    def pre_activations(self, x: Tensor) -> Tensor:
        """[.., D] → [.., F], before the activation.

        Raises:
            RunError: the last dimension of ``x`` is not ``d_model``.

        """
        if x.shape[-1] != self.d_model:
            widths = f"the activations are {x.shape[-1]} wide, the SAE expects {self.d_model}"
            raise RunError(f"{widths}: use the layer and model it was trained on")
        x = x.to(self.W_enc.dtype)
        return (x - self.b_dec if self.subtract_b_dec else x) @ self.W_enc + self.b_enc

    def activate(self, pre: Tensor) -> Tensor:
        """Pre-activations [.., F] → codes [.., F]. Batchtopk competes over the whole batch in training mode only."""
        return self.activation.function.codes(pre, self)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations [.., D] → pre-activations and codes [.., F] (eq 4).

        A subclass with another encoder overrides this.
        """
        pre = self.pre_activations(x)
        return pre, self.activate(pre)

    def encode(self, x: Tensor) -> Tensor:
        """Activations [.., D] → codes [.., F]."""
        return self.codes(x)[1]

    def forward(self, x: Tensor) -> SAEOutput:
        """Everything about activations ``x`` [.., D]."""
        pre, z = self.codes(x)
        return SAEOutput(self.decode(z), z, pre)

    def sparsity_loss(self, out: SAEOutput, objective: Objective) -> Tensor:
        """Σ z of relu (also reported, without weight, where k is fixed), L0 of jumprelu or its distance from an aim."""
        if objective.l0_aim and self.threshold is not None:
            pre = at_least_float32(out.pre_activations)
            l0 = step_function(pre, self.threshold, self.activation.bandwidth).sum(-1)
            return (2 / objective.l0_aim * (l0 - objective.l0_aim).square()).mean()
        own = self.activation.function.sparsity(
            at_least_float32(out.pre_activations), at_least_float32(out.features), self
        )
        return super().sparsity_loss(out, objective) if own is None else own

    def after_backward(self, out: SAEOutput) -> None:
        """Follow the running threshold, where there is one."""
        if self.activation.function.threshold == "running":
            self.track_threshold(at_least_float32(out.features.detach()))

    @torch.no_grad()
    def track_threshold(self, z: Tensor) -> None:
        """Follow the smallest code that passed: the threshold outside training (arXiv 2412.06410, eq 5)."""
        assert self.threshold is not None  # noqa: S101 - for the type checker
        passed = z[z > 0]
        if passed.numel() == 0:
            return
        smallest = passed.min()
        fresh = self.threshold < 0
        follow = self.threshold_momentum * self.threshold + (1 - self.threshold_momentum) * smallest
        self.threshold.copy_(torch.where(fresh, smallest, follow))

    @property
    def running_threshold(self) -> Tensor | None:
        """See :class:`SparseAutoencoder`; of batchtopk."""
        return self.threshold if self.activation.function.threshold == "running" else None

    def fast_parameters(self) -> list[nn.Parameter]:
        """The learned thresholds, which are of the size of pre-activations."""
        return [self.threshold] if isinstance(self.threshold, nn.Parameter) else []

    def settings(self) -> dict[str, Any]:
        """See :class:`SparseAutoencoder`."""
        chosen = self.activation
        kept = {"activation": chosen.kind, "k": chosen.k, "bandwidth": chosen.bandwidth}
        return kept | {"subtract_b_dec": self.subtract_b_dec}

    @classmethod
    def from_settings(cls, d_model: int, n_features: int, settings: dict[str, Any], metadata: dict[str, Any]) -> Self:
        """See :class:`SparseAutoencoder`."""
        chosen = Activation(settings["activation"], k=settings["k"], bandwidth=settings["bandwidth"])
        return cls(d_model, n_features, chosen, subtract_b_dec=settings["subtract_b_dec"], metadata=metadata)


def activation_of(config: SAEConfig) -> Activation:
    """The activation of a configuration."""
    kind = ACTIVATIONS.get(config.activation)
    return Activation(config.activation, k=config.k if kind.fixes_k else None, bandwidth=config.bandwidth)
