"""Temporal Feature Analysis: what the past of a token predicts of its code, and what is new (arXiv 2511.01836).

With E = W_decᵀ unless untied, λ = 1 / (4 D) and x' = x − b_dec:

    c     = relu(λ x' E)                              the code that attention works on
    p_t   = relu(attention(c_t over 0, c_1 … c_{t−1}))   4 heads, causal; a token sees the codes before its own
    z_pred  = p · ⟨x', p W_dec⟩ / ‖p W_dec‖²           p scaled to explain as much of x' as it can
    z_novel = TopK(relu(λ (x' − z_pred W_dec) E))
    x̂     = (z_pred + z_novel) W_dec + b_dec

The tokens that count of one document in a row, in order, are what the publication calls a sequence.

Shapes: N rows, T positions, D model width, F features, H heads.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import UsageError
from ..config import SAEConfig, TrainConfig
from ..loss.objective import Objective
from ..loss.terms import at_least_float32
from .protocol import RowTokens, SAEOutput, SparseAutoencoder
from .registry import architecture

_TINY = 1e-6  # added to ‖p W_dec‖, as published


@architecture("tfa")
class TemporalFeatureAnalysis(SparseAutoencoder):
    """A predicted and a novel part.

    Args:
        d_model: width of the activations.
        n_features: size of the dictionary.
        k: active features of the novel part; None: those that are positive.
        heads: of the attention.
        bottleneck: keys and queries have ``n_features / bottleneck`` dimensions.
        tied: whether the encoder is the decoder's transpose.
        scale: λ; None: 1 / (4 · d_model).
        metadata: where it belongs; saved with it.

    Raises:
        UsageError: heads and bottleneck do not divide the features, or k is none of them.

    """

    sees = "row"
    summands = ("predicted", "novel")

    def __init__(
        self,
        d_model: int,
        n_features: int,
        *,
        k: int | None,
        heads: int = 4,
        bottleneck: int = 1,
        tied: bool = True,
        scale: float | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        super().__init__(d_model, n_features, metadata=metadata)
        if k is not None and not 1 <= k <= n_features:
            raise UsageError(f"a novel part of k = {k} active features does not fit {n_features} features")
        if n_features % (heads * bottleneck):
            parts = f"{heads} heads with a bottleneck of {bottleneck}"
            raise UsageError(f"{n_features} features cannot be shared by {parts}: give a --width that they divide")
        self.k, self.heads, self.bottleneck, self.tied = k, heads, bottleneck, tied
        self.scale = 1 / (4 * d_model) if scale is None else scale
        self.W_dec = nn.Parameter(torch.zeros(n_features, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.encoder = None if tied else nn.Parameter(torch.zeros(d_model, n_features))
        narrow = n_features // bottleneck
        self.keys, self.queries = nn.Linear(n_features, narrow), nn.Linear(n_features, narrow)
        self.values, self.output = nn.Linear(n_features, n_features), nn.Linear(n_features, n_features)

    @property
    def W_enc(self) -> Tensor:  # noqa: N802  # pyright: ignore[reportIncompatibleVariableOverride] - not always its own
        """[D, F]."""
        return self.W_dec.t() if self.encoder is None else self.encoder

    @classmethod
    def build(cls, config: SAEConfig, d_model: int) -> Self:
        """See :class:`SparseAutoencoder`."""
        shape = {"heads": config.heads, "bottleneck": config.bottleneck, "tied": config.tied}
        return cls(d_model, config.width, k=config.k if config.activation == "topk" else None, **shape)

    @torch.no_grad()
    def initialise(self, config: SAEConfig, seed: int, centre_D: Tensor | None = None) -> None:
        """As published: W_dec from N(0, 1); attention weights of random directions, their rows' norms fixed."""
        generator = torch.Generator().manual_seed(seed)
        self.W_dec.copy_(torch.randn(self.W_dec.shape, generator=generator))
        if self.encoder is not None:
            self.encoder.copy_(torch.randn(self.encoder.shape, generator=generator))
        narrow_head, head = self.keys.out_features // self.heads, self.n_features // self.heads
        norms = (
            (self.keys, narrow_head),
            (self.queries, narrow_head),
            (self.values, head),
            (self.output, self.n_features),
        )
        for layer, fan in norms:
            for parameter in (layer.weight, layer.bias):  # the directions of torch's own initialisation
                uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.copy_(uniform / math.sqrt(self.n_features))
            length = layer.weight.norm(dim=1, keepdim=True)
            layer.weight.div_((length + 1e-6) * math.sqrt(fan))
        if config.b_dec != "zero" and centre_D is not None:
            self.b_dec.copy_(centre_D)

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """See :class:`SparseAutoencoder`."""
        super().check(config)
        if config.sae.activation not in ("topk", "relu"):
            what = f"tfa was published with topk and with relu, not with activation '{config.sae.activation}'"
            raise UsageError(f"{what}: choose one of them")
        if config.sae.decoder != "free":
            raise UsageError("tfa's decoder rows are of any norm, which sae.decoder = 'unit' forbids: use --preset tfa")

    @classmethod
    def fixes_sparsity(cls, config: SAEConfig) -> bool:
        """Of the novel part, with topk."""
        return config.activation == "topk"

    @classmethod
    def default_l1(cls, config: SAEConfig) -> float:
        """γ of the publication, on ‖z_novel‖₂."""
        return 8.0

    @classmethod
    def auxiliary_weight(cls, config: SAEConfig, aux_weight: float) -> float:
        """There is no auxiliary term."""
        return 0.0

    @classmethod
    def step_bytes(cls, config: SAEConfig, d_model: int, n_tokens: int) -> int:
        """What autograd keeps (9 F per token), gradients on their way, and bfloat16 copies of the weights."""
        weights = 2 * config.width**2 * (1 + 1 / config.bottleneck)
        return n_tokens * 4 * (16 * config.width + 10 * d_model) + round(2 * weights)

    def forward(self, x: Tensor, rows: RowTokens | None = None) -> SAEOutput:
        """Everything about rows ``x`` [N, T, D]; without ``rows``, all of a row's tokens count and are one document.

        ``parts``: ``predicted`` and ``novel`` [N, T, F], which the features are the sum of.
        """
        rows = RowTokens.whole(x) if rows is None else rows
        centred = x.to(self.W_dec.dtype) - self.b_dec
        encoder = self.W_enc
        direction = torch.relu(self._attended(torch.relu(self.scale * centred @ encoder), rows))
        explained = at_least_float32(direction @ self.W_dec)
        length = explained.norm(dim=-1, keepdim=True) + _TINY
        times = (explained * centred).sum(-1, keepdim=True) / length.square()
        predicted = direction * times
        pre = self.scale * (centred - times * explained) @ encoder
        novel = torch.relu(pre)
        if self.k is not None:
            kept = torch.topk(novel, self.k, dim=-1, sorted=False)
            novel = torch.zeros_like(novel).scatter(-1, kept.indices, kept.values)
        z = predicted + novel
        return SAEOutput(self.decode(z), z, pre, {"predicted": predicted, "novel": novel}, novel)

    def _attended(self, codes_NTF: Tensor, rows: RowTokens) -> Tensor:
        """What attention makes of the codes before every token: [N, T, F]."""
        if rows.one_run_from is None:
            return self._attention(codes_NTF, _allowed(rows))
        # Causal attention needs no mask; what comes before the first token that counts in any row is cut off.
        start = rows.one_run_from
        run = self._attention(codes_NTF[:, start:], None)
        return functional.pad(run, (0, 0, start, 0)) if start else run

    def _attention(self, codes_NTF: Tensor, allowed_N1TT: Tensor | None) -> Tensor:
        # Place j holds the code of token j − 1; place 0 holds zeros, all that a first token sees.
        before_NTF = functional.pad(codes_NTF[:, :-1], (0, 0, 1, 0))
        sides = (self.queries(codes_NTF), self.keys(before_NTF), self.values(before_NTF))
        q, k, v = (side.unflatten(-1, (self.heads, -1)).transpose(1, 2) for side in sides)
        mixed = functional.scaled_dot_product_attention(q, k, v, allowed_N1TT, is_causal=allowed_N1TT is None)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def sparsity_loss(self, out: SAEOutput, objective: Objective) -> Tensor:
        """Mean over tokens of ‖z_novel‖₂."""
        return at_least_float32(out.parts["novel"]).norm(dim=-1).mean()

    def forward_flops(self, context: int) -> float:
        """See :class:`SparseAutoencoder`: encoder and decoder twice, four projections, scores and their mean."""
        projections = 2 * sum(layer.weight.numel() for layer in (self.keys, self.queries, self.values, self.output))
        mean_past = (context + 1) / 2
        attention = 2 * mean_past * (self.keys.out_features + self.n_features)
        return 2 * super().forward_flops(context) + projections + attention

    def settings(self) -> dict[str, Any]:
        """See :class:`SparseAutoencoder`."""
        shape = {"heads": self.heads, "bottleneck": self.bottleneck, "tied": self.tied}
        return {"k": self.k, "scale": self.scale} | shape

    @torch.no_grad()
    def rescaled(self, scale: float) -> Self:
        """See :class:`SparseAutoencoder`: with encoder and decoder over ``scale``, λ has to make up for both."""
        settings = self.settings() | {"scale": self.scale * scale**2}
        raw = self.from_settings(self.d_model, self.n_features, settings, self.metadata)
        raw.to(self.W_dec).train(self.training).load_state_dict(self.state_dict())
        for weight in (raw.W_dec, raw.b_dec, raw.encoder):
            if weight is not None:
                weight.div_(scale)
        return raw


def _allowed(rows: RowTokens) -> Tensor:
    """Bool [N, 1, T, T]: whether token t sees place j, which holds token j − 1: one that counts, of its document."""
    valid_NT, documents_NT = rows.valid_NT, rows.documents_NT
    n, t = valid_NT.shape
    same_NTT = valid_NT[:, None, :-1] & (documents_NT[:, :, None] == documents_NT[:, None, :-1])
    zeros_NT1 = torch.ones(n, t, 1, dtype=torch.bool, device=valid_NT.device)
    return (torch.cat([zeros_NT1, same_NTT], dim=2).tril()).unsqueeze(1)
