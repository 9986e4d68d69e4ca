"""What a coder of windows says of whole windows, where the table's rows are of the last position alone.

Shapes: B rows, T positions, W positions of a window, D model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..protocol import Findings, State, SumsByUnit, TokenBatch
from ..results import Definition
from .active_entries import ActiveEntries

DEFINITIONS = {
    "explained_variance_window": Definition(
        text="1 − Σ ‖x − x̂‖² / Σ ‖x − mean‖² over all positions of the complete windows that end at a token, where "
        "explained_variance is of their last position alone",
        unit="share",
        better="higher",
        label="explained variance, whole window",
    ),
    "incomplete_windows": Definition(
        text="share of tokens with less than a window of usable tokens of their document up to them; the missing "
        "positions are filled with the decoder's bias",
        unit="share",
        label="incomplete windows",
    ),
}


class WindowMetrics:
    """See :data:`DEFINITIONS`; an accumulator for coders whose ``parts`` are those of a window.

    Args:
        center_D: a mean of the activations.

    """

    definitions = DEFINITIONS

    def __init__(self, center_D: Tensor):
        self._center_D = center_D
        self._by_unit = SumsByUnit()

    @torch.no_grad()
    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:  # noqa: ARG002
        """Take one batch in."""
        valid_BT, parts = batch.valid_BT, active.parts
        complete_BT = valid_BT & parts["complete"]
        x_NWD, x_hat_NWD = parts["inputs"][complete_BT], parts["windows"][complete_BT]
        self._by_unit.add(
            batch.units_BT[complete_BT],
            error=(x_NWD - x_hat_NWD).square().sum((1, 2)),
            spread=(x_NWD - self._center_D).square().sum((1, 2)),
        )
        incomplete_N = ~parts["complete"][valid_BT]
        self._by_unit.add(batch.units_BT[valid_BT], incomplete=incomplete_N, tokens=torch.ones_like(incomplete_N))

    def state(self) -> State:
        """What it holds."""
        return self._by_unit.state()

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        self._by_unit.merge(later)

    def result(self) -> Findings:
        """Both, as sums per unit."""
        known = {
            "explained_variance_window": ("error", "spread", 1.0, -1.0),
            "incomplete_windows": ("incomplete", "tokens", 0.0, 1.0),
        }
        tokens = round(self._by_unit.total("tokens"))
        found = Findings()
        for key, (above, below, offset, scale) in known.items():
            sums = self._by_unit.ratio(above, below, "share", offset=offset, scale=scale)
            found.sums[key] = replace(sums, definition=key, n=tokens)
        return found
