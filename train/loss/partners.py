"""Whom the controls compare a token with: flat indices into the batch, drawn anew for every step from its number alone.

The pairing differs from the real one in one thing only. ``other_document``: everything about the text.
``same_document``: only the distance. ``shuffled``: the order of the tokens of a row. The latter two need windows of one
row and document side by side (siblings): windows K·i … K·i + K − 1 of a batch are a stretch.

Shapes: N windows, W positions; P = W − 1 pairs per window, as many as there are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .registry import PARTNERS, partner

_TRIES = 8


@dataclass(frozen=True)
class Batch:
    """What a partner may know of a batch of windows; all tensors on the CPU."""

    documents_N: Tensor  # document of every window
    rows_N: Tensor  # its row of the store
    starts_N: Tensor  # position of its first token in that row
    window: int  # W
    generator: torch.Generator
    siblings: int = 1  # K, windows of a stretch


def draw_partners(kind: str, batch: Batch) -> Tensor | None:
    """Partner of the tokens 0 … W−2 of every window, [N, W−1], −1 where there is none; None for neighbours."""
    return PARTNERS.get(kind).draw(batch)


def generator_of(seed: int, step: int) -> torch.Generator:
    """What the partners of a step are drawn from: the same for the same data order and step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 62))


def neighbours_in_rows(valid_NT: Tensor, documents_NT: Tensor, lag: int) -> Tensor:
    """Partner of the tokens 0 … T−2 of whole rows: the token ``lag`` further on, if both and all between them count and
    are of one document, as in a window.
    """
    n, t = valid_NT.shape
    at = torch.arange(n * t).view(n, t)
    joined = valid_NT[:, : t - lag] & (documents_NT[:, : t - lag] == documents_NT[:, lag:])
    for further in range(1, lag + 1):
        joined &= valid_NT[:, further : t - lag + further]
    found = torch.full((n, t), -1)
    found[:, : t - lag] = torch.where(joined, at[:, lag:], -1)
    return found[:, :-1]


@partner("next", drawn=False)
def _next(batch: Batch) -> None:
    """The next token: no control."""


@partner("lag", drawn=False)
def _lag(batch: Batch) -> None:
    """The token ``temporal.lag`` further on in the window."""


@partner("earlier", drawn=False, pairs=True)
def _earlier(batch: Batch) -> None:
    """An earlier token of the row and document: the other one of the pair."""


@partner("l2", drawn=False, form="squared_norms")
def _l2(batch: Batch) -> None:
    """The next token, but the term is pairwise without its cross term: only shrinking earns anything."""


@partner("other_document")
def _other_document(batch: Batch) -> Tensor:
    """A token of another document."""
    n, shape = len(batch.documents_N), (len(batch.documents_N), batch.window - 1)
    chosen = torch.full(shape, -1)
    for _ in range(_TRIES):
        drawn = torch.randint(n, shape, generator=batch.generator)
        fits = (chosen < 0) & (batch.documents_N[drawn] != batch.documents_N[:, None])
        chosen = torch.where(fits, drawn, chosen)
    position = torch.randint(batch.window, shape, generator=batch.generator)
    return torch.where(chosen >= 0, chosen * batch.window + position, -1)


@partner("same_document", siblings=2)
def _same_document(batch: Batch) -> Tensor:
    """A token of another window of the stretch."""
    n, w, k = len(batch.documents_N), batch.window, batch.siblings
    place_N = torch.arange(n) % k
    another = torch.randint(k - 1, (n, w - 1), generator=batch.generator)
    another += another >= place_N[:, None]
    position = torch.randint(w, (n, w - 1), generator=batch.generator)
    window = (torch.arange(n) - place_N)[:, None] + another
    return torch.where(torch.arange(n)[:, None] < n // k * k, window * w + position, -1)


@partner("shuffled", siblings=8)
def _shuffled(batch: Batch) -> Tensor:
    """The next token in a random order of the K·W tokens of a stretch; one that is a true neighbour is drawn anew."""
    n, w, k = len(batch.documents_N), batch.window, batch.siblings
    stretches, stretch = n // k, k * w
    order = torch.rand(stretches, stretch, generator=batch.generator).argsort(dim=-1)
    following = torch.empty_like(order).scatter(1, order, order.roll(-1, dims=1))
    position = (batch.starts_N[: stretches * k, None] + torch.arange(w)).view(stretches, stretch)
    for _ in range(_TRIES):
        bad = (position.gather(1, following) - position).abs() <= 1
        again = torch.randint(stretch, bad.shape, generator=batch.generator)
        following = torch.where(bad, again, following)
    bad = (position.gather(1, following) - position).abs() <= 1
    flat = torch.where(bad, -1, following + torch.arange(stretches)[:, None] * stretch)
    whole = torch.full((n, w), -1)
    whole[: stretches * k] = flat.view(-1, w)
    return whole[:, :-1]
