"""Position: how much of a feature depends on where in the row a token stands.

Shapes: F features, T positions, N tokens. Position 0 never enters (it holds BOS, or sees nothing before it). Memory
O(F·T): two sums per feature, position and jackknife group (four of them), and the bounded sample of :mod:`rotation`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...train.sae.protocol import SparseCoder
from ..intervals.jackknife import group_of, jackknife_band, jackknife_over_features
from ..protocol import Findings, State, TokenBatch, add_held, held, plain_metric
from ..results import JACKKNIFE, NO_INTERVAL, Curve, Definition, Metric
from .active_entries import ActiveEntries
from .registry import metric
from .rotation_test import ROTATIONS, RotationSample, false_discovery_rate

FALSE_DISCOVERY_RATE = 0.05
LOCKED = 0.5
"""η² from which a significant feature counts as locked to the position: most of its variance is the position's."""
_GROUPS = 4  # of the jackknife: each holds all sums once
_EXACT_UP_TO = 2000  # active tokens up to which the bias of the mutual information is computed exactly

_ADDED = ("_sum_GFT", "_active_GFT", "_square_GF", "_tokens_GT")
_TEST = (
    f"{NO_INTERVAL} it counts outcomes of a test whose power grows with the text: leaving text out moves the count "
    "itself"
)

DEFINITIONS = {
    "eta_squared": Definition(
        text="share of a feature's variance between positions, (SS_between − (P − 1) MS_within) / SS_total: η² "
        "corrected for bias (ε²); positions 1 … T − 1, mean over features that vary.",
        unit="share",
        label="position η²",
        group="position",
        interval=JACKKNIFE,
    ),
    "position_specific_share": Definition(
        text=f"share of the tested features whose η² exceeds what {ROTATIONS} rotations of positions 1 … T − 1 within "
        f"each row give, at a false-discovery rate of {FALSE_DISCOVERY_RATE:.0%} (Benjamini–Hochberg); features "
        "active in fewer than 10 rows or 20 tokens are not tested",
        unit="share",
        better="lower",
        label="position-specific",
        group="position",
        interval=_TEST,
    ),
    "position_locked_share": Definition(
        text=f"share of the tested features that are position-specific and have an η² of at least {LOCKED}",
        unit="share",
        better="lower",
        label="position-locked",
        interval=_TEST,
    ),
    "position_tested_share": Definition(
        text="share of alive features active enough for the rotation test", unit="share", interval=_TEST
    ),
    "position_mutual_information": Definition(
        text="mutual information between firing and position, less its expectation if as many firings fell at random; "
        "mean over alive features",
        unit="nats",
        interval=JACKKNIFE,
        label="firing–position information",
    ),
    "position_profile": Definition(
        text="E[z_i | position] / E[z_i], mean over alive features; 1 everywhere without position dependence",
        unit="1",
        interval=JACKKNIFE,
    ),
    "eta_squared_distribution": Definition(
        text="histogram over alive features of η² (bias-corrected)",
        unit="share",
        interval=f"{NO_INTERVAL} a histogram is drawn as it was counted",
    ),
}


