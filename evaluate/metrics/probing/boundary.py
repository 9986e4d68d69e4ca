"""Where one document ends and another begins: does the change of the code show the seam?

Shapes: R rows, T positions, D model width, F features.

The first part of a row of one document is followed by the rest of a row of another, cut at the same random place, so
that every token keeps its position. The row is run as if it were one document; no coder is told of the seam. Between
neighbours the code changes by 1 − cosine(z_t, z_t+1). The score of a row is the area under the ROC curve: the share of
its other changes that are smaller than that at the seam.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ....train.sae.protocol import RowTokens, SparseCoder
from ...model.heldout_text import HeldOutText, spread_over_documents
from ...protocol import Findings, SumsByUnit
from ...results import Definition
from ..registry import metric

ROWS = 128
_AT_ONCE = 8  # rows that are encoded together
_MARGIN = 0.25  # share of the row on either side where no seam lies

_AUC = (
    "share of a row's changes 1 − cosine(z_t, z_t+1) that are smaller than that at its seam, half of those that are "
    f"equal (the area under the ROC curve), mean over at most {ROWS} rows that begin in one document and end in "
    "another; 0.5 is chance. Tokens whose code is zero are left out"
)

DEFINITIONS = {
    "boundary": Definition(text=_AUC, unit="share", better="higher", label="seam found", group="probes"),
    "boundary_control": Definition(
        text="boundary of the rows before they were spliced, at the same places: a live control, which must be at "
        "chance, 0.5",
        unit="share",
        label="seam found, no seam",
    ),
    "boundary_activation": Definition(
        text="boundary of the raw activations, centred on their mean: for comparison, no ceiling (cosines of sparse "
        "codes may show a seam better)",
        unit="share",
        better="higher",
        label="seam found, raw activations",
    ),
}


class SpliceContext(Protocol):
    """What is asked for: see ``probes.ProbeContext``."""

    sae: SparseCoder
    seed: int
    norm_limit: float

    @property
    def text(self) -> HeldOutText:
        """All rows that are evaluated on."""
        ...

    def run_rows(self, tokens_BT: Tensor) -> Tensor:
        """The tensor [B, T, D] that the SAE reconstructs."""
        ...


@metric("boundary", over="model", definitions=DEFINITIONS)
@torch.no_grad()
def boundary(context: SpliceContext) -> Findings:
    """Run rows as they are and spliced, and look for the seams."""
    text = context.text
    chosen_R, other_R = plan_splices(text, context.seed)
    if not len(chosen_R):
        return Findings(notes=["no seams to find: the rows evaluated on hold fewer than two documents"])
    span = text.context
    generator = np.random.default_rng(context.seed + 1)
    seam_R = generator.integers(int(span * _MARGIN), int(span * (1 - _MARGIN)), len(chosen_R), endpoint=True)
    plain_RT = text.tokens_RT[chosen_R]
    spliced_RT = np.where(np.arange(span) < seam_R[:, None], plain_RT, text.tokens_RT[other_R])
    real_RT = text.real_RT[chosen_R] & text.real_RT[other_R]
    unit_R = text.units_RT[chosen_R, seam_R - 1]
    pieces = [slice(start, start + _AT_ONCE) for start in range(0, len(chosen_R), _AT_ONCE)]

    def run(tokens_RT: np.ndarray, part: slice) -> tuple[Tensor, Tensor]:
        x_RTD = context.run_rows(torch.from_numpy(tokens_RT[part].astype(np.int64))).float()
        real = torch.from_numpy(real_RT[part]).to(x_RTD.device)
        return x_RTD, real & (x_RTD.norm(dim=2) <= context.norm_limit)

    mean_D = _mean(run(spliced_RT, part) for part in pieces)
    sums = SumsByUnit()
    for part in pieces:
        units, seams = torch.from_numpy(unit_R[part]), torch.from_numpy(seam_R[part])
        for name, tokens_RT in (("boundary", spliced_RT), ("boundary_control", plain_RT)):
            x_RTD, valid_RT = run(tokens_RT, part)
            z_RTF = context.sae.on_rows(x_RTD, RowTokens.of(valid_RT, torch.zeros_like(valid_RT).long())).features
            _add(sums, name, units, auc_of_seams(z_RTF, valid_RT, seams))
            if name == "boundary":
                _add(sums, "boundary_activation", units, auc_of_seams(x_RTD - mean_D, valid_RT, seams))
    return Findings(sums={key: replace(sums.ratio(key, f"{key}_n", "share"), definition=key) for key in DEFINITIONS})


def _mean(pieces: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Of the activations that count."""
    totals = [(x_RTD[valid_RT].double().sum(0), int(valid_RT.sum())) for x_RTD, valid_RT in pieces]
    return (torch.stack([total for total, _ in totals]).sum(0) / max(1, sum(count for _, count in totals))).float()


def _add(sums: SumsByUnit, name: str, unit_R: Tensor, auc_R: Tensor) -> None:
    defined = torch.isfinite(auc_R.cpu())
    found_R = auc_R.cpu()[defined]
    sums.add(unit_R[defined], **{name: found_R, f"{name}_n": torch.ones_like(found_R)})


def plan_splices(text: HeldOutText, seed: int, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one document each, spread over the documents, and for each a row of another document; both int64 [R]."""
    documents_RT = np.where(text.real_RT, text.documents_RT, text.documents_RT[:, -1:])
    whole = np.flatnonzero((documents_RT == documents_RT[:, -1:]).all(1))
    document = text.documents_RT[whole, -1]
    if len(np.unique(document)) < 2:
        return whole[:0], whole[:0]
    generator = np.random.default_rng(seed)
    chosen = spread_over_documents(document, rows)
    other = [generator.choice(whole[document != document[at]]) for at in chosen]
    return whole[chosen], np.array(other, dtype=np.int64)


def auc_of_seams(z_RTX: Tensor, valid_RT: Tensor, seam_R: Tensor) -> Tensor:
    """The share of each row's other changes below that between ``seam`` − 1 and ``seam``, ties half: float64 [R].

    NaN where a code at the seam is zero or does not count, and where there is no other change.
    """
    size_RT = z_RTX.norm(dim=2).double()
    counts_RT = valid_RT & (size_RT > 0)
    dot_RT = (z_RTX[:, 1:] * z_RTX[:, :-1]).sum(2).double()
    change_RT = 1 - dot_RT / (size_RT[:, 1:] * size_RT[:, :-1])
    pair_RT = counts_RT[:, 1:] & counts_RT[:, :-1]
    at_R1 = (seam_R.to(change_RT.device) - 1)[:, None]
    there_R1 = change_RT.gather(1, at_R1)
    others_RT = pair_RT.scatter(1, at_R1, False)
    below_RT = (change_RT < there_R1).double() + 0.5 * (change_RT == there_R1).double()
    share_R = torch.where(others_RT, below_RT, 0.0).sum(1) / others_RT.sum(1)
    return torch.where(pair_RT.gather(1, at_R1)[:, 0], share_R, torch.nan)
