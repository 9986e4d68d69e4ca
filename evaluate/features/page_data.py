"""What the page's feature browser is given: cards made small, safe to embed, and within a bound on the page's size.

Strings are stored once and named by index, activations as hundredths of the feature's maximum. Characters that change
how text is displayed (controls, bidirectional overrides, line separators) are replaced by their code points.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from markupsafe import Markup

from ..report.sweep import Sweep
from ..report.wording import role_of
from ..results import Curve, EvaluationReport, FeatureCard, Passage

MAX_FEATURES = 300  # per SAE
MAX_PASSAGES = 8  # per feature
MAX_BYTES = 6_000_000  # of all the browser's data
LEVELS = 100  # an activation is shown as a hundredth of the feature's largest


class Words:
    """Every distinct string once."""

    def __init__(self) -> None:
        self.list: list[str] = []
        self._index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """The number of a string."""
        shown = visible(text)
        if shown not in self._index:
            self._index[shown] = len(self.list)
            self.list.append(shown)
        return self._index[shown]


@lru_cache(maxsize=1 << 16)
def visible(text: str) -> str:
    """A token whose invisible and controlling characters are written out, newline and tab excepted."""
    return "".join(_visible(c) for c in text)


def _visible(char: str) -> str:
    if char in "\n\t":
        return char
    hidden = unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    return f"‹U+{ord(char):04X}›" if hidden else char


def payload(report: EvaluationReport, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The browser's data: as many features and passages as fit, the same number for every SAE; ``shown`` says how many.

    Returns ``{"words": [str], "saes": [{name, label, role, layer, n_features, total, features: [...]}], "numbers":
    [str]}``.
    """
    n_features, n_passages = MAX_FEATURES, MAX_PASSAGES
    while True:
        data = _payload(report, n_features, n_passages)
        size = len(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode())
        if size <= max_bytes or (n_features <= 10 and n_passages <= 1):
            return data
        if n_passages > 4 or n_features <= 10:
            n_passages = max(1, n_passages - 2)
        else:
            n_features = max(10, int(n_features * min(0.9, max_bytes / size)))


def embedded(data: Mapping[str, Any]) -> Markup:
    """JSON for a ``<script type="application/json">``: no character of it can end the element or start a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)  # noqa: S704 - escaped just above


def _payload(report: EvaluationReport, n_features: int, n_passages: int) -> dict[str, Any]:
    words, sweep = Words(), Sweep(report)
    saes: list[dict[str, Any]] = []
    names: dict[str, None] = {}  # every one once, in the order in which they appear
    for record in report.records:
        cards = report.features.get(record.name, [])
        if record.kind != "sae" or not cards:
            continue
        names |= dict.fromkeys(name for card in cards for name in card.numbers)
        shown = _spread(cards, n_features)
        saes.append(
            {
                "name": record.name,
                "label": f"layer {record.location}, {sweep.label(record)}",
                "role": role_of(record),
                "n_features": record.sae.n_features if record.sae else None,
                "total": len(cards),
                "features": [_card(card, n_passages, words) for card in shown],
            }
        )
    return {"words": words.list, "saes": saes, "numbers": list(names)}


def _spread(cards: Sequence[FeatureCard], n: int) -> list[FeatureCard]:
    """At most n cards, taken in turn from every reason for choosing."""
    groups: dict[str, list[FeatureCard]] = {}
    for card in cards:
        groups.setdefault(card.why, []).append(card)
    picked: list[FeatureCard] = []
    for rank in range(max(map(len, groups.values()), default=0)):
        picked += [group[rank] for group in groups.values() if rank < len(group)]
    return sorted(picked[:n], key=lambda card: card.feature)


def _card(card: FeatureCard, n_passages: int, words: Words) -> dict[str, Any]:
    shown = card.passages[:n_passages]
    top = max((a for p in card.passages for a in p.activations if a is not None), default=0.0)
    return {
        "id": card.feature,
        "why": card.why,
        "n": {name: value for name, value in card.numbers.items() if value is not None},
        "top": figures(top),
        "p": [_passage(passage, top, words) for passage in shown],
        "pos": _curve(card.position_profile),
        "lag": _curve(card.lag_curve),
        "near": [[near.feature, round(near.cosine, 3)] for near in card.neighbours[:3]],
        "up": [[words(effect.token), figures(effect.effect)] for effect in card.raises],
        "down": [[words(effect.token), figures(effect.effect)] for effect in card.lowers],
    }


def _passage(passage: Passage, top: float, words: Words) -> dict[str, Any]:
    """Tokens by index; activations in hundredths of ``top``: what is not zero never rounds to it, null stays null."""
    levels = [None if a is None else math.ceil(LEVELS * max(a, 0.0) / top) if top else 0 for a in passage.activations]
    out = {
        "d": passage.document,
        "s": passage.position,
        "k": passage.peak,
        "t": [words(t) for t in passage.tokens],
        "a": levels,
    }
    return out if passage.chosen == "strongest" else out | {"c": passage.chosen}


def _curve(curve: Curve | None) -> dict[str, Any] | None:
    if curve is None:
        return None
    ys = [None if y is None else figures(y) for y in curve.y]
    return {"x": [x if x is None else figures(x) for x in curve.x], "y": ys, "xl": curve.x_label, "yl": curve.y_label}


def figures(value: float) -> float | int:
    """Three significant figures, as an integer where it is one."""
    short = float(f"{value:.3g}")
    return int(short) if short.is_integer() else short
