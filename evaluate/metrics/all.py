"""The entry to all feature, temporal and position metrics: one accumulator that reads the features once, sparsely."""

from __future__ import annotations

from torch import Tensor

from ..protocol import Accumulator, Findings, SparseCoder, TokenBatch
from .active_entries import Codes
from .features import FeatureStatistics
from .position import PositionStatistics
from .redundancy import COLLAPSE_SHARE
from .temporal import TemporalStatistics

_ALIVE_ALARM = 0.05


class Measures:
    """Feature, temporal and position statistics of one SAE. The dense features become sparse codes once
    for all three.
    """

    def __init__(self, sae: SparseCoder, *, context: int, seed: int):
        parts = (FeatureStatistics, TemporalStatistics, PositionStatistics)
        self.definitions = {key: text for part in parts for key, text in part.definitions.items()}
        self._parts = [part(sae, context=context, seed=seed) for part in parts]

    def update(self, batch: TokenBatch, z_BTF: Tensor, x_hat_BTD: Tensor) -> None:
        """Take one batch in."""
        codes = Codes.from_dense(z_BTF, batch.valid_BT)
        for part in self._parts:
            part.update(batch, codes, x_hat_BTD)

    def result(self) -> Findings:
        """What the three parts found, together with alarms."""
        found = Findings()
        for part in self._parts:
            more = part.result()
            found.sums |= more.sums
            found.metrics |= more.metrics
            found.curves |= more.curves
            found.per_feature |= more.per_feature
        found.notes += _alarms(found)
        return found


def _alarms(found: Findings) -> list[str]:
    """What a reader must not overlook: a dictionary that died or collapsed."""
    alive, repeated = found.metrics["alive"].value, found.metrics["near_duplicate_share"].value
    notes = []
    if alive is not None and alive < _ALIVE_ALARM:
        notes.append(f"only {alive:.1%} of the features are ever active: the dictionary is all but dead")
    if repeated is not None and repeated > COLLAPSE_SHARE:
        notes.append(
            f"{repeated:.1%} of the alive features nearly repeat another's decoder row: the dictionary is collapsing"
        )
    return notes


def accumulators(sae: SparseCoder, *, context: int, seed: int) -> dict[str, Accumulator]:
    """All accumulators of this kind, by name: what the driver feeds during its pass."""
    return {"measures": Measures(sae, context=context, seed=seed)}
