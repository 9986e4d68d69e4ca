"""How often, how many, how strongly: density of every feature, L0 and L1 of every token, and how long the weights are.

Shapes: F features, N tokens, E active entries, G jackknife groups. A feature is active where it is not zero; tokens
that do not count (special, padding, outliers) are neither counted nor looked at.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from ...train.sae.protocol import SparseCoder
from ..intervals.jackknife import GROUPS, group_of, jackknife
from ..protocol import Findings, State, SumsByUnit, TokenBatch, add_held, held, plain_metric
from ..results import JACKKNIFE, NO_INTERVAL, Curve, Definition, Metric
from .active_entries import ActiveEntries
from .registry import metric

_BINS_PER_OCTAVE = 4
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -32, 48  # L1 of a token outside 2^-32 … 2^48 is counted in the first or last bin

FEW_ALIVE = 0.05
"""Share of alive features below which the notes warn."""

_ADDED = ("_tokens_G", "_active_GF", "_sum_F", "_l0", "_l1")
_OF_WEIGHTS = f"{NO_INTERVAL} a property of the weights, whatever the text"
_HISTOGRAM = f"{NO_INTERVAL} a histogram is drawn as it was counted"

DEFINITIONS = {
    "alive": Definition(
        text="share of features active on at least one token",
        unit="share",
        better="higher",
        label="alive",
        group="features",
        interval=JACKKNIFE,
    ),
    "share_dense_1pct": Definition(
        text="share of features active on more than 1 % of tokens", unit="share", label="> 1 %", interval=JACKKNIFE
    ),
    "share_dense_10pct": Definition(
        text="share of features active on more than 10 % of tokens", unit="share", label="> 10 %", interval=JACKKNIFE
    ),
    "mean_activation": Definition(text="mean of z_i ‖W_dec,i‖ over all active entries", unit="activation units"),
    "max_activation": Definition(
        text="largest z_i ‖W_dec,i‖ of any feature on any token",
        unit="activation units",
        interval=f"{NO_INTERVAL} resampling never exceeds the maximum of what is resampled",
    ),
    "density": Definition(
        text="histogram over features of the share of tokens on which a feature is active; dead features are not in it",
        unit="share",
        interval=_HISTOGRAM,
    ),
    "l0_distribution": Definition(
        text="histogram over tokens of the number of active features", unit="features", interval=_HISTOGRAM
    ),
    "l1_distribution": Definition(
        text="histogram over tokens of Σ_i z_i ‖W_dec,i‖", unit="activation units", interval=_HISTOGRAM
    ),
    "decoder_norm": Definition(text="mean norm of the decoder rows", unit="1", interval=_OF_WEIGHTS),
    "encoder_norm": Definition(text="mean norm of the encoder columns", unit="1", interval=_OF_WEIGHTS),
    "decoder_bias_norm": Definition(text="norm of the decoder's bias", unit="activation units", interval=_OF_WEIGHTS),
}


@metric("features")
class FeatureStatistics:
    """Counts and sums per feature and histograms over tokens, in O(F) memory."""

    definitions = DEFINITIONS
    by_part = ("alive", "share_dense_1pct", "share_dense_10pct")

    def __init__(self, sae: SparseCoder, *, context: int, seed: int):  # noqa: ARG002 - every accumulator is made alike
        self._sae = sae
        size, device = sae.n_features, sae.W_dec.device
        self._norm_F = vector_norm(sae.W_dec.detach(), dim=1, dtype=torch.float64)
        self._tokens_G = torch.zeros(GROUPS, dtype=torch.float64, device=device)
        self._active_GF = torch.zeros(GROUPS, size, dtype=torch.float64, device=device)
        self._sum_F = torch.zeros(size, dtype=torch.float64, device=device)
        self._by_unit = SumsByUnit()
        self._max_F = torch.zeros(size, dtype=torch.float64, device=device)
        self._l0 = torch.zeros(size + 1, dtype=torch.float64, device=device)
        self._l1 = torch.zeros(
            (_HIGHEST_OCTAVE - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE, dtype=torch.float64, device=device
        )

    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:  # noqa: ARG002
        """Take one batch in."""
        group_N = group_of(batch.units_BT)
        self._tokens_G += torch.bincount(group_N[active.valid_N], minlength=GROUPS)
        self._active_GF += active.per_group(group_N, GROUPS)
        self._sum_F += active.per_feature(active.value_E)
        self._max_F.scatter_reduce_(0, active.feature_E, active.value_E, "amax")
        l0_N, l1_N = active.per_token(), active.per_token(active.value_E.abs() * self._norm_F[active.feature_E])
        self._l0 += torch.bincount(l0_N[active.valid_N].long(), minlength=len(self._l0))
        units_N = batch.units_BT.reshape(-1)[active.valid_N]
        self._by_unit.add(units_N, strength=l1_N[active.valid_N], entries=l0_N[active.valid_N])
        octave = l1_N[active.valid_N].clamp(min=2.0**_LOWEST_OCTAVE).log2() - _LOWEST_OCTAVE
        bins = (octave * _BINS_PER_OCTAVE).long().clamp(max=len(self._l1) - 1)
        self._l1 += torch.bincount(bins, minlength=len(self._l1))

    def state(self) -> State:
        """What it holds."""
        return held(self, (*_ADDED, "_max_F")) | {"by_unit": self._by_unit.state()}

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        add_held(self, later, _ADDED)
        self._max_F = torch.maximum(self._max_F, torch.from_numpy(later["_max_F"]).to(self._max_F.device))
        self._by_unit.merge(later["by_unit"])

    def result(self) -> Findings:
        """Shares with jackknife intervals, histograms, and the numbers of every feature."""
        active_F, tokens = self._active_GF.sum(0), float(self._tokens_G.sum())
        density_F = (active_F / tokens if tokens else active_F * torch.nan).cpu().numpy()
        mean_F = (self._sum_F / active_F).cpu().numpy()
        strength = replace(self._by_unit.ratio("strength", "entries", "activation units"), definition="mean_activation")
        shares, alive = self._shares(), float((active_F > 0).double().mean())
        few = f"only {alive:.1%} of the features are ever active: nearly the whole dictionary is dead"
        return Findings(
            sums={"mean_activation": strength},
            metrics=shares | self._sizes(),
            curves=self._curves(density_F),
            per_feature={
                "density": density_F,
                "mean_activation": mean_F,
                "max_activation": np.where(density_F > 0, self._max_F.cpu().numpy(), np.nan),
            },
            notes=[few] if tokens and alive < FEW_ALIVE else [],
        )

    def _shares(self) -> dict[str, Metric]:
        thresholds = {"alive": 0.0, "share_dense_1pct": 0.01, "share_dense_10pct": 0.1}
        size = self._active_GF.shape[1]
        found = {}
        for name, above in thresholds.items():
            metric = jackknife(
                lambda tokens, active_F, above=above: _share(active_F > above * tokens, tokens),
                *(self._tokens_G, self._active_GF),
                unit="share",
                definition=name,
                n=size,
            )
            found[name] = metric.within(0.0, 1.0)
        return found

    def _sizes(self) -> dict[str, Metric]:
        sae, entries = self._sae, int(self._active_GF.sum())
        largest = float((self._max_F * self._norm_F).max())
        width = self._sae.n_features
        encoder_F = vector_norm(sae.W_enc.detach(), dim=0, dtype=torch.float64)
        return {
            "max_activation": plain_metric(DEFINITIONS, "max_activation", largest if entries else None, entries),
            "decoder_norm": plain_metric(DEFINITIONS, "decoder_norm", float(self._norm_F.mean()), width),
            "encoder_norm": plain_metric(DEFINITIONS, "encoder_norm", float(encoder_F.mean()), width),
            "decoder_bias_norm": plain_metric(
                DEFINITIONS, "decoder_bias_norm", float(sae.b_dec.detach().double().norm()), 1
            ),
        }

    def _curves(self, density_F: np.ndarray) -> dict[str, Curve]:
        lowest = np.floor(np.log10(1 / max(float(self._tokens_G.sum()), 1.0)))
        edges = np.logspace(lowest, 0, int(-lowest) * 8 + 1)
        counts = np.histogram(density_F[density_F > 0], edges)[0]
        curves = {
            "density": Curve.histogram(
                edges,
                counts,
                x_label="share of tokens active on",
                y_label="features",
                definition="density",
                x_scale="log",
            )
        }
        l0 = self._l0.cpu().numpy()
        if l0.any():
            top = int(np.flatnonzero(l0)[-1]) + 1
            width = max(1, -(-top // 64))
            padded = np.pad(l0[:top], (0, -top % width)).reshape(-1, width).sum(1)
            edges = np.arange(len(padded) + 1) * width - 0.5
            curves["l0"] = Curve.histogram(
                edges, padded, x_label="active features", y_label="tokens", definition="l0_distribution"
            )
        l1 = self._l1.cpu().numpy()
        if l1.any():
            used = np.flatnonzero(l1)
            octaves = np.arange(used[0], used[-1] + 2) / _BINS_PER_OCTAVE + _LOWEST_OCTAVE
            counts = l1[used[0] : used[-1] + 1]
            curves["l1"] = Curve.histogram(
                2.0**octaves,
                counts,
                x_label="Σ z ‖W_dec‖",
                y_label="tokens",
                definition="l1_distribution",
                x_scale="log",
            )
        return curves


def _share(flags_F: Tensor, tokens: Tensor) -> float:
    return float(flags_F.double().mean()) if float(tokens) > 0 else float("nan")