@metric("position")
class PositionStatistics:
    """Sums per feature and position, and the rotation test."""

    definitions = DEFINITIONS
    by_part = ("eta_squared", "position_mutual_information", "position_specific_share", "position_locked_share")

    def __init__(self, sae: SparseCoder, *, context: int, seed: int):
        device, size = sae.W_dec.device, sae.n_features
        self._sum_GFT = torch.zeros(_GROUPS, size, context, dtype=torch.float64, device=device)
        self._active_GFT = torch.zeros(_GROUPS, size, context, dtype=torch.float64, device=device)
        self._square_GF = torch.zeros(_GROUPS, size, dtype=torch.float64, device=device)
        self._tokens_GT = torch.zeros(_GROUPS, context, dtype=torch.float64, device=device)
        self._rotation = RotationSample(size, context, seed)

    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:  # noqa: ARG002
        """Take one batch in."""
        group_N, position_E = group_of(batch.units_BT) % _GROUPS, active.positions()
        position_N = torch.arange(active.n_tokens, device=group_N.device) % active.context
        place_N = (group_N * active.context + position_N)[active.valid_N]
        self._tokens_GT += torch.bincount(place_N, minlength=self._tokens_GT.numel()).view_as(self._tokens_GT)
        feature_E = group_N[active.token_E] * active.n_features + active.feature_E
        place_E = feature_E * active.context + position_E
        self._sum_GFT.view(-1).index_add_(0, place_E, active.value_E)
        self._active_GFT.view(-1).index_add_(0, place_E, torch.ones_like(active.value_E))
        self._square_GF.view(-1).index_add_(0, feature_E, active.value_E**2 * (position_E > 0))
        self._rotation.update(batch, active)

    def state(self) -> State:
        """What it holds."""
        return held(self, _ADDED) | {"rotation": self._rotation.state()}

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        add_held(self, later, _ADDED)
        self._rotation.merge(later["rotation"])

    def result(self) -> Findings:
        """Position dependence of every feature, tested, and its summaries."""
        sum_GFP, active_GFP, tokens_GP = (s[..., 1:].cpu() for s in (self._sum_GFT, self._active_GFT, self._tokens_GT))
        tokens_G = tokens_GP.sum(1)
        means, per_feature = {}, {}
        for name, statistic, sums in (
            ("eta_squared", eta_squared, (sum_GFP, self._square_GF.cpu())),
            ("position_mutual_information", position_information, (active_GFP,)),
        ):
            means[name], value_F = jackknife_over_features(
                statistic, tokens_G, sums, (tokens_GP,), unit=DEFINITIONS[name].unit, definition=name
            )
            per_feature[name] = value_F.numpy()
        eta_F = per_feature["eta_squared"]
        p_F = self._rotation.p_values()
        q_F = false_discovery_rate(p_F)
        alive_F = active_GFP.sum((0, 2)).numpy() > 0
        mean_FT = (self._sum_GFT.sum(0) / self._tokens_GT.sum(0)).cpu().numpy()
        return Findings(
            metrics=means | _shares(eta_F, q_F, alive_F),
            curves=_histogram(eta_F) | _profile(sum_GFP, tokens_GP),
            per_feature={
                "eta_squared": eta_F,
                "position_p": p_F,
                "position_q": q_F,
                "position_information": per_feature["position_mutual_information"],
                "position_mean": mean_FT,
            },
        )


def eta_squared(sum_FP: Tensor, square_F: Tensor, tokens_P: Tensor) -> Tensor:
    """Bias-corrected η² (ε²) from sums of z per position, sums of z² and token counts: float64 [F], NaN for a constant
    feature.

    ε² = (SS_between − (P − 1) SS_within / (N − P)) / SS_total; its mean is 0 for independent tokens that do not know
    their position, 1 for a feature that the position determines.
    """
    used = tokens_P > 0
    sum_FP, tokens_P = sum_FP[:, used], tokens_P[used]
    positions, n = len(tokens_P), tokens_P.sum()
    mean_F = sum_FP.sum(1) / n
    total_F = square_F - n * mean_F**2
    between_F = (tokens_P * (sum_FP / tokens_P - mean_F[:, None]) ** 2).sum(1)
    within_F = (total_F - between_F).clamp(min=0)
    corrected_F = (between_F - (positions - 1) * within_F / (n - positions)) / total_F
    return torch.where((total_F > 1e-12 * square_F) & (n > positions), corrected_F, torch.nan)


def position_information(active_FP: Tensor, tokens_P: Tensor) -> Tensor:
    """Bias-corrected mutual information of firing and position in nats: float64 [F], NaN for a feature that never
    fires.

    The bias is the expectation under independence with both margins fixed (the numerator of adjusted mutual
    information, Vinh, Epps & Bailey 2010): exactly for rare features, (P − 1) / 2N (Miller) for frequent ones.
    """
    used = tokens_P > 0
    active_FP, tokens_P = active_FP[:, used], tokens_P[used]
    n, active_F = tokens_P.sum(), active_FP.sum(1)
    joint_F = _entropies(active_FP, tokens_P).sum(1)
    information_F = (joint_F - _entropies(active_F, n)) / n
    bias_F = (len(tokens_P) - 1) / (2 * n) * torch.ones_like(active_F)
    rare = (active_F > 0) & (active_F <= _EXACT_UP_TO) & (active_F < n)
    counts, where = torch.unique(active_F[rare], return_inverse=True)
    bias_F[rare] = _expected_information(counts, tokens_P)[where] if len(counts) else bias_F[rare]
    return torch.where(active_F > 0, torch.where(active_F < n, information_F - bias_F, 0.0), torch.nan)


