"""Codes pooled over a passage: the mean over the tokens of a row that count, as if the row were one token.

Shapes: B rows, T positions, E active entries.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...protocol import TokenBatch
from ..active_entries import ActiveEntries

MIN_TOKENS = 8
"""Tokens that count, from which a row is a passage."""


def pooled(batch: TokenBatch, active: ActiveEntries) -> tuple[TokenBatch, ActiveEntries]:
    """The same batch with one token per row: its mean code and activation. Rows that mix documents do not count."""
    valid_BT = batch.valid_BT
    first_B1 = valid_BT.int().argmax(1, keepdim=True)
    counted_B = valid_BT.sum(1)
    one_document_B = ((batch.documents_BT == batch.documents_BT.gather(1, first_B1)) | ~valid_BT).all(1)
    passage_B1 = ((counted_B >= MIN_TOKENS) & one_document_B)[:, None]
    weight_BT = valid_BT / counted_B.clamp(min=1)[:, None]
    names = ("tokens_BT", "documents_BT", "units_BT", "labels_BT", "classes_BT")
    shorter = replace(
        batch,
        x_BTD=torch.einsum("btd,bt->bd", batch.x_BTD, weight_BT)[:, None],
        valid_BT=passage_B1,
        real_BT=passage_B1,
        **{name: getattr(batch, name).gather(1, first_B1) for name in names},
    )
    # Entries are sorted by feature, then token: those of a feature in a row stand together.
    rows = active.n_rows
    place, at_E = torch.unique_consecutive(active.feature_E * rows + active.rows(), return_inverse=True)
    value = torch.zeros(len(place), dtype=torch.float64, device=place.device).index_add_(0, at_E, active.value_E)
    row, feature = place % rows, place // rows
    keep = passage_B1[row, 0]
    row, feature, value = row[keep], feature[keep], (value / counted_B[row].clamp(min=1))[keep]
    nothing = active.z_BTF.new_zeros(rows, 1, 0)
    return shorter, ActiveEntries(nothing, rows, 1, active.n_features, passage_B1[:, 0], feature, row, value)
