"""What a language model makes of a text as it is, batch by batch: run, or read where an evaluation before kept it.

Shapes: B rows, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...sites import Location
from .heldout_text import HeldOutText
from .kept_states import KeptStates
from .splice import CleanPass, SplicedModel

_FINAL = "final"


class Untouched:
    """The tensors at the locations, and final states of the rows that are spliced.

    Args:
        model: loaded, and tried (:meth:`.splice.SplicedModel.verify`).
        text: whose rows are shown.
        locations: all that are ever asked for.
        kept: where states are kept; None: nowhere.

    Where they are kept, one pass of the model serves whoever asks first, be it only for a look at some location.

    """

    def __init__(
        self, model: SplicedModel, text: HeldOutText, locations: Sequence[Location], kept: KeptStates | None = None
    ):
        self.model, self.text, self.locations, self.kept = model, text, list(locations), kept

    @property
    def device(self) -> torch.device:
        """Of what is given."""
        return self.model.device

    def of_rows(
        self, text: HeldOutText, rows: slice | Sequence[int], locations: Sequence[Location]
    ) -> dict[Location, Tensor]:
        """See :class:`.heldout_text.Activations`."""
        if self.kept is None or text is not self.text or not isinstance(rows, slice):
            return self.model.of_rows(text, rows, locations)
        return self.batch(rows, locations, self.text.spliced(rows))[0]

    def batch(
        self, rows: slice, locations: Sequence[Location], spliced: Tensor
    ) -> tuple[dict[Location, Tensor], CleanPass | None]:
        """The tensor [B, T, D] at some locations of all rows of a batch, and the pass of those that are ``spliced``, by
        their number in the batch; no pass where none is.
        """
        kept = self.kept
        if kept is not None:
            inside = sorted(self.model.inside_blocks(self.locations)) if len(spliced) else []
            names = [at.short for at in locations] + [_before(layer) for layer in inside]
            found = kept.get(rows, [*names, _FINAL] if len(spliced) else names, self.device)
            if found is not None:
                at_BTD, before = {at: found[at.short] for at in locations}, {n: found[_before(n)] for n in inside}
                return at_BTD, CleanPass({}, before, found[_FINAL]) if len(spliced) else None
        asked = list(locations) if kept is None else self.locations
        if len(spliced):
            at_BTD, clean = self._run(rows, asked, spliced)
        else:
            at_BTD, clean = self.model.of_rows(self.text, rows, asked), None
        if kept is not None:
            kept.put(rows, {at.short: x_BTD for at, x_BTD in at_BTD.items()})
            if clean is not None:
                kept.put(rows, {_FINAL: clean.final_BTD} | {_before(layer): x for layer, x in clean.before.items()})
        return {at: at_BTD[at] for at in locations}, clean

    def _run(
        self, rows: slice, locations: Sequence[Location], spliced: Tensor
    ) -> tuple[dict[Location, Tensor], CleanPass]:
        tokens_BT = self.text.tokens(rows, self.device)
        spliced = spliced.to(tokens_BT.device)  # an index elsewhere would make a GPU wait
        clean = self.model.clean(tokens_BT[spliced], locations)
        at_BTD = dict(clean.at)
        clean.at.clear()
        if len(spliced) < len(tokens_BT):
            others = torch.ones(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
            others[spliced] = False
            for at, x_BTD in self.model.activations(tokens_BT[others], locations).items():
                whole_BTD = x_BTD.new_empty(len(tokens_BT), *x_BTD.shape[1:])
                whole_BTD[others], whole_BTD[spliced] = x_BTD, at_BTD[at]
                at_BTD[at] = whole_BTD
        return at_BTD, clean


def _before(layer: int) -> str:
    return f"before-{layer}"


def states_bytes(model: SplicedModel, text: HeldOutText, locations: Sequence[Location]) -> int:
    """What :class:`.kept_states.KeptStates` of a text take."""
    spliced = len(text) if text.spliced_R is None else int(text.spliced_R.sum())
    tensors = len(locations) * len(text) + (1 + len(model.inside_blocks(locations))) * spliced
    return tensors * text.context * model.lm.d_model * model.dtype.itemsize
