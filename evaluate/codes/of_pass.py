"""The codes of one SAE as an evaluation's pass over the text computes them, taken in beside what measures.

Shapes: B rows, T positions, N = B·T tokens, E entries: codes that are not zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...cache.format.layout import SPECIAL
from ..metrics.active_entries import ActiveEntries
from ..protocol import Findings, State, TokenBatch
from ..results import Definition
from .format import OUTLIER
from .writer import CodesWriter, Encoded, joined, worth_a_commit


class CodesOfPass:
    """An accumulator that measures nothing: it writes the codes of every batch, or holds them for a process that does.

    A worker's part of the text has no writer: its codes travel with its state to the process that merges, in the order
    of the text.
    """

    definitions: Mapping[str, Definition] = {}

    def __init__(self) -> None:
        self._parts: list[Encoded] = []
        self._writer: CodesWriter | None = None

    def write_to(self, writer: CodesWriter) -> None:
        """Where what is taken in from now on goes; whoever opened the writer releases it."""
        self._writer = writer

    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:  # noqa: ARG002 - for all
        """Take one batch in."""
        order = torch.argsort(active.token_E, stable=True)  # the entries of a token stay in the order of the features
        flags_BT = torch.where(batch.valid_BT, 0, torch.where(batch.real_BT, OUTLIER, SPECIAL))
        text = {
            "tokens": batch.tokens_BT.cpu().numpy().astype(np.int32),
            "documents": batch.documents_BT.cpu().numpy().astype(np.int32),
            "flags": flags_BT.cpu().numpy().astype(np.uint8),
        }
        count_N = torch.bincount(active.token_E, minlength=active.n_tokens).cpu().numpy()
        feature_E = active.feature_E[order].cpu().numpy().astype(np.int32)
        value_E = active.value_E[order].cpu().numpy().astype(np.float32)  # which they were
        self._take((text, count_N, feature_E, value_E))

    def _take(self, part: Encoded) -> None:
        self._parts.append(part)
        if self._writer is not None and worth_a_commit(self._parts):
            self._write(self._writer)

    def _write(self, writer: CodesWriter) -> None:
        if self._parts:
            writer.append(*joined(self._parts))
            self._parts = []

    def state(self) -> State:
        """The codes of its rows."""
        text, count_N, feature_E, value_E = joined(self._parts)
        return {"text": text, "count": count_N, "feature": feature_E, "value": value_E}

    def merge(self, later: State) -> None:
        """Take in the codes of the rows behind its own."""
        self._take((later["text"], later["count"], later["feature"], later["value"]))

    def result(self) -> Findings:
        """All rows were seen: what is left is written, and the codes are finished."""
        if self._writer is not None:
            self._write(self._writer)
            self._writer.finish()
        return Findings()
