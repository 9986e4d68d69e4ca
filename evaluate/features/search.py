"""Which features fire on words or a phrase, and which raise their logits.

Shapes: N tokens, F features, E entries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...errors import UsageError
from ..codes.store import CodeStore, RowCodes
from .look import Effects


@dataclass(frozen=True)
class Hit:
    """How a feature stands to the phrase."""

    feature: int
    score: float
    """(mean activation on the phrase − mean elsewhere) / standard deviation over all tokens that count."""
    on_phrase: float
    """Mean activation on the tokens of the phrase."""
    elsewhere: float
    """Mean activation on all other tokens that count."""
    occurrences: float
    """Share of the phrase's occurrences on which it is active."""
    share: float
    """Share of all its activation that falls on the phrase."""

    def facts(self) -> dict[str, Any]:
        """For machines."""
        return {name: value if name == "feature" else float(f"{value:.4g}") for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Found:
    """What a search found."""

    occurrences: int
    """How often the phrase stands in the text."""
    hits: list[Hit]
    """Features by score, the largest first."""
    raises: list[tuple[int, str, float]]
    """(feature, token, effect) of features that raise the logit of a word of the phrase, the largest first."""


def search(codes: CodeStore, text: Any, phrase: str, n: int, effects: Effects | None = None) -> Found:
    """The n features that fire most on a phrase more than elsewhere, and those that raise the logits of its words.

    Case does not matter, and white space stands for any; the phrase begins and ends with whole words.

    Args:
        codes: what is searched.
        text: gives a token's text.
        phrase: one word or several.
        n: how many features of either kind.
        effects: logit effects by feature, as far as they are known.

    Raises:
        UsageError: the phrase is empty.

    """
    words = phrase.split()
    if not words:
        raise UsageError("--search has nothing to look for: give a word or a phrase")
    pattern = re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)", re.IGNORECASE)
    sums = _Sums(codes.n_features)
    for part in codes:
        sums.add(part, _occurrences(part, text, pattern))
    return Found(sums.occurrences, sums.hits(n), _raising(words, effects or {}, n))


def _occurrences(part: RowCodes, text: Any, pattern: re.Pattern[str]) -> np.ndarray:
    """The number of the occurrence that each token belongs to, counted from 0; −1: none. int64 [N]."""
    out = np.full(part.tokens_RT.shape, -1, np.int64)
    count = 0
    for row, tokens in enumerate(part.tokens_RT):
        for start, stop in _stretches_of_documents(part.documents_RT[row], part.valid[row]):
            pieces = [text(int(token)) for token in tokens[start:stop]]
            ends = np.cumsum([len(piece) for piece in pieces])
            for match in pattern.finditer("".join(pieces)):
                first, last = np.searchsorted(ends, (match.start(), match.end() - 1), side="right")
                out[row, start + first : start + last + 1] = count
                count += 1
    return out.reshape(-1)


def _stretches_of_documents(documents_T: np.ndarray, valid_T: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches of neighbouring tokens that count, of one document."""
    same = np.where(valid_T, documents_T, -1)
    edges = np.flatnonzero(np.diff(same)) + 1
    for start, stop in zip([0, *edges], [*edges, len(same)], strict=True):
        if same[start] >= 0:
            yield int(start), int(stop)


class _Sums:
    """Of every feature: activation on the phrase and in all, its square, and the occurrences it is active on."""

    def __init__(self, n_features: int):
        self._n = n_features
        self._inside_F, self._all_F, self._square_F, self._hit_F = (np.zeros(n_features) for _ in range(4))
        self._n_inside = self._n_all = self.occurrences = 0

    def add(self, part: RowCodes, occurrence_N: np.ndarray) -> None:
        valid_N, token_E = part.valid.reshape(-1), part.entry_tokens
        value_E, of_E = part.value_E.astype(np.float64), occurrence_N[token_E]
        inside = of_E >= 0
        self._all_F += np.bincount(part.feature_E, value_E, self._n)
        self._square_F += np.bincount(part.feature_E, value_E**2, self._n)
        self._inside_F += np.bincount(part.feature_E[inside], value_E[inside], self._n)
        pairs = np.unique(of_E[inside] * self._n + part.feature_E[inside])
        self._hit_F += np.bincount(pairs % self._n, minlength=self._n)
        self._n_inside += int(((occurrence_N >= 0) & valid_N).sum())
        self._n_all += int(valid_N.sum())
        self.occurrences += int(occurrence_N.max(initial=-1)) + 1

    def hits(self, n: int) -> list[Hit]:
        if not self._n_inside:
            return []
        on_F = self._inside_F / self._n_inside
        elsewhere_F = (self._all_F - self._inside_F) / max(self._n_all - self._n_inside, 1)
        spread_F = np.sqrt(np.maximum(self._square_F / self._n_all - (self._all_F / self._n_all) ** 2, 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            score_F = np.where(spread_F > 0, (on_F - elsewhere_F) / spread_F, -np.inf)
            share_F = self._inside_F / self._all_F
        order = np.argsort(-score_F, kind="stable")[:n]
        return [
            Hit(int(f), float(score_F[f]), float(on_F[f]), float(elsewhere_F[f]),
                float(self._hit_F[f] / self.occurrences), float(share_F[f]))
            for f in order if score_F[f] > 0
        ]  # fmt: skip


def _raising(words: list[str], effects: Effects, n: int) -> list[tuple[int, str, float]]:
    wanted = {word.lower() for word in words}
    found = [
        (feature, effect.token, effect.effect)
        for feature, (raises, _) in effects.items()
        for effect in raises
        if effect.token.strip().lower() in wanted
    ]
    return sorted(found, key=lambda each: -each[2])[:n]
