"""Batches with features that tests choose: rows, documents and excluded tokens at random, or features of known
behaviour.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tcsae.evaluate.protocol import TokenBatch, UnitSums


def fake_sae(n_features: int, d_model: int = 4, seed: int = 0):
    """Weights only: the metrics ask nothing else of an SAE."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(n_features, d_model, generator=generator)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    return SimpleNamespace(
        W_dec=W_dec, W_enc=W_dec.T.clone(), b_dec=torch.zeros(d_model), d_model=d_model, n_features=n_features
    )


def batch_of(
    z_BTF,
    *,
    x_BTD=None,
    valid_BT=None,
    documents_BT=None,
    units_BT=None,
    tokens_BT=None,
    labels_BT=None,
    classes_BT=None,
    first_row: int = 0,
    d_model: int = 4,
):
    """A TokenBatch around features: one document and unit per row, position 0 special, unless said otherwise."""
    rows, context = z_BTF.shape[:2]
    row_B = torch.arange(first_row, first_row + rows)
    if valid_BT is None:
        valid_BT = torch.ones(rows, context, dtype=torch.bool)
        valid_BT[:, 0] = False
    by_row = row_B[:, None].expand(rows, context).clone()
    if x_BTD is None:
        x_BTD = torch.randn(rows, context, d_model, generator=torch.Generator().manual_seed(first_row))
    return TokenBatch(
        x_BTD=x_BTD,
        tokens_BT=torch.zeros(rows, context, dtype=torch.int64) if tokens_BT is None else tokens_BT,
        documents_BT=by_row if documents_BT is None else documents_BT,
        units_BT=by_row if units_BT is None else units_BT,
        valid_BT=valid_BT,
        real_BT=valid_BT,
        rows_B=row_B,
        labels_BT=torch.full_like(by_row, -1) if labels_BT is None else labels_BT,
        classes_BT=torch.full_like(by_row, -1) if classes_BT is None else classes_BT,
    )


def random_world(seed: int, *, rows: int = 3, context: int = 7, features: int = 4, density: float = 0.5):
    """A small batch with everything in it: gaps, several documents in a row, empty rows, integer values that repeat."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(1, 5, (rows, context, features), generator=generator).float()
    z = z * (torch.rand(rows, context, features, generator=generator) < density)
    valid = torch.rand(rows, context, generator=generator) < 0.8
    documents = (
        torch.cumsum(torch.rand(rows, context, generator=generator) < 0.15, 1) + 10 * torch.arange(rows)[:, None]
    )
    units = documents % 7
    return z, batch_of(z, valid_BT=valid, documents_BT=documents, units_BT=units)


def value(sums: UnitSums) -> float:
    """What the driver makes of a ratio of sums."""
    bottom = sums.denominator_U.sum()
    return sums.offset + sums.scale * sums.numerator_U.sum() / bottom if bottom else float("nan")
