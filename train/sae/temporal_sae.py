"""The sparse autoencoder: four weights, an activation, and nothing else.

    z = act((x − b_dec) W_enc + b_enc)        eq 4 of the TC-SAE paper
    x̂ = z W_dec + b_dec                       eq 5

Shapes: D model width, F features; any leading dimensions. An SAE works in the units of its weights: the trainer feeds
scaled inputs, and :meth:`TemporalSAE.rescaled` folds the scale into the weights before they are saved, so that whatever
:meth:`TemporalSAE.load` returns takes and gives raw activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RunError
from ..formats.locate import read_sae
from ..formats.registry import FORMATS
from .activation import Activation, batch_top_k, jump_relu, top_k


@dataclass(frozen=True)
class SAEOutput:
    """What an SAE says of activations ``x`` [.., D]: its reconstruction, its codes and the codes before
    the activation.
    """

    reconstruction: Tensor  # [.., D], in the units of x
    features: Tensor  # [.., F], ≥ 0
    pre_activations: Tensor  # [.., F]


class TemporalSAE(nn.Module):
    """A sparse autoencoder. New ones are all zero; ``train.initial`` fills them.

    Args:
        d_model: width of the activations.
        n_features: size of the dictionary.
        activation: see :class:`~tcsae.train.sae.activation.Activation`.
        subtract_b_dec: whether the encoder sees x − b_dec (as in eq 4) or x (as in Gemma Scope).
        metadata: where the SAE belongs (model_name, hook_name, layer …); saved with it.

    Attributes:
        W_enc: [d_model, n_features]. W_dec: [n_features, d_model]. b_enc: [n_features]. b_dec: [d_model].
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
        super().__init__()
        self.d_model, self.n_features = d_model, n_features
        self.activation, self.subtract_b_dec = activation, subtract_b_dec
        self.metadata = dict(metadata or {})
        # Feature-major in memory: the sparse step writes its gradient one feature at a time.
        self.W_enc = nn.Parameter(torch.zeros(n_features, d_model).t())
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(torch.zeros(n_features, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        if activation.kind == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(n_features))
        else:
            self.register_buffer("threshold", torch.tensor(-1.0) if activation.kind == "batchtopk" else None)

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
        kind = self.activation.kind
        if kind == "relu":
            return torch.relu(pre)
        if kind == "topk":
            return top_k(pre, self.activation.k or 0)
        assert self.threshold is not None  # noqa: S101 - for the type checker: these two kinds always have one
        if kind == "jumprelu":
            return jump_relu(pre, self.threshold, self.activation.bandwidth)
        if self.training or self.threshold < 0:
            return batch_top_k(pre, self.activation.k or 0)
        return torch.relu(pre) * (pre > self.threshold)

    def encode(self, x: Tensor) -> Tensor:
        """Activations [.., D] → codes [.., F] (eq 4)."""
        return self.activate(self.pre_activations(x))

    def decode(self, z: Tensor) -> Tensor:
        """Codes [.., F] → reconstruction [.., D] (eq 5)."""
        return z @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> SAEOutput:
        """Everything about activations ``x`` [.., D]."""
        pre = self.pre_activations(x)
        z = self.activate(pre)
        return SAEOutput(self.decode(z), z, pre)

    @torch.no_grad()
    def rescaled(self, scale: float) -> TemporalSAE:
        """The same SAE for raw activations, where this one takes ``scale`` times them: equal codes, reconstructions /
        scale.
        """
        raw = TemporalSAE(
            self.d_model, self.n_features, self.activation, subtract_b_dec=self.subtract_b_dec, metadata=self.metadata
        )
        raw.to(self.W_enc).train(self.training).load_state_dict(self.state_dict())
        raw.W_enc.mul_(scale)
        raw.W_dec.div_(scale)
        raw.b_dec.div_(scale)
        return raw

    def save(self, path: str | Path) -> None:
        """Write a folder that SAELens opens as it is (``cfg.json``, ``sae_weights.safetensors``).

        Raises:
            RunError, ResourceError: the folder cannot be written, or a batchtopk threshold was never measured.

        """
        FORMATS.get("saelens").write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> TemporalSAE:
        """Read an SAE of any registered format, by path or hub id, in evaluation mode, on the CPU, for raw activations.

        Raises:
            RunError: there is none, it is damaged, or it is of a kind that this class cannot express.

        """
        _, sae = read_sae(path)
        if not isinstance(sae, cls):
            raise RunError(f"{path} holds a {type(sae).__name__}, which is no {cls.__name__}: evaluate it with --sae")
        return sae
