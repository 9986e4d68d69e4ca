"""Whom the controls compare a token with: flat indices into the batch, drawn anew for every step from its number alone.

The pairing differs from the real one in one thing only. ``other_document``: everything about the text.
``same_document``: only the distance. ``shuffled``: the order of the tokens of a stretch of one document. The latter two
need windows 2i and 2i + 1 of a batch to be siblings, from one document and row.

Shapes: N windows, W positions; P = W − 1 pairs per window, as many as there are neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Partner

NEED_SIBLINGS = ("same_document", "shuffled")
_TRIES = 8


def draw_partners(kind: Partner, documents_N: Tensor, window: int, *, seed: int, step: int) -> Tensor | None:
    """Partner of the tokens 0 … W−2 of every window, [N, W−1], −1 where there is none; None for neighbours.

    Args:
        kind: as in the configuration.
        documents_N: document of every window.
        window: W.
        seed: of the data order.
        step: of the run; the same seed and step give the same partners.

    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 62))
    if kind == "other_document":
        return _other_document(documents_N, window, generator)
    if kind == "same_document":
        return _siblings(len(documents_N), window, generator)
    if kind == "shuffled":
        return _shuffled(len(documents_N), window, generator)
    return None


def _other_document(documents_N: Tensor, window: int, generator: torch.Generator) -> Tensor:
    n, shape = len(documents_N), (len(documents_N), window - 1)
    chosen = torch.full(shape, -1)
    for _ in range(_TRIES):
        drawn = torch.randint(n, shape, generator=generator)
        fits = (chosen < 0) & (documents_N[drawn] != documents_N[:, None])
        chosen = torch.where(fits, drawn, chosen)
    position = torch.randint(window, shape, generator=generator)
    return torch.where(chosen >= 0, chosen * window + position, -1)


def _siblings(n: int, window: int, generator: torch.Generator) -> Tensor:
    sibling_N = torch.arange(n) ^ 1
    position = torch.randint(window, (n, window - 1), generator=generator)
    return torch.where(sibling_N[:, None] < n, sibling_N[:, None] * window + position, -1)


def _shuffled(n: int, window: int, generator: torch.Generator) -> Tensor:
    """The next token in a random order of the 2W tokens of a window and its sibling."""
    stretch, pairs = 2 * window, n // 2
    order = torch.rand(pairs, stretch, generator=generator).argsort(dim=-1)
    following = torch.empty_like(order).scatter(1, order, order.roll(-1, dims=1))
    flat = following + torch.arange(pairs)[:, None] * stretch
    whole = torch.full((n, window), -1)
    whole[: 2 * pairs] = flat.reshape(2 * pairs, window)
    return whole[:, :-1]
