"""The feature browser's data: which features to show, and where on the text they fire.

During the pass only the strongest activation per row is looked at, so the memory is O(F · k) whatever the length of the text.
After it a few features are chosen, some at random and some for being extreme, each card saying which; the rows that hold their
passages are encoded once more.

Shapes: B rows, T positions, D model width, F features, K kept rows per feature, C cards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .protocol import Findings, TokenBatch
from .results import Curve, Definition, FeatureCard, LogitEffect, Neighbour, Passage

STRONGEST = 8  # rows kept per feature for the size of their activation
RANDOM = 3  # rows kept per feature at random among those where it fires: the strongest alone flatter a feature
BEFORE, AFTER = 40, 23  # tokens shown on either side of the peak, inside its document
EFFECTS = 8  # tokens listed on either side of a feature's effect on the logits

DEFINITIONS = {
    "position_profile": Definition(
        text="Mean activation of the feature at each position of the row, over the tokens that count there.",
        unit="activation units",
    ),
    "lag_curve": Definition(
        text="Correlation of the feature's activation with itself that many tokens later, over valid pairs, means removed.",
        unit="1",
    ),
}


class CardSource(Protocol):
    """What the cards need from the driver once the pass is over. Row numbers are those of :class:`TokenBatch`."""

    per_feature: Mapping[str, np.ndarray]  # [F] or [F, …]: density, eta_squared, lag_autocorrelation …; any may be missing

    def tokens_of(self, rows: Sequence[int]) -> np.ndarray:
        """Token ids [n, T]."""
        ...

    def documents_of(self, rows: Sequence[int]) -> np.ndarray:
        """Document numbers [n, T]."""
        ...

    def encode_rows(self, rows: Sequence[int]) -> Tensor:
        """The SAE's features [n, T, F] on these rows."""
        ...

    def token_text(self, token: int) -> str:
        """The token as text."""
        ...

    def logit_effects(self, directions_ND: Tensor) -> Tensor:
        """What adding each direction to the residual stream does to the logits, [n, V]."""
        ...


class _Kept:
    """Per feature the K rows of highest score, with the position and value of the activation they are kept for."""

    def __init__(self, n_features: int, keep: int, device: torch.device):
        self.score_KF = torch.full((keep, n_features), -torch.inf, device=device)
        self.row_KF = torch.full((keep, n_features), -1, dtype=torch.int64, device=device)
        self.position_KF = torch.zeros((keep, n_features), dtype=torch.int16, device=device)

    def offer(self, score_BF: Tensor, rows_B: Tensor, position_BF: Tensor) -> None:
        rows_BF = rows_B[:, None].expand_as(score_BF)
        score = torch.cat([self.score_KF, score_BF])
        self.score_KF, best = score.topk(len(self.score_KF), dim=0)
        self.row_KF = torch.cat([self.row_KF, rows_BF]).gather(0, best)
        self.position_KF = torch.cat([self.position_KF, position_BF.to(torch.int16)]).gather(0, best)

    def rows_of(self, feature: int) -> list[tuple[int, int]]:
        """(row, position of the peak), best first."""
        found = zip(self.score_KF[:, feature], self.row_KF[:, feature], self.position_KF[:, feature], strict=True)
        return [(int(row), int(position)) for score, row, position in found if torch.isfinite(score)]


