"""What the feature browser remembers of the pass: in which rows each feature fires, and where in them it peaks.

Only the strongest activation per row is looked at, so the memory is O(F · K) whatever the length of the text.

Shapes: B rows, T positions, D model width, F features, K kept rows per feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..metrics.active_entries import ActiveEntries, uniform_hash
from ..protocol import Findings, State, TokenBatch, add_held, held
from ..results import Definition, FeatureCard
from .cards import DEFINITIONS, CardSource, Place, choose, describe

STRONGEST = 6  # rows kept per feature for the size of their activation
RANDOM = 3  # rows kept per feature at random where it fires: the strongest alone make it look cleaner than it is


class _Kept:
    """Per feature the K rows of highest score, with the position and value of the activation they are kept for.

    Of equal scores the earlier row is kept, so that nothing depends on how the text is divided.
    """

    def __init__(self, n_features: int, keep: int, device: torch.device):
        self.score_KF = torch.full((keep, n_features), -torch.inf, device=device)
        self.row_KF = torch.full((keep, n_features), -1, dtype=torch.int64, device=device)
        self.position_KF = torch.zeros((keep, n_features), dtype=torch.int16, device=device)

    def update(self, score_BF: Tensor, rows_B: Tensor, position_BF: Tensor) -> None:
        self._take(score_BF, rows_B[:, None].expand_as(score_BF), position_BF.to(torch.int16))

    def _take(self, score_XF: Tensor, row_XF: Tensor, position_XF: Tensor) -> None:
        score = torch.cat([self.score_KF, score_XF])
        best = score.argsort(dim=0, descending=True, stable=True)[: len(self.score_KF)]
        self.score_KF = score.gather(0, best)
        self.row_KF = torch.cat([self.row_KF, row_XF]).gather(0, best)
        self.position_KF = torch.cat([self.position_KF, position_XF]).gather(0, best)

    def state(self) -> State:
        """What it holds."""
        return held(self, ("score_KF", "row_KF", "position_KF"))

    def merge(self, later: State) -> None:
        """Take in the state of later rows."""
        device = self.score_KF.device
        self._take(*(torch.from_numpy(later[name]).to(device) for name in ("score_KF", "row_KF", "position_KF")))

    def places(self, feature: int, chosen: Literal["strongest", "random"]) -> list[Place]:
        """Where this feature's rows have their peaks, the row of the highest score first."""
        found = zip(self.score_KF[:, feature], self.row_KF[:, feature], self.position_KF[:, feature], strict=True)
        return [Place(int(row), int(position), chosen) for score, row, position in found if torch.isfinite(score)]


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
        found = own | {name: np.asarray(values) for name, values in per_feature.items()}
        if "lag_autocorrelation" in found:
            found["lag1_autocorrelation"] = found["lag_autocorrelation"][:, 0]
        return found

    def places(self, feature: int) -> list[Place]:
        """The strongest first, then the random ones that are not among them."""
        strongest = self.strongest.places(feature, "strongest")
        rows = {place.row for place in strongest}
        return strongest + [place for place in self.random.places(feature, "random") if place.row not in rows]


class FeatureBrowser:
    """An accumulator that remembers where each feature fires; :meth:`cards` then describes a chosen few.

    Args:
        sae: anything with ``W_dec`` [F, D] and ``n_features``.
        seed: of the choice of random rows and random features.
        n_cards: how many features to describe.
        max_rows: how many distinct rows are encoded again for their passages.

    """

    definitions: dict[str, Definition] = DEFINITIONS

    def __init__(self, sae: Any, *, seed: int, n_cards: int = 200, max_rows: int = 256):
        self._sae, self._seed, self._n_cards, self._max_rows = sae, seed, n_cards, max_rows
        self._seen: _Seen | None = None

    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:  # noqa: ARG002
        """Take one batch in: per row and feature only the strongest valid activation matters."""
        z_BTF = active.z_BTF
        if self._seen is None:
            self._seen = _Seen(self._sae.n_features, z_BTF.device)
        masked_BTF = z_BTF * batch.valid_BT[..., None]
        peak_BF, position_BF = masked_BTF.max(dim=1)
        fires_BF = peak_BF > 0
        self._seen.count_F += (masked_BTF > 0).sum(dim=(0, 1))
        self._seen.n_tokens += int(batch.valid_BT.sum())
        never = torch.tensor(-torch.inf, device=z_BTF.device)
        self._seen.strongest.update(torch.where(fires_BF, peak_BF, never), batch.rows_B, position_BF)
        row, feature = fires_BF.nonzero(as_tuple=True)
        lot = uniform_hash(self._seed, batch.rows_B[row].cpu().numpy(), feature.cpu().numpy())
        random_BF = torch.full_like(peak_BF, -torch.inf)
        random_BF[row, feature] = torch.from_numpy(lot).to(random_BF)
        self._seen.random.update(random_BF, batch.rows_B, position_BF)

    def state(self) -> State:
        """What it holds; nothing before the first batch."""
        seen = self._seen
        if seen is None:
            return {}
        kept = {"strongest": seen.strongest.state(), "random": seen.random.state(), "n_tokens": seen.n_tokens}
        return held(seen, ("count_F",)) | kept

    def merge(self, later: State) -> None:
        """Take in the state of later rows."""
        if not later:
            return
        if self._seen is None:
            self._seen = _Seen(self._sae.n_features, self._sae.W_dec.device)
        add_held(self._seen, later, ("count_F",))
        self._seen.strongest.merge(later["strongest"])
        self._seen.random.merge(later["random"])
        self._seen.n_tokens += later["n_tokens"]

    def result(self) -> Findings:
        """Nothing for the table: the cards are asked for afterwards."""
        return Findings()

    def cards(self, source: CardSource) -> list[FeatureCard]:
        """Describe the chosen features, by feature number; empty before the first batch."""
        if self._seen is None:
            return []
        known = self._seen.known(source.per_feature)
        chosen = choose(known, self._n_cards, self._seed)
        places = {feature: self._seen.places(feature) for feature in chosen}
        return describe(source, self._sae.W_dec, known, chosen, places, self._max_rows)
