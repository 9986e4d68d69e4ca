"""The temporal crosscoder: one code for a whole window, decoded at every position of it (TempBench, OpenReview
JfN7nRdBxA).

z = TopK(Σ_p x_p W_enc[p] + b_enc), x̂_p = z W_dec[:, p] + b_dec[p]: an SAE on the window's activations side by side, and
its weights lie so here. Decoder rows keep norm 1 over positions and width together.

Shapes: N windows, W positions, D model width, F features, B rows, T positions of a row.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ..config import SAEConfig, TrainConfig
from ..loss import terms
from ..loss.objective import Objective
from ..loss.terms import at_least_float32
from .activation import Activation
from .protocol import RowTokens, SAEOutput, SparseAutoencoder, SparseCoder
from .registry import architecture
from .unit_rows import unit_rows


@architecture("txc")
class TemporalCrosscoder(SparseAutoencoder):
    """One code per window.

    Args:
        d_model: width of an activation.
        n_features: size of the dictionary.
        window: W.
        k: active features of a window's code.
        metadata: where it belongs; saved with it.

    Attributes:
        W_enc: [W · D, F]. W_dec: [F, W · D]. b_dec: [W · D]. Position by position.

    """

    sees = "window"

    def __init__(self, d_model: int, n_features: int, *, window: int, k: int, metadata: dict[str, Any] | None = None):
        super().__init__(d_model, n_features, metadata=metadata)
        if not 1 <= k <= n_features:
            raise UsageError(f"a crosscoder's code of k = {k} active features does not fit {n_features} features")
        self.window, self.k = window, k
        # What a plain SAE on whole windows would be, for its step by hand.
        self.activation, self.subtract_b_dec, self.threshold = Activation("topk", k=k), False, None
        # Feature-major in memory: the step by hand writes its gradient one feature at a time.
        self.W_enc = nn.Parameter(torch.zeros(n_features, window * d_model).t())
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(torch.zeros(n_features, window * d_model))
        self.b_dec = nn.Parameter(torch.zeros(window * d_model))

    @classmethod
    def build(cls, config: SAEConfig, d_model: int) -> Self:
        """See :class:`SparseAutoencoder`."""
        return cls(d_model, config.width, window=config.window, k=cls.active_features(config))

    @torch.no_grad()
    def initialise(self, config: SAEConfig, seed: int, centre_D: Tensor | None = None) -> None:
        """Random decoder rows of norm 1 over all positions, the encoder their transpose."""
        generator = torch.Generator().manual_seed(seed)
        self.W_dec.copy_(unit_rows(torch.randn(self.W_dec.shape, generator=generator)))
        self.W_enc.copy_(self.W_dec.T)
        if config.b_dec != "zero" and centre_D is not None:
            self.b_dec.copy_(centre_D.repeat(self.window))

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """See :class:`SparseAutoencoder`."""
        super().check(config)
        if config.sae.activation != "topk":
            raise UsageError(
                f"txc keeps the k largest of a window, activation '{config.sae.activation}' does not: use topk"
            )

    @classmethod
    def fixes_sparsity(cls, config: SAEConfig) -> bool:
        """L0 is k, or k · W."""
        return True

    @classmethod
    def active_features(cls, config: SAEConfig) -> int:
        """K · W by the convention of the publication, or k."""
        return config.k * (config.window if config.k_of == "token" else 1)

    @classmethod
    def step_bytes(cls, config: SAEConfig, d_model: int, n_tokens: int) -> int:
        """There is one code for W tokens."""
        return n_tokens * 4 * (4 * config.width // config.window + 4 * d_model)

    def forward(self, x: Tensor, rows: RowTokens | None = None) -> SAEOutput:
        """Everything about windows ``x`` [.., W, D]: reconstruction [.., W, D], features [.., F]."""
        pre = x.flatten(-2).to(self.W_enc.dtype) @ self.W_enc + self.b_enc
        kept = torch.topk(pre, self.k, dim=-1, sorted=False)
        z = torch.zeros_like(pre).scatter(-1, kept.indices, torch.relu(kept.values))
        return SAEOutput(self.decode(z), z, pre)

    def decode(self, z: Tensor) -> Tensor:
        """Codes [.., F] → reconstruction [.., W, D]."""
        return (z @ self.W_dec + self.b_dec).unflatten(-1, (self.window, self.d_model))

    def auxiliary_loss(self, x: Tensor, out: SAEOutput, dead_F: Tensor | None, objective: Objective) -> Tensor | None:
        """AuxK on whole windows; a mean over tokens."""
        if dead_F is None or not bool(dead_F.any()):
            return None
        residual_NX = (x - at_least_float32(out.reconstruction)).detach().flatten(-2)
        pre_NF = at_least_float32(out.pre_activations)
        loss = terms.aux_k(residual_NX, pre_NF, self.W_dec, dead_F, objective.aux_k)
        return loss / (terms.variance(residual_NX) if objective.aux_normalised else self.window)

    def token_coder(self) -> SparseCoder:
        """The code of the window that ends at a token, and the reconstruction of its last position."""
        return LastPosition(self)

    def settings(self) -> dict[str, Any]:
        """See :class:`SparseAutoencoder`."""
        return {"window": self.window, "k": self.k}


class LastPosition:
    """A crosscoder as a coder of single tokens: the window that ends at the token, decoded at its last position.

    Where less than a window of usable tokens of the document leads up to the token, the missing positions are filled
    with the decoder's bias there, which is the mean at initialisation; ``incomplete`` counts them.
    """

    def __init__(self, crosscoder: TemporalCrosscoder):
        self.crosscoder = crosscoder
        self.d_model, self.n_features = crosscoder.d_model, crosscoder.n_features
        last = slice(-crosscoder.d_model, None)
        self.sees: Literal["token", "window", "row"] = "window"
        self.summands: tuple[str, ...] = ()
        self.W_enc, self.W_dec = crosscoder.W_enc[last], crosscoder.W_dec[:, last]
        self.b_dec = crosscoder.b_dec[last]

    def decode(self, z: Tensor) -> Tensor:
        """Codes [.., F] → reconstruction of the last position [.., D]."""
        return z @ self.W_dec + self.b_dec

    def on_rows(self, x_BTD: Tensor, rows: RowTokens) -> SAEOutput:
        """See :class:`~tcsae.train.sae.protocol.SparseCoder`.

        ``parts``: ``windows`` and ``inputs`` [B, T, W, D], the reconstruction of all positions and what it is of;
        ``complete`` [B, T], whether the window is.
        """
        w, (b, t) = self.crosscoder.window, x_BTD.shape[:2]
        filled_WD = self.crosscoder.b_dec.unflatten(0, (w, -1))
        windows_BTWD = x_BTD.new_empty(b, t, w, self.d_model)
        there_BT = torch.ones(b, t, dtype=torch.bool, device=x_BTD.device)  # all positions up to here are
        windows_BTWD[:, :, -1] = x_BTD
        for back in range(1, w):
            follows_BT = torch.zeros_like(there_BT)
            same_BT = rows.documents_NT[:, back:] == rows.documents_NT[:, : t - back]
            follows_BT[:, back:] = there_BT[:, back:] & rows.valid_NT[:, : t - back] & same_BT
            there_BT = follows_BT
            earlier_BTD = x_BTD.roll(back, dims=1)
            windows_BTWD[:, :, -1 - back] = torch.where(there_BT[..., None], earlier_BTD, filled_WD[-1 - back])
        out = self.crosscoder(windows_BTWD)
        parts = {"windows": out.reconstruction, "inputs": windows_BTWD, "complete": there_BT}
        return SAEOutput(out.reconstruction[:, :, -1], out.features, out.pre_activations, parts)
