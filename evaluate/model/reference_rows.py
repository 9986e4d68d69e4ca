"""The rows that give numbers meaning: what happens to the model when a layer's output is replaced by something simple.

Special positions and padding keep their original activation in every splice except ``zero_all``.

Shapes: B rows, T positions, D model width, F features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...train.config import SAEConfig
from ...train.sae.activation import Activation
from ...train.sae.temporal_sae import TemporalSAE
from ..protocol import TokenBatch
from .heldout_text import HeldOutText, spread_over_documents

WHAT = {
    "identity_bf16": "the activation itself, rounded to bfloat16: the noise floor",
    "zero_all": "zero at every position, BOS included: uniform logits and CE = ln V on models without biases",
    "zero": "zero at every position but the special ones",
    "mean": "the mean activation at every position but the special ones",
    "previous_token": "the activation one position earlier; the mean where there is none in the same document",
    "untrained": "an SAE as wide as the model, at initialisation: Kaiming-uniform encoder, "
    "orthogonal decoder, no biases",
    "zero_sae": "an SAE whose weights are all zero: the row of zero with an L0 of 0",
}
SHARE, QUICK_SHARE = 0.25, 0.125
"""Of the rows: what references that only give meaning are spliced into (``identity_bf16``), or see at all
(``untrained``); and at a first look (``--quick``), what all references are spliced into."""
LEAST_ROWS, LEAST_QUICK_ROWS = 64, 8
"""The fewest rows that such a share has."""


def share_of(text: HeldOutText, *, quick: bool = False) -> np.ndarray | None:
    """Which rows the share is, bool [R]; None where it is all of them.

    It is made of whole units of text, spread evenly over the documents, so that sums per unit can be compared with
    those of rows that were measured on all of the text.
    """
    n_rows, n_units = len(text), len(text.unit_documents)
    share, least = (QUICK_SHARE, LEAST_QUICK_ROWS) if quick else (SHARE, LEAST_ROWS)
    wanted = max(least, round(share * n_rows))
    chosen = spread_over_documents(text.unit_documents, max(1, round(wanted / n_rows * n_units)))
    chosen_U = np.isin(np.arange(n_units), chosen)
    share_R: np.ndarray = np.zeros(n_rows, dtype=bool)
    while True:  # a row may hold parts of several units, and a unit parts of several rows
        more_R = np.any(chosen_U[text.units_RT], axis=1)
        if 2 * int(more_R.sum()) > n_rows:
            return None
        if np.array_equal(more_R, share_R):
            return share_R
        share_R = more_R
        chosen_U[text.units_RT[share_R]] = True


def replacement(name: str, batch: TokenBatch, mean_D: Tensor) -> Tensor:
    """What a reference without features puts in place of x [B, T, D]."""
    x_BTD = batch.x_BTD
    if name == "identity_bf16":
        return x_BTD.bfloat16().float()
    if name in ("zero", "zero_all"):
        return torch.zeros_like(x_BTD)
    if name == "mean":
        return mean_D.expand_as(x_BTD)
    if name == "previous_token":
        has_previous_BT = torch.zeros_like(batch.real_BT)
        same_BT = batch.documents_BT[:, 1:] == batch.documents_BT[:, :-1]
        has_previous_BT[:, 1:] = batch.real_BT[:, :-1] & same_BT
        return torch.where(has_previous_BT[..., None], x_BTD.roll(1, dims=1), mean_D)
    raise KeyError(name)


def spliced_in(name: str, batch: TokenBatch, x_hat_BTD: Tensor) -> Tensor:
    """The residual stream [B, T, D] that goes on: the replacement, with special positions and padding untouched."""
    if name == "zero_all":
        return x_hat_BTD
    return torch.where(batch.real_BT[..., None], x_hat_BTD, batch.x_BTD)


def untrained_sae(d_model: int, seed: int) -> TemporalSAE:
    """The paper's initial state with as many features as dimensions: half of the features fire on anything."""
    sae = TemporalSAE(d_model, d_model, Activation("relu"))
    sae.initialise(SAEConfig(initial="paper", decoder="free", b_dec="zero"), seed)
    return sae.eval()
