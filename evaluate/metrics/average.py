"""Metrics written as plain functions of tokens or of adjacent pairs: their values summed per unit of text.

Shapes: B rows, T positions, N tokens (or pairs), D model width, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import RunError, UsageError
from ..protocol import Findings, State, SumsByUnit, TokenBatch
from ..results import Definition
from .active_entries import ActiveEntries, pair_masks


@dataclass(frozen=True)
class Tokens:
    """Some tokens of a batch. Tensors are gathered when they are asked for."""

    batch: TokenBatch
    active: ActiveEntries
    x_hat_BTD: Tensor
    at_N: Tensor
    """int64 [N]: which tokens, numbered row · T + position within the batch."""

    def __len__(self) -> int:
        return len(self.at_N)

    @property
    def z(self) -> Tensor:
        """Features, float32 [N, F]."""
        return self._of(self.active.z_BTF)

    @property
    def x(self) -> Tensor:
        """Activations of the model, float32 [N, D]."""
        return self._of(self.batch.x_BTD)

    @property
    def x_hat(self) -> Tensor:
        """Their reconstructions, float32 [N, D]."""
        return self._of(self.x_hat_BTD)

    @property
    def token(self) -> Tensor:
        """Token numbers in the vocabulary, int64 [N]."""
        return self._of(self.batch.tokens_BT)

    @property
    def position(self) -> Tensor:
        """Positions in the row, int64 [N]."""
        return self.at_N % self.active.context

    @property
    def document(self) -> Tensor:
        """Running numbers of the documents, int64 [N]."""
        return self._of(self.batch.documents_BT)

    @property
    def unit(self) -> Tensor:
        """Running numbers of the units of text that intervals resample, int64 [N]."""
        return self._of(self.batch.units_BT)

    def _of(self, values_BT: Tensor) -> Tensor:
        return values_BT.flatten(0, 1)[self.at_N]


class Average:
    """The accumulator of one plain function: Σ numerators / Σ denominators over the text.

    Args:
        function: of :class:`Tokens` (``over="tokens"``), or of the first and the second tokens of pairs.
        name: of the metric.
        definition: of the metric.
        over: what the function is called with.

    """

    def __init__(
        self, function: Callable[..., Any], name: str, definition: Definition, over: Literal["tokens", "pairs"]
    ):
        self.definitions = {name: definition}
        self._function, self._name, self._over = function, name, over
        self._by_unit = SumsByUnit()

    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:
        """Take one batch in; the function is not called where there is no token or pair that counts."""
        if self._over == "tokens":
            starts_N, steps = batch.valid_BT.flatten(), (0,)
        else:
            starts_N, steps = pair_masks(batch.valid_BT, batch.documents_BT, 1).earlier_LN[1], (0, 1)
        at_N = starts_N.nonzero().squeeze(1)
        if not len(at_N):
            return
        tokens = [Tokens(batch, active, x_hat_BTD, at_N + step) for step in steps]
        above_N, below_N = self._checked(self._function(*tokens), len(at_N))
        self._by_unit.add(tokens[0].unit, above=above_N, below=below_N, counted=below_N != 0)

    def state(self) -> State:
        """What it holds."""
        return self._by_unit.state()

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        self._by_unit.merge(later)

    def result(self) -> Findings:
        """The one metric; its n counts the tokens or pairs whose denominator is not zero."""
        ((name, definition),) = self.definitions.items()
        sums = self._by_unit.ratio("above", "below", definition.unit)
        return Findings(sums={name: replace(sums, definition=name, n=round(self._by_unit.total("counted")))})

    def _checked(self, values: Any, n: int) -> tuple[Tensor, Tensor]:
        """Numerators and denominators [N]; 0 and 0 where the function left a token or pair out."""
        parts: list[Any] = list(values) if isinstance(values, tuple) and len(values) == 2 else [values]
        for part in parts:
            if not isinstance(part, Tensor) or part.shape != (n,):
                found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise UsageError(
                    f"the metric '{self._name}' gives {found} for {n} {self._over}: return a tensor of that length, "
                    "or a tuple of two, numerators and denominators"
                )
        above, below = (part.double() for part in [*parts, torch.ones_like(parts[0])][:2])
        left_out_N = below == 0
        above_N = torch.where(left_out_N, 0.0, above)
        if not bool(torch.isfinite(above_N).all() and torch.isfinite(below).all()):
            raise RunError(
                f"the metric '{self._name}' is NaN or infinite for some of its {self._over}: where it is undefined, "
                "return a denominator of 0"
            )
        return above_N, below