def _entropies(active: Tensor, tokens: Tensor) -> Tensor:
    """Σ over firing or not of count · ln(count / tokens), negative: minus tokens times the entropy of firing."""
    rest = tokens - active
    return torch.special.xlogy(active, active / tokens) + torch.special.xlogy(rest, rest / tokens)


def _expected_information(active_K: Tensor, tokens_P: Tensor) -> Tensor:
    """Mean mutual information if ``active_K`` firings fell on tokens at random (hypergeometric)."""
    n = tokens_P.sum()
    sizes, repeats = torch.unique(tokens_P, return_counts=True)
    total_K = torch.zeros_like(active_K)
    for size, repeat in zip(sizes, repeats, strict=True):
        mean_K = active_K * size / n
        top = int(
            min(float(size), float(active_K.max()), float(mean_K.max()) + 12 * math.sqrt(float(mean_K.max())) + 12)
        )
        c_C = torch.arange(top + 1, dtype=torch.float64)
        log_p = (
            _log_choose(size, c_C) + _log_choose(n - size, active_K[:, None] - c_C) - _log_choose(n, active_K)[:, None]
        )
        total_K += repeat * (log_p.exp() * _entropies(c_C, size)).sum(1)
    return (total_K - _entropies(active_K, n)) / n


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the binomial coefficient; −∞ where k is negative or exceeds n."""
    inside = (k >= 0) & (k <= n)
    safe = torch.where(inside, k, 0.0)
    found = torch.lgamma(n + 1) - torch.lgamma(safe + 1) - torch.lgamma(n - safe + 1)
    return torch.where(inside, found, -torch.inf)


def _shares(eta_F: np.ndarray, q_F: np.ndarray, alive_F: np.ndarray) -> dict[str, Metric]:
    tested = np.isfinite(q_F)
    specific = tested & (q_F <= FALSE_DISCOVERY_RATE)
    locked = specific & (eta_F >= LOCKED)
    return {
        key: plain_metric(DEFINITIONS, key, float(flags.mean()) if len(flags) else None, len(flags))
        for key, flags in (
            ("position_specific_share", specific[tested]),
            ("position_locked_share", locked[tested]),
            ("position_tested_share", tested[alive_F]),
        )
    }


def _histogram(eta_F: np.ndarray) -> dict[str, Curve]:
    found = eta_F[np.isfinite(eta_F)]
    if not len(found):
        return {}
    edges = np.linspace(-0.05, 1.0, 43)
    counts = np.histogram(np.clip(found, -0.05, 1), edges)[0]
    return {
        "eta_squared": Curve.histogram(
            edges,
            counts,
            x_label="η², bias-corrected",
            y_label="features",
            definition="eta_squared_distribution",
        )
    }


def _profile(sum_GFP: Tensor, tokens_GP: Tensor) -> dict[str, Curve]:
    """Mean activation by position over the overall mean, averaged over the features alive in all of the text."""
    used, alive = tokens_GP.sum(0) > 0, sum_GFP.sum((0, 2)) > 0
    if not bool(alive.any()):
        return {}

    def profile(_: Tensor, sum_FP: Tensor, tokens_P: Tensor) -> Tensor:
        overall_F = sum_FP.sum(1) / tokens_P.sum()
        still = alive & (overall_F > 0)
        return (sum_FP[still] / tokens_P / overall_F[still, None]).mean(0)[used]

    y, low, high = jackknife_band(profile, tokens_GP.sum(1), sum_GFP, tokens_GP)
    return {
        "position_profile": Curve(
            x=(used.nonzero().squeeze(1) + 1).double().tolist(),
            y=y,
            low=low,
            high=high,
            x_label="position in the row",
            y_label="mean activation / overall mean",
            definition="position_profile",
        )
    }
