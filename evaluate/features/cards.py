"""Describing a chosen few features: why these, where on the text they fire, what they do to the logits.

Half of them are chosen at random, half for being extreme in something, and each card says which. The rows that hold
their passages are encoded once more, no more of them than a bound allows.

Shapes: T positions, D model width, F features, V vocabulary, C cards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..results import Curve, Definition, FeatureCard, LogitEffect, Neighbour, Passage

BEFORE, AFTER = 40, 23  # tokens shown on either side of the peak, inside its document
_PARTS = {"neighbour", "neighbour_cosine"}  # shown together, not as numbers
EFFECTS = 8  # tokens listed on either side of a feature's effect on the logits

DEFINITIONS = {
    "feature_position_profile": Definition(
        text="Mean activation of the feature at each position of the row, over the tokens that count there.",
        unit="activation units",
    ),
    "feature_lag_curve": Definition(
        text="Correlation of the feature's activation with itself that many tokens later, over valid pairs, means "
        "removed.",
        unit="1",
    ),
}


class CardSource(Protocol):
    """What the cards need from the driver once the pass is over. Row numbers are those of :class:`TokenBatch`."""

    per_feature: Mapping[
        str, np.ndarray
    ]  # [F] or [F, …]: density, eta_squared, lag_autocorrelation …; any may be missing

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

    def logit_effects(self, directions_ND: Tensor) -> Tensor | None:
        """What adding each direction to the residual stream does to the logits, [n, V]; None where that is unknown."""
        ...


class Place(NamedTuple):
    """A row, the position of a feature's peak in it, and why this row is shown."""

    row: int
    position: int
    chosen: Literal["strongest", "random"]


def describe(
    source: CardSource,
    w_dec_FD: Tensor,
    known: Mapping[str, np.ndarray],
    chosen: Mapping[int, str],
    places: Mapping[int, list[Place]],
    max_rows: int,
) -> list[FeatureCard]:
    """Cards of the chosen features (number → reason), by number; ``known``: their numbers and curves."""
    passages = _passages(source, places, max_rows)
    raises, lowers = _effects(source, w_dec_FD, sorted(chosen))
    return [
        FeatureCard(
            feature=feature,
            why=chosen[feature],
            numbers={name: _digits(v[feature]) for name, v in known.items() if v.ndim == 1 and name not in _PARTS},
            passages=passages[feature],
            position_profile=position_profile(known, feature),
            lag_curve=lag_curve(known, feature),
            neighbours=_neighbour(known, feature),
            raises=raises.get(feature, []),
            lowers=lowers.get(feature, []),
        )
        for feature in sorted(chosen)
    ]


def choose(known: Mapping[str, np.ndarray], n_cards: int, seed: int) -> dict[int, str]:
    """Feature number → why it is shown: half at random among those that fire, the rest for an extreme value."""
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


def _passages(source: CardSource, places: Mapping[int, list[Place]], max_rows: int) -> dict[int, list[Passage]]:
    """Passages per feature, in the order of its places, of those whose rows are among the ones encoded."""
    wanted = _rows_to_encode(places, max_rows)
    out: dict[int, dict[int, Passage]] = {feature: {} for feature in places}
    for start in range(0, len(wanted), 16):
        part = wanted[start : start + 16]
        index = {row: i for i, row in enumerate(part)}
        tokens_nT, documents_nT, z_nTF = source.tokens_of(part), source.documents_of(part), source.encode_rows(part)
        for feature, found in places.items():
            for rank, place in enumerate(found):
                if (i := index.get(place.row)) is not None:
                    z_T = z_nTF[i, :, feature].float().cpu().numpy()
                    out[feature][rank] = _passage(source.token_text, tokens_nT[i], documents_nT[i], z_T, place)
    return {feature: [found[rank] for rank in sorted(found)] for feature, found in out.items()}


def _rows_to_encode(places: Mapping[int, list[Place]], max_rows: int) -> list[int]:
    """Every feature's strongest row, then the rows that most features share."""
    rows = dict.fromkeys(found[0].row for found in places.values() if found)
    shared = Counter(place.row for found in places.values() for place in found)
    rows |= dict.fromkeys(row for row, _ in sorted(shared.items(), key=lambda item: (-item[1], item[0])))
    return sorted(list(rows)[:max_rows])


def _passage(
    text: Callable[[int], str], tokens_T: np.ndarray, documents_T: np.ndarray, z_T: np.ndarray, place: Place
) -> Passage:
    """The stretch of the row around its peak that lies in the same document."""
    peak = place.position
    same = np.flatnonzero(documents_T == documents_T[peak])
    start, stop = max(int(same[0]), peak - BEFORE), min(int(same[-1]) + 1, peak + AFTER + 1)
    return Passage(
        tokens=[text(int(token)) for token in tokens_T[start:stop]],
        activations=[_digits(z) for z in z_T[start:stop]],
        peak=peak - start,
        position=start,
        document=int(documents_T[peak]),
        chosen=place.chosen,
    )


def position_profile(known: Mapping[str, np.ndarray], feature: int) -> Curve | None:
    """Mean activation at every position of the row; None where that is not known."""
    if "position_mean" not in known:
        return None
    means = known["position_mean"][feature]
    return Curve(
        x=[float(t) for t in range(len(means))],
        y=[_digits(v) for v in means],
        x_label="position in the row",
        y_label="mean activation",
        definition="feature_position_profile",
    )


def lag_curve(known: Mapping[str, np.ndarray], feature: int) -> Curve | None:
    """Autocorrelation at every lag; None where that is not known."""
    if "lag_autocorrelation" not in known:
        return None
    values = known["lag_autocorrelation"][feature]
    return Curve(
        x=[float(lag) for lag in range(1, len(values) + 1)],
        y=[_digits(v) for v in values],
        x_label="lag (tokens)",
        y_label="autocorrelation",
        definition="feature_lag_curve",
    )


def _neighbour(per_feature: Mapping[str, np.ndarray], feature: int) -> list[Neighbour]:
    if "neighbour" not in per_feature or "neighbour_cosine" not in per_feature:
        return []
    cosine = float(per_feature["neighbour_cosine"][feature])
    return (
        [Neighbour(feature=int(per_feature["neighbour"][feature]), cosine=round(cosine, 4))]
        if np.isfinite(cosine)
        else []
    )


def _effects(source: CardSource, w_dec_FD: Tensor, features: Sequence[int]) -> tuple[dict[int, list[LogitEffect]], ...]:
    """The tokens each feature's decoder row raises and lowers most, strongest first."""
    raises: dict[int, list[LogitEffect]] = {}
    lowers: dict[int, list[LogitEffect]] = {}
    for start in range(0, len(features), 64):
        part = list(features[start : start + 64])
        chosen_C = torch.tensor(part, device=w_dec_FD.device)
        effects_CV = source.logit_effects(w_dec_FD.index_select(0, chosen_C).detach())
        if effects_CV is None:
            return {}, {}
        for side, sign in ((raises, 1.0), (lowers, -1.0)):
            best, ids = (sign * effects_CV).topk(min(EFFECTS, effects_CV.shape[1]), dim=1)
            for i, feature in enumerate(part):
                found = zip(ids[i].tolist(), (sign * best[i]).tolist(), strict=True)
                side[feature] = [LogitEffect(token=source.token_text(t), effect=float(f"{e:.4g}")) for t, e in found]
    return raises, lowers


def _digits(value: float) -> float | None:
    """Four significant digits are what a picture shows; undefined is None."""
    return float(f"{float(value):.4g}") if np.isfinite(value) else None