class _Seen:
    """What the pass has shown so far of F features."""

    def __init__(self, n_features: int, device: torch.device):
        self.strongest = _Kept(n_features, STRONGEST, device)
        self.random = _Kept(n_features, RANDOM, device)
        self.count_F = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.n_tokens = 0

    def known(self, per_feature: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All that is known of every feature: what was counted here and what the other accumulators found."""
        peak_F = self.strongest.score_KF[0].clamp_min(0).cpu().numpy().astype(np.float64)
        own = {"density": self.count_F.cpu().numpy() / max(self.n_tokens, 1), "max_activation": peak_F}
        return own | {name: np.asarray(v) for name, v in per_feature.items() if name not in {"neighbour", "neighbour_cosine"}}

    def places(self, feature: int) -> list[tuple[int, int]]:
        """Rows and peaks, the strongest first and then the random ones that are not among them."""
        strongest = self.strongest.rows_of(feature)
        rows = {row for row, _ in strongest}
        return strongest + [place for place in self.random.rows_of(feature) if place[0] not in rows]


class FeatureBrowser:
    """An accumulator that remembers where each feature fires; :meth:`cards` then describes a chosen few.

    Args:
        sae: anything with ``W_dec`` [F, D] and ``n_features``.
        seed: of the choice of random rows and random features.
        n_cards: how many features to describe.
        max_rows: how many distinct rows are encoded again for their passages.

    """

    definitions: dict[str, Definition] = DEFINITIONS

    def __init__(self, sae: Any, *, seed: int, n_cards: int = 200, max_rows: int = 192):
        self._sae, self._seed, self._n_cards, self._max_rows = sae, seed, n_cards, max_rows
        self._generator = torch.Generator().manual_seed(seed)
        self._seen: _Seen | None = None

    def update(self, batch: TokenBatch, z_BTF: Tensor, x_hat_BTD: Tensor) -> None:  # noqa: ARG002 - the accumulators' signature
        """Take one batch in: per row and feature only the strongest valid activation matters."""
        if self._seen is None:
            self._seen = _Seen(self._sae.n_features, z_BTF.device)
        masked_BTF = z_BTF * batch.valid_BT[..., None]
        peak_BF, position_BF = masked_BTF.max(dim=1)
        fires_BF = peak_BF > 0
        self._seen.count_F += (masked_BTF > 0).sum(dim=(0, 1))
        self._seen.n_tokens += int(batch.valid_BT.sum())
        never = torch.tensor(-torch.inf, device=z_BTF.device)
        self._seen.strongest.offer(torch.where(fires_BF, peak_BF, never), batch.rows_B, position_BF)
        lots_BF = torch.rand(peak_BF.shape, generator=self._generator).to(z_BTF.device)
        self._seen.random.offer(torch.where(fires_BF, lots_BF, never), batch.rows_B, position_BF)

    def result(self) -> Findings:
        """Nothing for the table: the cards are asked for afterwards."""
        return Findings()

    def cards(self, source: CardSource) -> list[FeatureCard]:
        """Describe the chosen features, by feature number; empty before the first batch."""
        if self._seen is None:
            return []
        known = self._seen.known(source.per_feature)
        chosen = choose(known, self._n_cards, self._seed)
        passages = _passages(source, {feature: self._seen.places(feature) for feature in chosen}, self._max_rows)
        raises, lowers = _effects(source, self._sae.W_dec, sorted(chosen))
        return [
            FeatureCard(
                feature=feature,
                why=chosen[feature],
                numbers={name: _digits(values_F[feature]) for name, values_F in known.items() if values_F.ndim == 1},
                passages=passages[feature],
                position_profile=_profile(known, feature),
                lag_curve=_lags(known, feature),
                neighbours=_neighbour(source.per_feature, feature),
                raises=raises[feature],
                lowers=lowers[feature],
            )
            for feature in sorted(chosen)
        ]


def browser(sae: Any, *, context: int, seed: int, n_cards: int = 200, max_rows: int = 192) -> FeatureBrowser:  # noqa: ARG001
    """The browser's accumulator for one SAE, made the way every accumulator is made."""
    return FeatureBrowser(sae, seed=seed, n_cards=n_cards, max_rows=max_rows)


def choose(known: Mapping[str, np.ndarray], n_cards: int, seed: int) -> dict[int, str]:
    """Feature number → why it is shown: half at random among those that fire, the rest the extremes of what is known."""
    alive = np.flatnonzero(known["density"] > 0)
    order = np.random.default_rng(seed).permutation(alive)
    chosen = {int(feature): "chosen at random" for feature in order[: n_cards // 2]}
    extremes = [(why, _ranked(alive, values_F)) for why, values_F in _extremes(known)]
    share = (n_cards - len(chosen)) // max(len(extremes), 1)
    for why, ranked in extremes:
        fresh = [feature for feature in ranked if feature not in chosen][:share]
        chosen |= dict.fromkeys(fresh, why)
    for feature in order[n_cards // 2 :]:
        if len(chosen) >= n_cards:
            break
        chosen.setdefault(int(feature), "chosen at random")
    return chosen


def _extremes(known: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    found = [("most frequent", known["density"]), ("strongest", known["max_activation"])]
    if "eta_squared" in known:
        found.append(("most position-dependent", known["eta_squared"]))
    if "lag_autocorrelation" in known:
        found.append(("most persistent", known["lag_autocorrelation"][:, 0]))
        found.append(("least persistent", -known["lag_autocorrelation"][:, 0]))
    return found


def _ranked(alive: np.ndarray, values_F: np.ndarray) -> list[int]:
    usable = alive[np.isfinite(values_F[alive])]
    return [int(f) for f in usable[np.argsort(-values_F[usable], kind="stable")]]


def _passages(source: CardSource, places: Mapping[int, list[tuple[int, int]]], max_rows: int) -> dict[int, list[Passage]]:
    """Passages per feature, from at most ``max_rows`` rows: every feature's first row, then every feature's second …."""
    rows: dict[int, None] = {}
    for rank in range(STRONGEST + RANDOM):
        for found in places.values():
            if rank < len(found) and len(rows) < max_rows:
                rows.setdefault(found[rank][0])
    wanted = sorted(rows)
    out: dict[int, dict[int, Passage]] = {feature: {} for feature in places}
    for start in range(0, len(wanted), 16):
        part = wanted[start : start + 16]
        tokens_nT, documents_nT, z_nTF = source.tokens_of(part), source.documents_of(part), source.encode_rows(part)
        for i, row in enumerate(part):
            for feature, found in places.items():
                for rank, (where, peak) in enumerate(found):
                    if where == row:
                        z_T = z_nTF[i, :, feature].float().cpu().numpy()
                        out[feature][rank] = _passage(source.token_text, tokens_nT[i], documents_nT[i], z_T, peak)
    return {feature: [found[rank] for rank in sorted(found)] for feature, found in out.items()}


def _passage(text: Callable[[int], str], tokens_T: np.ndarray, documents_T: np.ndarray, z_T: np.ndarray, peak: int) -> Passage:
    """The stretch of the row around its peak that lies in the same document."""
    same = np.flatnonzero(documents_T == documents_T[peak])
    start, stop = max(int(same[0]), peak - BEFORE), min(int(same[-1]) + 1, peak + AFTER + 1)
    return Passage(
        tokens=[text(int(token)) for token in tokens_T[start:stop]],
        activations=[_digits(z) for z in z_T[start:stop]],
        peak=peak - start,
        position=start,
        document=int(documents_T[peak]),
    )


def _profile(known: Mapping[str, np.ndarray], feature: int) -> Curve | None:
    if "position_mean" not in known:
        return None
    means = known["position_mean"][feature]
    return Curve(
        x=[float(t) for t in range(len(means))],
        y=[_digits(v) for v in means],
        x_label="position in the row",
        y_label="mean activation",
        definition="position_profile",
    )


def _lags(known: Mapping[str, np.ndarray], feature: int) -> Curve | None:
    if "lag_autocorrelation" not in known:
        return None
    values = known["lag_autocorrelation"][feature]
    return Curve(
        x=[float(lag) for lag in range(1, len(values) + 1)],
        y=[_digits(v) for v in values],
        x_label="lag (tokens)",
        y_label="autocorrelation",
        definition="lag_curve",
    )


def _neighbour(per_feature: Mapping[str, np.ndarray], feature: int) -> list[Neighbour]:
    if "neighbour" not in per_feature or "neighbour_cosine" not in per_feature:
        return []
    cosine = float(per_feature["neighbour_cosine"][feature])
    return [Neighbour(feature=int(per_feature["neighbour"][feature]), cosine=round(cosine, 4))] if np.isfinite(cosine) else []


def _effects(source: CardSource, w_dec_FD: Tensor, features: Sequence[int]) -> tuple[dict[int, list[LogitEffect]], ...]:
    """The tokens each feature's decoder row raises and lowers most, strongest first."""
    raises: dict[int, list[LogitEffect]] = {}
    lowers: dict[int, list[LogitEffect]] = {}
    for start in range(0, len(features), 64):
        part = list(features[start : start + 64])
        effects_CV = source.logit_effects(w_dec_FD[part].detach())
        for side, sign in ((raises, 1.0), (lowers, -1.0)):
            best, ids = (sign * effects_CV).topk(min(EFFECTS, effects_CV.shape[1]), dim=1)
            for i, feature in enumerate(part):
                found = zip(ids[i].tolist(), (sign * best[i]).tolist(), strict=True)
                side[feature] = [LogitEffect(token=source.token_text(t), effect=float(f"{e:.4g}")) for t, e in found]
    return raises, lowers


def _digits(value: float) -> float | None:
    """Four significant digits are what a picture shows; undefined is None."""
    return float(f"{float(value):.4g}") if np.isfinite(value) else None
