"""One pass over the text for many rows of the table at once.

Per batch: the model runs once as it is; every candidate gives a reconstruction of the tensor at its location; the
layers above run once per candidate, for the rows that are spliced; and the head runs over some tokens at a time, their
clean logits computed once for all.

Shapes: B rows, T positions, D model width, N positions whose input counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..console import Progress
from ..errors import RunError
from ..sites import Location
from .metrics.fidelity import LogitBuffers, predictions, token_losses
from .model.heldout_text import HeldOutText
from .model.reference_rows import spliced_in
from .model.splice import CleanPass, Head, SplicedModel
from .model.stored_vectors import StoredVectors
from .model.untouched import Untouched
from .protocol import TokenBatch
from .results import Failure
from .table_row import Candidate


@dataclass
class _SplicedRows:
    """Some rows of a batch, and who is spliced into just these."""

    clean: CleanPass
    whole: dict[Location, TokenBatch]
    chosen: Tensor
    finals: list[tuple[Candidate, Tensor | None]] = field(default_factory=list)
    _parts: dict[Location, TokenBatch] = field(default_factory=dict)

    @classmethod
    def of(cls, batches: dict[Location, TokenBatch], clean: CleanPass, spliced: Tensor, mine: Tensor) -> _SplicedRows:
        """``clean`` is of the rows ``spliced`` of the batch, the result of those of them that are ``mine``."""
        same = len(mine) == len(spliced)
        return cls(clean if same else clean.rows(torch.searchsorted(spliced, mine)), batches, mine)

    def batch(self, at: Location) -> TokenBatch:
        """The rows as a location sees them."""
        if at not in self._parts:
            self._parts[at] = self.whole[at].rows(self.chosen)
        return self._parts[at]


@dataclass
class Measurement:
    """The model, the text and the candidates of one pass. A candidate that fails is left out, the others go on."""

    model: SplicedModel | StoredVectors
    head: Head | None
    """None where nothing can be spliced."""
    text: HeldOutText
    candidates: list[Candidate]
    uniform_at: frozenset[Location] = frozenset()
    """Where zero at every position ends in logits that are all zero."""
    splices: bool = True
    """Whether CE and KL are measured."""
    untouched: Untouched | None = None
    """What the model makes of this text as it is; None: it is run."""
    failures: dict[str, Failure] = field(default_factory=dict)
    """Of what was left out, by the key of the candidate."""
    buffers: LogitBuffers = field(default_factory=LogitBuffers)

    @torch.no_grad()
    def run(self, batch_rows: int, progress: Progress) -> None:
        """Show every batch of the text to every candidate."""
        for rows in self.text.batches(batch_rows):
            if not self.candidates:
                return
            self._batch(rows)
            progress.advance((rows.stop - rows.start) * self.text.context)

    def _batch(self, rows: slice) -> None:
        n_rows = rows.stop - rows.start
        spliced = self.text.spliced(rows) if self.splices else torch.arange(0)
        at_BTD, clean = self._activations(rows, spliced)
        batches = {at: self.text.batch(rows, x_BTD, self._limit(at)) for at, x_BTD in at_BTD.items()}
        groups: dict[tuple[int, ...], _SplicedRows] = {}  # candidates that are spliced into the same rows
        for candidate in list(self.candidates):
            at = candidate.row.location
            seen, mine = candidate.seen(rows), candidate.spliced(rows, spliced)
            if not len(seen):
                continue
            batch = batches[at] if len(seen) == n_rows else batches[at].rows(seen)
            try:
                x_hat_BTD = _finite(candidate, candidate.observe(batch), self.text.first_row, rows)
            except RunError as failure:
                self._drop(candidate, failure)
                continue
            if clean is None or not len(mine):
                continue
            key = tuple(mine.tolist())
            if key not in groups:  # a share of the rows is copied, once
                groups[key] = _SplicedRows.of(batches, clean, spliced, mine)
            group = groups[key]
            part = group.batch(at)
            chosen = torch.searchsorted(seen, mine).to(x_hat_BTD.device)
            final_BTD = self._final(candidate, part, x_hat_BTD[chosen], group.clean)
            group.finals.append((candidate, final_BTD))
        for group in groups.values():
            self._losses(group)

    def _activations(self, rows: slice, spliced: Tensor) -> tuple[dict[Location, Tensor], CleanPass | None]:
        """The tensor [B, T, D] at every location, and the whole pass of the rows that are spliced, if there are any."""
        locations = sorted({candidate.row.location for candidate in self.candidates})
        if isinstance(self.model, StoredVectors):
            return self.model.of_rows(self.text, rows, locations), None
        untouched = self.untouched or Untouched(self.model, self.text, locations)
        return untouched.batch(rows, locations, spliced)

    def _limit(self, at: Location) -> float:
        return next(candidate.survey.norm_limit for candidate in self.candidates if candidate.row.location == at)

    def _final(self, candidate: Candidate, batch: TokenBatch, x_hat_BTD: Tensor, clean: CleanPass) -> Tensor | None:
        row = candidate.row
        if row.kind == "reference" and row.name == "zero_all" and row.location in self.uniform_at:
            return None
        name = row.name if row.kind == "reference" else ""
        assert isinstance(self.model, SplicedModel)  # noqa: S101 - there was a clean pass
        return self.model.spliced(row.location, spliced_in(name, batch, x_hat_BTD), batch.tokens_BT, clean)

    def _losses(self, group: _SplicedRows) -> None:
        batch = group.batch(group.finals[0][0].row.location)
        real_BT = batch.real_BT
        counted_BT, targets_BT = predictions(batch.tokens_BT, batch.documents_BT, real_BT)
        counted_N = counted_BT[real_BT]
        has_target_N = (torch.arange(real_BT.shape[1], device=real_BT.device) < real_BT.shape[1] - 1).expand_as(
            real_BT
        )[real_BT]
        states = [None if one is None else one[real_BT] for _, one in group.finals]
        final_ND = group.clean.final_BTD[real_BT]
        assert self.head is not None  # noqa: S101 - there was a clean pass
        ce_clean_N, losses = token_losses(self.head, final_ND, states, targets_BT[real_BT], self.buffers)
        units_N = batch.units_BT[real_BT][counted_N]
        for (candidate, _), (ce_N, kl_N) in zip(group.finals, losses, strict=True):
            inlier_N = group.batch(candidate.row.location).valid_BT[real_BT][counted_N]
            candidate.compat.add_losses(has_target_N, ce_clean_N, ce_N, kl_N)
            candidate.fidelity.add_losses(units_N, inlier_N, ce_clean_N[counted_N], ce_N[counted_N], kl_N[counted_N])

    def _drop(self, candidate: Candidate, failure: RunError) -> None:
        self.candidates.remove(candidate)
        path = candidate.row.facts.path if candidate.row.facts else candidate.row.name
        self.failures[candidate.key] = Failure(path=path, message=str(failure))


def _finite(candidate: Candidate, x_hat_BTD: Tensor, first: int, rows: slice) -> Tensor:
    if not torch.isfinite(x_hat_BTD).all():
        name, layer = candidate.row.name, candidate.row.location
        raise RunError(
            f"{name} gives NaN or infinity at layer {layer} in rows {first + rows.start} to {first + rows.stop - 1}: "
            "its weights do not fit"
        )
    return x_hat_BTD
