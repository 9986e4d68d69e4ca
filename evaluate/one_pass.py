"""One pass over the text for many rows of the table at once.

Per batch: the model runs once as it is; every candidate gives a reconstruction of the tensor at its location; the
layers above run once per candidate, for the rows that are spliced; and the head runs over some tokens at a time, their
clean logits computed once for all.

Shapes: B rows, T positions, D model width, N positions whose input counts.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from .protocol import TokenBatch
from .results import Failure
from .table_row import Candidate


@dataclass
class Measurement:
    """The model, the text and the candidates of one pass. A candidate that fails is left out, the others go on."""

    model: SplicedModel
    head: Head
    text: HeldOutText
    candidates: list[Candidate]
    uniform_at: frozenset[Location] = frozenset()
    """Where zero at every position ends in logits that are all zero."""
    failures: list[Failure] = field(default_factory=list)
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
        tokens_BT = self.text.tokens(rows, self.model.lm.device)
        spliced = self.text.spliced(rows).to(tokens_BT.device)  # an index elsewhere would make the GPU wait
        at_BTD, clean = self._activations(tokens_BT, spliced)
        batches = {at: self.text.batch(rows, x_BTD, self._limit(at)) for at, x_BTD in at_BTD.items()}
        parts = {at: batch if clean is None else batch.rows(spliced) for at, batch in batches.items()}
        finals: list[tuple[Candidate, Tensor | None]] = []
        for candidate in list(self.candidates):
            at = candidate.row.location
            try:
                x_hat_BTD = _finite(candidate, candidate.observe(batches[at]), rows)
            except RunError as failure:
                self._drop(candidate, failure)
                continue
            if clean is not None and not self._shares_splice(candidate):
                finals.append((candidate, self._final(candidate, parts[at], x_hat_BTD[spliced], clean)))
        if clean is not None:
            self._losses(parts, clean.final_BTD, finals)

    def _activations(self, tokens_BT: Tensor, spliced: Tensor) -> tuple[dict[Location, Tensor], CleanPass | None]:
        """The tensor [B, T, D] at every location, and the whole pass of the rows that are spliced, if there are any."""
        locations = sorted({candidate.row.location for candidate in self.candidates})
        if not len(spliced):
            return self.model.activations(tokens_BT, locations), None
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

    def _limit(self, at: Location) -> float:
        return next(candidate.survey.norm_limit for candidate in self.candidates if candidate.row.location == at)

    def _final(self, candidate: Candidate, batch: TokenBatch, x_hat_BTD: Tensor, clean: CleanPass) -> Tensor | None:
        row = candidate.row
        if row.kind == "reference" and row.name == "zero_all" and row.location in self.uniform_at:
            return None
        name = row.name if row.kind == "reference" else ""
        return self.model.spliced(row.location, spliced_in(name, batch, x_hat_BTD), batch.tokens_BT, clean)

    def _losses(
        self, batches: dict[Location, TokenBatch], final_BTD: Tensor, finals: Sequence[tuple[Candidate, Tensor | None]]
    ) -> None:
        batch = next(iter(batches.values()))
        real_BT = batch.real_BT
        counted_BT, targets_BT = predictions(batch.tokens_BT, batch.documents_BT, real_BT)
        counted_N = counted_BT[real_BT]
        has_target_N = (torch.arange(real_BT.shape[1], device=real_BT.device) < real_BT.shape[1] - 1).expand_as(
            real_BT
        )[real_BT]
        states = [None if one is None else one[real_BT] for _, one in finals]
        ce_clean_N, losses = token_losses(self.head, final_BTD[real_BT], states, targets_BT[real_BT], self.buffers)
        units_N = batch.units_BT[real_BT][counted_N]
        for (candidate, _), (ce_N, kl_N) in zip(finals, losses, strict=True):
            inlier_N = batches[candidate.row.location].valid_BT[real_BT][counted_N]
            for one in [candidate, *self._sharers(candidate)]:
                one.compat.add_losses(has_target_N, ce_clean_N, ce_N, kl_N)
                one.fidelity.add_losses(units_N, inlier_N, ce_clean_N[counted_N], ce_N[counted_N], kl_N[counted_N])

    def _shares_splice(self, candidate: Candidate) -> bool:
        """Whether another candidate of this pass splices the same tensor."""
        return candidate.shares is not None and any(
            other.row.kind == "reference"
            and (other.row.location, other.row.name) == (candidate.row.location, candidate.shares)
            for other in self.candidates
        )

    def _sharers(self, candidate: Candidate) -> list[Candidate]:
        if candidate.row.kind != "reference":
            return []
        return [
            other
            for other in self.candidates
            if other.row.location == candidate.row.location and other.shares == candidate.row.name
        ]

    def _drop(self, candidate: Candidate, failure: RunError) -> None:
        self.candidates.remove(candidate)
        path = candidate.row.facts.path if candidate.row.facts else candidate.row.name
        self.failures.append(Failure(path=path, message=str(failure)))


def _finite(candidate: Candidate, x_hat_BTD: Tensor, rows: slice) -> Tensor:
    if not torch.isfinite(x_hat_BTD).all():
        name, layer = candidate.row.name, candidate.row.location
        raise RunError(
            f"{name} gives NaN or infinity at layer {layer} in rows {rows.start} to {rows.stop - 1}: its weights do "
            "not fit"
        )
    return x_hat_BTD
