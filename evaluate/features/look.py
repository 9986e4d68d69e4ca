"""Features as people look at them: passages with the text around, from a store of codes and a tokenizer.

Shapes: T positions, F features, K kept places.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import TcsaeError
from ...extract.config import ModelSource
from ..codes.store import CodeStore, RowCodes
from ..model.token_text import token_text
from ..results import FeatureCard, LogitEffect, Neighbour, Passage, read_results
from .cards import AFTER, BEFORE, EFFECTS, Place, lag_curve, position_profile
from .survey import BINS_PER_OCTAVE, LOWEST_OCTAVE, Survey

EFFECTS_FILE = "values/effects.npz"
"""Where logit effects are kept, inside the store of codes."""


class TokenTexts:
    """Token ids as text, by the tokenizer of the model that the activations are of; the model itself is not loaded.

    Raises:
        ModelError: the tokenizer cannot be had.

    """

    def __init__(self, codes: CodeStore):
        from ...extract.model.load import outline_model

        model = codes.manifest.of_store.model
        source = ModelSource(id=model.id, revision=model.revision, gguf_file=model.gguf_file)
        self._tokenizer = outline_model(source, elsewhere=True).tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """The token as readers see it, its leading space kept."""
        if token not in self._known:
            self._known[token] = token_text(self._tokenizer, token)
        return self._known[token]


class Stretch(NamedTuple):
    """The stretch of a row around a feature's peak that lies in one document."""

    place: Place
    start: int
    tokens: np.ndarray
    values: np.ndarray
    document: int

    def passage(self, text: Any) -> Passage:
        """As cards hold it; ``text`` gives a token's text."""
        return Passage(
            tokens=[text(int(token)) for token in self.tokens],
            activations=[float(f"{z:.4g}") for z in self.values],
            peak=self.place.position - self.start,
            position=self.start,
            document=self.document,
            chosen=self.place.chosen,
        )


def places_of(found: Survey, feature: int, context: int) -> list[Place]:
    """Where a feature fires: the strongest rows first, then random ones that are not among them."""
    strongest = [divmod(int(at), context) for at in found.strongest_FK[feature] if at >= 0]
    rows = {row for row, _ in strongest}
    random = [divmod(int(at), context) for at in found.random_FK[feature] if at >= 0]
    return [Place(row, position, "strongest") for row, position in strongest] + [
        Place(row, position, "random") for row, position in random if row not in rows
    ]


def stretches(codes: CodeStore, places: Mapping[int, Sequence[Place]]) -> dict[int, list[Stretch]]:
    """The stretches of all features, in the order of their places; every part of the codes is read at most once."""
    by_row: dict[int, list[tuple[int, int]]] = {}
    for feature, found in places.items():
        for rank, place in enumerate(found):
            by_row.setdefault(place.row, []).append((feature, rank))
    out: dict[int, dict[int, Stretch]] = {feature: {} for feature in places}
    for part, rows in _parts(codes, by_row):
        for row in rows:
            wanted = by_row[row]
            features = np.unique([feature for feature, _ in wanted])
            z_TC = part.dense_row(row - part.first_row, features)
            for feature, rank in wanted:
                z_T = z_TC[:, np.searchsorted(features, feature)]
                out[feature][rank] = _stretch(part, row - part.first_row, z_T, places[feature][rank])
    return {feature: [found[rank] for rank in sorted(found)] for feature, found in out.items()}


def _parts(codes: CodeStore, rows: Iterable[int]) -> Iterable[tuple[RowCodes, list[int]]]:
    """The parts that hold any of the rows, with those of them."""
    wanted = np.array(sorted(rows), np.int64)
    for part in codes.parts:
        low, high = np.searchsorted(wanted, (part.first_row, part.stop_row))
        if low < high:
            yield codes.read(part), wanted[low:high].tolist()


def _stretch(part: RowCodes, row: int, z_T: np.ndarray, place: Place) -> Stretch:
    peak, documents_T = place.position, part.documents_RT[row]
    same = np.flatnonzero(documents_T == documents_T[peak])
    start, stop = max(int(same[0]), peak - BEFORE), min(int(same[-1]) + 1, peak + AFTER + 1)
    return Stretch(place, start, part.tokens_RT[row, start:stop], z_T[start:stop], int(documents_T[peak]))


@dataclass(frozen=True)
class FeatureView:
    """A feature as it is shown: what the report's cards hold, and what only all codes can say."""

    card: FeatureCard
    histogram: list[tuple[float, int]] = field(default_factory=list)
    """(lower end of the bin, tokens) of the activations' sizes, empty bins inside included."""
    together: list[tuple[int, float]] = field(default_factory=list)
    """(feature, correlation of being active), the strongest first."""
    label: str | None = None
    """What a language model called it, if one was asked; see :mod:`.labels`."""

    def facts(self) -> dict[str, Any]:
        """For machines."""
        plain = self.card.model_dump(mode="json", exclude={"why"})
        return plain | {"label": self.label, "histogram": self.histogram, "together": self.together}


Effects = Mapping[int, tuple[list[LogitEffect], list[LogitEffect]]]
"""Feature → the tokens it raises and those it lowers, strongest first."""


