"""How much of the model survives a splice, and how well activations are reconstructed: token sums, divided once.

Cross-entropy and KL(original ‖ spliced) come from fp32 logits, some tokens at a time: their clean logits are computed
once and compared with every splice, and the memory is bounded whatever the vocabulary and the batch. A
position counts when neither it nor its target is special or padding and both belong to one document.

Shapes: B rows, T positions, D model width, F features, V vocabulary, N counted positions, U units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..model.splice import Head
from ..protocol import State, SumsByUnit, TokenBatch, UnitSums
from ..results import OUTLIERS, Definition

LOGIT_BYTES = 1 << 30  # for the four [tokens, V] fp32 tensors together
CPU_TOKENS = 128  # at a time on a CPU: enough for its products, and their logits are still near when they are read
CACHED_LOGITS = 1 << 18  # 1 MB in fp32
OF_THE_SPLICE = ("ce", "ce_clean", "kl")
SPARSITY = ("l0", "l1")
"""What is measured even where fidelity is not asked for."""

DEFINITIONS = {
    "ce": Definition(
        text="next-token cross-entropy with the splice, per token",
        unit="nats",
        better="lower",
        label="CE",
        group="fidelity",
    ),
    "ce_clean": Definition(
        text="next-token cross-entropy of the untouched model, per token", unit="nats", label="CE clean"
    ),
    "kl": Definition(
        text="KL(p_original ‖ p_spliced) of the next-token distribution, per token",
        unit="nats",
        better="lower",
        label="KL",
        group="fidelity",
    ),
    "kl_noise_floor": Definition(
        text="the KL that rounding the activations to bfloat16 causes by itself", unit="nats", label="KL floor"
    ),
    "ce_score_mean": Definition(
        text="(CE_mean − CE) / (CE_mean − CE_clean): share of that loss recovered",
        unit="1",
        better="higher",
        label="CE rec.",
        group="fidelity",
    ),
    "ce_score_zero": Definition(
        text="(CE_zero − CE) / (CE_zero − CE_clean), special positions kept",
        unit="1",
        better="higher",
        label="CE rec. (zero)",
    ),
    "kl_score_mean": Definition(
        text="(KL_mean − KL) / KL_mean", unit="1", better="higher", label="KL rec.", group="fidelity"
    ),
    "kl_score_zero": Definition(
        text="(KL_zero − KL) / KL_zero, special positions kept", unit="1", better="higher", label="KL rec. (zero)"
    ),
    "explained_variance": Definition(
        text="1 − E‖x − x̂‖² / E‖x − μ‖², μ the mean over all tokens evaluated",
        unit="1",
        better="higher",
        label="EV",
        group="fidelity",
    ),
    "mse_per_token": Definition(text="E Σ_d (x − x̂)²", unit="activation units²", better="lower", label="MSE/token"),
    "mse_per_element": Definition(
        text="E (x − x̂)², averaged over tokens and dimensions",
        unit="activation units²",
        better="lower",
        label="MSE/element",
    ),
    "cosine": Definition(
        text="E cos(x, x̂), over the tokens where x̂ is not zero",
        unit="1",
        better="higher",
        label="cos(x, x̂)",
        group="fidelity",
    ),
    "l0": Definition(text="E of the number of active features", unit="features", label="L0", group="sparsity"),
    "l1": Definition(
        text="E Σ_i z_i ‖W_dec,i‖, which no rescaling of features changes", unit="activation units", label="L1"
    ),
    "norm_ratio": Definition(text="E ‖x̂‖ / ‖x‖", unit="1", label="‖x̂‖/‖x‖", group="fidelity"),
    "relative_reconstruction_bias": Definition(
        text="E‖x̂‖² / E⟨x̂, x⟩: below 1 the reconstruction is shrunken", unit="1", label="bias"
    ),
}
"""Every metric of this file; :func:`definitions` has those without outliers too."""


def definitions() -> dict[str, Definition]:
    """Every metric of this file by name; the variants without outliers repeat the text and say what is left out."""
    tail = "; without tokens whose norm exceeds 10 × the median at this layer"
    return DEFINITIONS | {
        key + OUTLIERS: one.model_copy(update={"text": one.text + tail, "label": one.label + "*", "group": ""})
        for key, one in DEFINITIONS.items()
    }


def predictions(tokens_BT: Tensor, documents_BT: Tensor, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions predict something that counts [B, T] (never the last one), and their targets [B, T]."""
    counts_BT = torch.zeros_like(real_BT)
    counts_BT[:, :-1] = real_BT[:, :-1] & real_BT[:, 1:] & (documents_BT[:, :-1] == documents_BT[:, 1:])
    return counts_BT, tokens_BT.roll(-1, dims=1)


