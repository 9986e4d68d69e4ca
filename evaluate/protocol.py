"""The contract between the evaluation's one pass over the text and everything that measures something on the way.

Shapes: B rows, T positions, D model width, F features, N tokens, U units. A *unit* is at most about a thousand tokens
of one document, numbered in order of appearance; intervals come from resampling units (or the documents they belong
to), so whatever is an average over tokens or pairs is kept as two sums per unit and divided once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .results import Curve, Definition, Metric

if TYPE_CHECKING:
    from .metrics.active_entries import ActiveEntries


@dataclass(frozen=True)
class TokenBatch:
    """One batch of held-out rows as one layer sees it. All tensors lie on one device.

    A position counts (``valid_BT``) when it is neither special nor padding nor of outlying norm; ``real_BT`` includes
    the outliers. Two positions of a row form a valid pair when both count and their documents agree.
    """

    x_BTD: Tensor  # float32, the model's residual stream after the layer
    tokens_BT: Tensor  # int64
    documents_BT: Tensor  # int64, running document number over the whole text
    units_BT: Tensor  # int64, running unit number over the whole text
    valid_BT: Tensor  # bool
    real_BT: Tensor  # bool
    rows_B: Tensor  # int64, running row number over the whole text
    labels_BT: Tensor  # int64, number of the label of the document, −1 where it has none
    classes_BT: Tensor  # int64, the class of the token's text (see model/token_text.py), −1 where it is not known

    def rows(self, chosen: Tensor) -> TokenBatch:
        """Some of its rows, by their number in it."""
        chosen = chosen.to(self.x_BTD.device)
        return replace(self, **{one.name: getattr(self, one.name)[chosen] for one in fields(self)})


@dataclass(frozen=True)
class UnitSums:
    """A metric as a ratio of sums: ``offset + scale * Σ numerator / Σ denominator`` over units."""

    numerator_U: np.ndarray  # float64
    denominator_U: np.ndarray  # float64
    unit: str
    definition: str
    offset: float = 0.0
    scale: float = 1.0
    n: int | None = None  # None: the denominators' sum, a count


@dataclass
class Findings:
    """What an accumulator found. The driver turns ``sums`` into metrics with intervals and into paired differences."""

    sums: dict[str, UnitSums] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    """What no ratio of sums expresses, with its own interval or none."""
    curves: dict[str, Curve] = field(default_factory=dict)
    per_feature: dict[str, np.ndarray] = field(default_factory=dict)
    """[F] or [F, …]: for the feature browser, never written."""
    notes: list[str] = field(default_factory=list)

    def add(self, more: Findings) -> None:
        """Take in what another accumulator found."""
        self.sums |= more.sums
        self.metrics |= more.metrics
        self.curves |= more.curves
        self.per_feature |= more.per_feature
        self.notes += more.notes


def plain_metric(definitions: Mapping[str, Definition], key: str, value: float | None, n: int) -> Metric:
    """A metric that has no interval, in its definition's unit; NaN is undefined."""
    return Metric(value=value, unit=definitions[key].unit, n=n, definition=key)


@dataclass(frozen=True)
class RawActivations:
    """The activations of a location in the place of an SAE: what is measured of them is the ceiling of all codes."""

    d_model: int
    device: torch.device


class Accumulator(Protocol):
    """Measures something of one SAE over the whole text, a batch at a time, in memory that does not grow with it."""

    @property
    def definitions(self) -> Mapping[str, Definition]:
        """Of everything in its findings."""
        ...

    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:
        """Take one batch in: the features, and the reconstruction [B, T, D] in float32 at every position."""
        ...

    def result(self) -> Findings:
        """All that was found; called once, after the last batch."""
        ...


State = dict[str, Any]
"""What an accumulator holds after some rows, by name: NumPy arrays, numbers, and states of its parts."""


class Mergeable(Accumulator, Protocol):
    """An accumulator whose rows may be divided among several of its kind, each in a process of its own."""

    def state(self) -> State:
        """What it holds, without what it was made from."""
        ...

    def merge(self, later: State) -> None:
        """Take in the state of another one that saw the rows behind its own; as if it had seen them itself."""
        ...


def held(owner: object, names: Iterable[str]) -> State:
    """Tensors among the attributes of an accumulator, as a part of its state."""
    return {name: getattr(owner, name).cpu().numpy() for name in names}


def add_held(owner: object, later: State, names: Iterable[str]) -> None:
    """Add what :func:`held` gave of another accumulator to the same tensors of this one."""
    for name in names:
        mine: Tensor = getattr(owner, name)
        mine += torch.from_numpy(later[name]).to(mine.device)


class SumsByUnit:
    """Named float64 sums per unit, growing as units appear."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, units_N: Tensor, **values_N: Tensor) -> None:
        """Add each named per-token value to its token's unit. Values may be of any real dtype, bool included."""
        units = units_N.detach().cpu().numpy().reshape(-1)
        for name, values in values_N.items():
            weights = values.detach().to("cpu", torch.float64).numpy().reshape(-1)
            self._grow(name, np.bincount(units, weights=weights) if len(units) else np.zeros(0))

    def _grow(self, name: str, more: np.ndarray) -> None:
        old = self._sums.get(name, np.zeros(0))
        if len(more) > len(old):
            old, more = more, old
        total = old.astype(np.float64)
        total[: len(more)] += more
        self._sums[name] = total

    def state(self) -> State:
        """The sums [U] by name."""
        return dict(self._sums)

    def merge(self, later: State) -> None:
        """Add the sums of other rows."""
        for name, more in later.items():
            self._grow(name, more)

    def __getitem__(self, name: str) -> np.ndarray:
        """The sums [U] of a name; empty when nothing was added."""
        return self._sums.get(name, np.zeros(0))

    def total(self, name: str) -> float:
        """The sum over all units."""
        return float(self[name].sum())

    def ratio(
        self, numerator: str, denominator: str, unit: str, *, offset: float = 0.0, scale: float = 1.0
    ) -> UnitSums:
        """Two names as a metric, whose definition is called like the numerator."""
        return UnitSums(self[numerator], self[denominator], unit, numerator, offset, scale)