def views(
    codes: CodeStore, found: Survey, text: Any, features: Sequence[int], effects: Effects | None = None
) -> list[FeatureView]:
    """Some features as they are shown, with passages."""
    shown = stretches(codes, {feature: places_of(found, feature, codes.context) for feature in features})
    return [view(found, feature, [s.passage(text) for s in shown[feature]], effects or {}) for feature in features]


def view(found: Survey, feature: int, passages: list[Passage], effects: Effects) -> FeatureView:
    """One feature as it is shown."""
    known = found.known()
    raises, lowers = effects.get(feature, ([], []))
    card = FeatureCard(
        feature=feature,
        why="asked for",
        numbers={name: _digits(values_F[feature]) for name, values_F in found.numbers().items()},
        passages=passages,
        position_profile=position_profile(known, feature),
        lag_curve=lag_curve(known, feature),
        neighbours=[
            Neighbour(feature=int(other), cosine=round(float(cosine), 4))
            for other, cosine in zip(found.neighbour_FC[feature], found.neighbour_cosine_FC[feature], strict=True)
            if other >= 0
        ],
        raises=raises,
        lowers=lowers,
    )
    together = zip(found.together_FC[feature], found.together_value_FC[feature], strict=True)
    return FeatureView(card, histogram(found, feature), [(int(f), round(float(v), 3)) for f, v in together if f >= 0])


def histogram(found: Survey, feature: int) -> list[tuple[float, int]]:
    """(lower end, tokens) of the bins between the first and the last that hold any."""
    counts_B = found.histogram_FB[feature]
    used = np.flatnonzero(counts_B)
    if not len(used):
        return []
    bins = range(int(used[0]), int(used[-1]) + 1)
    return [(float(f"{2.0 ** (at / BINS_PER_OCTAVE + LOWEST_OCTAVE):.3g}"), int(counts_B[at])) for at in bins]


def _digits(value: float) -> float | None:
    return float(f"{float(value):.4g}") if np.isfinite(value) else None


def known_effects(codes: CodeStore, text: Any, report: str | Path | None = None) -> dict[int, Any]:
    """Logit effects that are at hand: those kept beside the codes, else those of the cards of a report.

    Raises:
        RunError: the report is damaged.

    """
    kept = _kept_effects(codes)
    if kept is not None:
        tokens, values = kept
        found: dict[int, Any] = {}
        for feature in range(len(tokens)):
            sides = []
            for side in (0, 1):
                pairs = zip(tokens[feature, side].tolist(), values[feature, side].tolist(), strict=True)
                sides.append([LogitEffect(token=text(t), effect=float(f"{e:.4g}")) for t, e in pairs if t >= 0])
            found[feature] = tuple(sides)
        return found
    if report is None:
        return {}
    cards = read_results(Path(report)).features.get(codes.manifest.run, [])
    return {card.feature: (card.raises, card.lowers) for card in cards if card.raises}


def _kept_effects(codes: CodeStore) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with np.load(io.BytesIO(codes.place.read(EFFECTS_FILE)), allow_pickle=False) as file:
            same = str(file["weights"]) == codes.manifest.weights
            return (file["tokens"], file["values"]) if same else None
    except (OSError, ValueError, KeyError, EOFError, TcsaeError):
        return None


def compute_effects(codes: CodeStore, run: str, device: str = "auto") -> None:
    """Load the language model once, and keep what every feature's decoder row does to the logits beside the codes.

    Raises:
        ModelError: the model cannot be had, or has no logit effects for these features.

    """
    import torch

    from ...errors import ModelError
    from ...extract.model.load import load_language_model
    from ...sites import BUILT_IN
    from ...train.sae.protocol import SparseAutoencoder
    from ..model.logit_effects import LogitEffects
    from ..model.splice import Head

    at, model = codes.manifest.location, codes.manifest.of_store.model
    if at.site not in BUILT_IN:
        raise ModelError(f"directions of {at} are none of the residual stream: they have no logit effects")
    source = ModelSource(
        id=model.id, revision=model.revision, gguf_file=model.gguf_file, device=device, load_in=model.load_in
    )
    lm = load_language_model(source)
    effects = LogitEffects(lm, Head(lm))
    if effects.note is not None:
        raise ModelError(effects.note)
    w_dec_FD = SparseAutoencoder.load(run).token_coder().W_dec.detach()
    n = min(EFFECTS, lm.vocab_size)
    tokens = np.full((len(w_dec_FD), 2, EFFECTS), -1, np.int32)
    values = np.full(tokens.shape, np.nan, np.float32)
    for start in range(0, len(w_dec_FD), 256):
        found = effects(w_dec_FD[start : start + 256].to(lm.device))
        assert isinstance(found, torch.Tensor)  # noqa: S101 - there is no note
        for side, sign in ((0, 1.0), (1, -1.0)):
            best, ids = (sign * found).topk(n, dim=1)
            tokens[start : start + len(ids), side, :n] = ids.cpu().numpy()
            values[start : start + len(ids), side, :n] = (sign * best).float().cpu().numpy()
    file = io.BytesIO()
    np.savez_compressed(file, weights=np.array(codes.manifest.weights), tokens=tokens, values=values)
    codes.place.replace(EFFECTS_FILE, file.getvalue())