class LogitBuffers:
    """The four [tokens, V] tensors of :func:`token_losses`, kept from batch to batch to save allocations."""

    def __init__(self, limit_bytes: int = LOGIT_BYTES):
        self._limit = limit_bytes
        self._buffers: Tensor | None = None

    def of(self, n: int, V: int, device: torch.device) -> Tensor:
        """[4, tokens, V] in fp32 with as many tokens as the limit, the device and ``n`` allow, one at least."""
        tokens = max(1, min(n, self._limit // (16 * V), CPU_TOKENS if device.type == "cpu" else n))
        if self._buffers is None or self._buffers.shape[1] < tokens or self._buffers.device != device:
            self._buffers = torch.empty(4, tokens, V, dtype=torch.float32, device=device)
        return self._buffers


@torch.no_grad()
def token_losses(
    head: Head,
    clean_ND: Tensor,
    spliced: Sequence[Tensor | None],
    targets_N: Tensor,
    buffers: LogitBuffers | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Cross-entropy of the clean states, and (cross-entropy, KL) of every spliced one, per token in nats.

    KL = Σ p_a (log p_a − log p_b) for clean logits a and spliced b: exactly 0 where they are equal. None among the
    spliced stands for logits that are all zero: no product with the head is computed.
    """
    n = len(clean_ND)
    four = (buffers or LogitBuffers()).of(n, head.vocab_size, clean_ND.device)
    step = four.shape[1]
    ce_N = torch.empty(n, device=clean_ND.device)
    losses = [(torch.empty_like(ce_N), torch.empty_like(ce_N)) for _ in spliced]
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        log_a, p, log_b, gap = four[:, : part.stop - start].unbind(0)
        _log_softmax(head(clean_ND[part]), log_a)
        torch.exp(log_a, out=p)
        ce_N[part] = -_at(log_a, targets_N[part])
        for final_ND, (ces_N, kls_N) in zip(spliced, losses, strict=True):
            if final_ND is None:
                log_b.fill_(-math.log(head.vocab_size))
            else:
                _log_softmax(head(final_ND[part]), log_b)
            ces_N[part] = -_at(log_b, targets_N[part])
            kls_N[part] = _weighted_gap(log_a, log_b, p, gap)
    return ce_N, losses


def _log_softmax(logits: Tensor, out: Tensor) -> None:
    torch.ops.aten._log_softmax.out(logits, -1, False, out=out)


def _weighted_gap(log_a: Tensor, log_b: Tensor, p: Tensor, gap: Tensor) -> Tensor:
    """Σ p (log a − log b) [N]; on a CPU, as many rows at a time as its caches hold, each fetched from memory once."""
    n_rows = max(1, CACHED_LOGITS // p.shape[-1]) if p.device.type == "cpu" else max(1, len(p))
    parts = zip(*(each.split(n_rows) for each in (log_a, log_b, p, gap)), strict=True)
    return torch.cat([torch.sub(a, b, out=gap).mul_(p).sum(-1) for a, b, p, gap in parts])


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[:, None]).squeeze(-1)


class Fidelity:
    """The sums of one record: losses of the splice, errors of the reconstruction, L0 and L1; with and without outliers.

    Args:
        center_D: a mean of the activations close to that of the text evaluated; sums of squares are taken about it,
            exactly.
        decoder_norms_F: for L1; None for a reference without features.

    """

    def __init__(self, center_D: Tensor, decoder_norms_F: Tensor | None):
        self.center_D, self.decoder_norms_F = center_D, decoder_norms_F
        self.by_unit = SumsByUnit()
        self._shift_D = {suffix: torch.zeros_like(center_D, dtype=torch.float64) for suffix in ("", OUTLIERS)}

    def add_losses(self, units_N: Tensor, inlier_N: Tensor, ce_clean_N: Tensor, ce_N: Tensor, kl_N: Tensor) -> None:
        """Losses of the counted positions."""
        values = {"ce_clean": ce_clean_N, "ce": ce_N, "kl": kl_N, "predictions": torch.ones_like(ce_N)}
        self._add(units_N, inlier_N, values)

    @torch.no_grad()
    def add_reconstruction(self, batch: TokenBatch, x_hat_BTD: Tensor, z_BTF: Tensor | None) -> None:
        """Errors at every position that is neither special nor padding."""
        real = batch.real_BT
        x_ND, x_hat_ND = batch.x_BTD[real], x_hat_BTD[real]
        norm_N, norm_hat_N, dot_N = x_ND.norm(dim=-1), x_hat_ND.norm(dim=-1), (x_ND * x_hat_ND).sum(-1)
        has_cosine_N = (norm_N > 0) & (norm_hat_N > 0)
        cosine_N = torch.where(has_cosine_N, dot_N / (norm_N * norm_hat_N).clamp_min(1e-30), 0)
        centred_ND = (x_ND - self.center_D).double()
        values = {
            "tokens": torch.ones_like(norm_N),
            "squared_error": (x_ND - x_hat_ND).square().sum(-1),
            "spread": centred_ND.square().sum(-1),
            "cosine": cosine_N,
            "cosines": has_cosine_N,
            "ratio": torch.where(norm_N > 0, norm_hat_N / norm_N.clamp_min(1e-30), 0),
            "ratios": norm_N > 0,
            "square_hat": norm_hat_N.square(),
            "dot": dot_N,
        }
        if z_BTF is not None and self.decoder_norms_F is not None:
            z_NF = z_BTF[real]
            # TFA's predicted codes are negative where they point away from the token.
            values |= {"l0": (z_NF != 0).sum(-1), "l1": z_NF.abs() @ self.decoder_norms_F}
        inlier_N = batch.valid_BT[real]
        self._add(batch.units_BT[real], inlier_N, values)
        for suffix, rows in (("", centred_ND), (OUTLIERS, centred_ND[inlier_N])):
            self._shift_D[suffix] += rows.sum(0)

    def _add(self, units_N: Tensor, inlier_N: Tensor, values: Mapping[str, Tensor]) -> None:
        self.by_unit.add(units_N, **values)
        self.by_unit.add(units_N[inlier_N], **{name + OUTLIERS: value[inlier_N] for name, value in values.items()})

    def state(self) -> State:
        """What it holds."""
        shift = {suffix: shift_D.cpu().numpy() for suffix, shift_D in self._shift_D.items()}
        return {"by_unit": self.by_unit.state(), "shift": shift}

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        self.by_unit.merge(later["by_unit"])
        for suffix, shift_D in self._shift_D.items():
            shift_D += torch.from_numpy(later["shift"][suffix]).to(shift_D.device)

    def sums(self, *, spliced: bool = True) -> dict[str, UnitSums]:
        """Everything that needs no other record, with and without outliers; CE and KL only where there is a splice."""
        left_out = () if spliced else OF_THE_SPLICE
        return {
            name + suffix: one
            for suffix in ("", OUTLIERS)
            for name, one in self._sums(suffix).items()
            if name not in left_out
        }

    def _sums(self, suffix: str) -> dict[str, UnitSums]:
        tokens_U = self.by_unit["tokens" + suffix]
        tokens = round(float(tokens_U.sum()))
        ratios = {
            "ce": ("ce", "predictions"),
            "ce_clean": ("ce_clean", "predictions"),
            "kl": ("kl", "predictions"),
            "mse_per_token": ("squared_error", "tokens"),
            "mse_per_element": ("squared_error", "tokens"),
            "explained_variance": ("squared_error", "spread"),
            "cosine": ("cosine", "cosines"),
            "norm_ratio": ("ratio", "ratios"),
            "relative_reconstruction_bias": ("square_hat", "dot"),
            "l0": ("l0", "tokens"),
            "l1": ("l1", "tokens"),
        }
        sums = {
            name: UnitSums(
                self.by_unit[above + suffix], self.by_unit[below + suffix], DEFINITIONS[name].unit, name + suffix
            )
            for name, (above, below) in ratios.items()
        }
        sums["mse_per_element"] = replace(sums["mse_per_element"], scale=1 / len(self.center_D))
        sums["relative_reconstruction_bias"] = replace(sums["relative_reconstruction_bias"], n=tokens)
        # Σ‖x − μ‖² = Σ‖x − c‖² − n‖μ − c‖²: the shift from the centre to the text's own mean, shared out by tokens.
        shift = float((self._shift_D[suffix] / max(1, tokens)).square().sum())
        spread_U = self.by_unit["spread" + suffix] - tokens_U * shift
        sums["explained_variance"] = replace(
            sums["explained_variance"], denominator_U=spread_U, offset=1.0, scale=-1.0, n=tokens
        )
        if self.decoder_norms_F is None:
            nothing = np.zeros(0)
            sums |= {name: replace(sums[name], numerator_U=nothing, denominator_U=nothing) for name in ("l0", "l1")}
        return sums
