"""Views: what a pool of rows looks like to whoever trains on it, as windows, as pairs of tokens, or as whole rows.

All views of a pool give the same number of batches, as many as its usable tokens fill, and of about the same number of
tokens each; so a view's batches do not depend on which others share the pool. One that runs out of windows before is
cut again, elsewhere.

Shapes: R rows of a pool, T positions of a row, W positions of an item of a view (window, pair, row), N items, D model
width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..errors import UsageError
from .pools import Pool

_LEAST_PAST = 2  # usable tokens before a token, on average, for rows to be worth looking at whole


@dataclass(frozen=True)
class TokenBatch:
    """Items of one view. Every token of a window or pair is usable, and of the window's or pair's one document.

    Attributes:
        x_NWD: bfloat16 activations.
        documents_N: int64 document of every item; of a row, that of its first usable token.
        rows_N: int64 row of the store.
        positions_NW: int64 position of every token in its row.
        valid_NW: which tokens are usable, where not all of them are (rows).
        documents_NW: document of every token, where an item can have several (rows).

    """

    x_NWD: torch.Tensor
    documents_N: torch.Tensor
    rows_N: torch.Tensor
    positions_NW: torch.Tensor
    valid_NW: torch.Tensor | None = None
    documents_NW: torch.Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Usable tokens."""
        n, w = self.positions_NW.shape
        return n * w if self.valid_NW is None else int(self.valid_NW.sum())

    def part(self, share: slice) -> TokenBatch:
        """Some of the items."""
        rest = (None if each is None else each[share] for each in (self.valid_NW, self.documents_NW))
        return TokenBatch(
            self.x_NWD[share], self.documents_N[share], self.rows_N[share], self.positions_NW[share], *rest
        )


@dataclass(frozen=True)
class Cut:
    """A pool's items in the order in which they are given: batch b holds ``bounds[b]`` … ``bounds[b + 1]``."""

    local_N: np.ndarray  # row of the pool
    start_N: np.ndarray  # position of the first token in its row
    offsets_NW: np.ndarray  # of every token from the first; [1, W] where they are the same for all items
    bounds: np.ndarray


class View(ABC):
    """A way to look at a pool. Equal views give equal batches."""

    together: int = 1
    """So many items side by side belong together."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For messages, and to tell one view from another."""

    @abstractmethod
    def tokens_per_batch(self, budget: int) -> int:
        """Tokens of a batch that may hold ``budget`` of them; exact where items are of one length, else on average."""

    @abstractmethod
    def describe(self, budget: int) -> str:
        """What a batch of that budget holds, in words."""

    @abstractmethod
    def check(self, context: int, budget: int) -> None:
        """Whether there can be such items.

        Raises:
            UsageError: rows of ``context`` positions or batches of ``budget`` tokens hold none.

        """

    @abstractmethod
    def cut(self, pool: Pool, n_batches: int, budget: int, rng: np.random.Generator) -> Cut:
        """Items for ``n_batches`` batches of at most ``budget`` tokens.

        Raises:
            UsageError: the pool holds no such item.

        """

    def gather(self, pool: Pool, cut: Cut, batch: int, *, pin_memory: bool = False) -> TokenBatch:
        """One batch, copied out of the pool."""
        chosen = slice(cut.bounds[batch], cut.bounds[batch + 1])
        offsets_NW = cut.offsets_NW if len(cut.offsets_NW) == 1 else cut.offsets_NW[chosen]
        local_N, positions_NW = cut.local_N[chosen], cut.start_N[chosen, None] + offsets_NW
        index_NW = torch.from_numpy(pool.places_R[local_N, None] * pool.context + positions_NW)
        x_NWD = take_rows(pool.x_ND, index_NW.flatten(), pin_memory=pin_memory).unflatten(0, index_NW.shape)
        documents_N = pool.documents_RT[local_N, positions_NW[:, 0]].astype(np.int64)
        rows_N = pool.rows_R[local_N].astype(np.int64)
        return TokenBatch(x_NWD, *map(torch.from_numpy, (documents_N, rows_N, positions_NW)))


@dataclass(frozen=True)
class Windows(View):
    """Windows of ``window`` consecutive tokens; every ``together`` of them side by side are of one row and document.

    Every run of usable tokens is cut from a random offset, and the windows of all runs are shuffled together, so that a
    token is seen at most once before the pool's windows are used up.
    """

    window: int
    together: int = 1

    @property
    def name(self) -> str:
        """See :class:`View`."""
        return f"windows of {self.window}" + (f", {self.together} together" if self.together > 1 else "")

    def tokens_per_batch(self, budget: int) -> int:
        """See :class:`View`."""
        unit = self.window * self.together
        return budget // unit * unit

    def describe(self, budget: int) -> str:
        """See :class:`View`."""
        return f"{self.tokens_per_batch(budget) // self.window} {self.name}"

    def check(self, context: int, budget: int) -> None:
        """See :class:`View`."""
        if not 1 <= self.window <= context or budget < self.window * self.together:
            sizes = f"windows of {self.window} tokens in batches of {budget}"
            raise UsageError(
                f"{sizes}: the store's rows have {context} positions, and a batch takes at least one window"
            )

    def cut(self, pool: Pool, n_batches: int, budget: int, rng: np.random.Generator) -> Cut:
        """See :class:`View`."""
        size = self.tokens_per_batch(budget) // self.window

        def once() -> np.ndarray:
            at, _ = cut_windows(pool.usable_RT, pool.documents_RT, self.window, rng)
            return shuffle_windows(at, pool.documents_RT, self.together, rng)[0]

        at = _enough(once, n_batches * size)
        if at is None:
            raise UsageError(
                f"a pool of the store holds no {self.window * self.together} consecutive tokens of one document, "
                "without special ones and those over the norm limit: give a smaller --window"
            )
        return Cut(*np.divmod(at, pool.context), np.arange(self.window)[None], np.arange(n_batches + 1) * size)


@dataclass(frozen=True)
class Pairs(View):
    """Pairs of a token and an earlier one of its row and document: [earlier, token].

    ``draw`` ``token``: every token once, in random order; the earlier one is drawn for each among all usable ones
    before it. ``batch``: one position of the earlier token for all pairs of a batch, as Temporal SAE was published
    (arXiv 2511.05541), and tokens from anywhere behind it.
    """

    draw: Literal["token", "batch"] = "token"

    @property
    def name(self) -> str:
        """See :class:`View`."""
        return "pairs" + (" of one earlier position per batch" if self.draw == "batch" else "")

    def tokens_per_batch(self, budget: int) -> int:
        """See :class:`View`."""
        return budget // 2 * 2

    def describe(self, budget: int) -> str:
        """See :class:`View`."""
        return f"{budget // 2} {self.name}"

    def check(self, context: int, budget: int) -> None:
        """See :class:`View`."""
        if context < 2 or budget < 2:
            raise UsageError(f"rows of {context} positions and batches of {budget} tokens hold no pair of tokens")

    def cut(self, pool: Pool, n_batches: int, budget: int, rng: np.random.Generator) -> Cut:
        """See :class:`View`."""
        size = budget // 2
        if self.draw == "batch":
            return self._by_batch(pool, n_batches, size, rng)
        found = _enough(lambda: draw_pairs(pool.usable_RT, pool.documents_RT, rng), n_batches * size)
        if found is None:
            raise _no_pair()
        return _pairs_cut(found, pool.context, np.arange(n_batches + 1) * size)

    def _by_batch(self, pool: Pool, n_batches: int, size: int, rng: np.random.Generator) -> Cut:
        batches = [self._from_one_source(pool, size, rng) for _ in range(n_batches)]
        found = np.concatenate(batches) if batches else np.empty((0, 2), np.int64)
        return _pairs_cut(found, pool.context, np.arange(n_batches + 1) * size)

    def _from_one_source(self, pool: Pool, size: int, rng: np.random.Generator) -> np.ndarray:
        for source in rng.permutation(pool.context - 1):
            documents_R = pool.documents_RT[:, source]
            later_RT = pool.usable_RT[:, source + 1 :] & (pool.documents_RT[:, source + 1 :] == documents_R[:, None])
            row, after = (later_RT & pool.usable_RT[:, source, None]).nonzero()
            if len(row):
                rounds = [rng.permutation(len(row)) for _ in range(-(-size // len(row)))]
                chosen = np.concatenate(rounds)[:size]
                at = row[chosen] * pool.context + source
                return np.stack([at, at + 1 + after[chosen]], axis=1)
        raise _no_pair()


@dataclass(frozen=True)
class Rows(View):
    """Whole rows in order, with the mask of usable tokens and every token's document; every row once an epoch.

    A pool's rows are dealt to its batches as evenly as they go, so that batches differ by at most one row.
    """

    @property
    def name(self) -> str:
        """See :class:`View`."""
        return "rows"

    def tokens_per_batch(self, budget: int) -> int:
        """See :class:`View`."""
        return budget

    def describe(self, budget: int) -> str:  # noqa: ARG002 - how many rows that are depends on what they hold
        """See :class:`View`."""
        return "whole rows, on average"

    def check(self, context: int, budget: int) -> None:
        """See :class:`View`."""

    def cut(self, pool: Pool, n_batches: int, budget: int, rng: np.random.Generator) -> Cut:
        """See :class:`View`."""
        before_RT = _usable_before(pool.usable_RT, pool.documents_RT)
        past = float(before_RT[pool.usable_RT].mean()) if pool.n_tokens else 0.0
        if past < _LEAST_PAST:
            raise UsageError(
                f"in this store a token has {past:.1f} tokens of its document before it in its row on average, too few "
                "for what sees whole rows: extract longer documents, or with --packing document"
            )
        local_N = rng.permutation(np.flatnonzero(pool.usable_RT.any(1)))
        if len(local_N) < n_batches:
            raise UsageError(
                f"batches of {budget} tokens are less than a row of the store, which has {pool.context} positions: "
                "give a larger --batch-size"
            )
        bounds = len(local_N) * np.arange(n_batches + 1) // max(1, n_batches)
        return Cut(local_N, np.zeros_like(local_N), np.arange(pool.context)[None], bounds)

    def gather(self, pool: Pool, cut: Cut, batch: int, *, pin_memory: bool = False) -> TokenBatch:
        """See :class:`View`."""
        plain = super().gather(pool, cut, batch, pin_memory=pin_memory)
        local_N = cut.local_N[cut.bounds[batch] : cut.bounds[batch + 1]]
        valid_NW = torch.from_numpy(pool.usable_RT[local_N])
        documents_NW = torch.from_numpy(pool.documents_RT[local_N].astype(np.int64))
        first_N = valid_NW.int().argmax(1, keepdim=True)
        documents_N = documents_NW.gather(1, first_N).squeeze(1)
        return TokenBatch(plain.x_NWD, documents_N, plain.rows_N, plain.positions_NW, valid_NW, documents_NW)


def cut_windows(
    usable_RT: np.ndarray, documents_RT: np.ndarray, window: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Cut every run of usable tokens of one document in one row into windows, from a random offset.

    A run of n tokens gives n // window windows side by side; where among its n % window spare tokens they begin is
    uniform.

    Args:
        usable_RT: bool, rows × positions.
        documents_RT: document of every token.
        window: tokens per window.
        rng: decides the offsets.

    Returns:
        Flat index (row · T + position) of every window's first token, in order; and the usable tokens in no window.

    """
    first_RT = usable_RT.copy()
    first_RT[:, 1:] &= ~usable_RT[:, :-1] | (documents_RT[:, 1:] != documents_RT[:, :-1])
    begins = first_RT.reshape(-1).nonzero()[0]
    # A run's length: the usable tokens from its beginning to the next one's.
    before = np.concatenate([[0], np.cumsum(usable_RT.reshape(-1))])
    lengths = np.diff(np.append(before[begins], before[-1]))
    counts = lengths // window
    offsets = rng.integers(0, lengths % window + 1)
    at_run = np.repeat(begins + offsets, counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return at_run + within * window, int((lengths - counts * window).sum())


def shuffle_windows(
    at: np.ndarray, documents_RT: np.ndarray, together: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Put windows into random order, every ``together`` of them in a row from one row and document.

    Returns:
        Their first tokens in that order, and how many windows have no sibling and are left out.

    """
    at = rng.permutation(at)
    if together == 1:
        return at, 0
    kin = np.stack([at // documents_RT.shape[1], documents_RT.reshape(-1)[at]])
    order = np.lexsort(kin)  # stable: random among kin
    at, kin = at[order], kin[:, order]
    begins = np.append(True, (kin[:, 1:] != kin[:, :-1]).any(0)).nonzero()[0] if len(at) else np.empty(0, int)
    counts = np.diff(np.append(begins, len(at)))
    within = np.arange(len(at)) - np.repeat(begins, counts)
    whole = within < np.repeat(counts // together * together, counts)
    return rng.permutation(at[whole].reshape(-1, together)).reshape(-1), int((~whole).sum())


def draw_pairs(usable_RT: np.ndarray, documents_RT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every usable token that has an earlier one of its document in its row, in random order, with such an earlier one.

    Returns:
        Flat indices (row · T + position) [N, 2]: the earlier token, uniform among the usable ones before, and the
        token.

    """
    rank_RT = _usable_before(usable_RT, documents_RT)
    flat = usable_RT.reshape(-1).nonzero()[0]  # usable tokens of a row and document follow each other in this list
    rank = rank_RT.reshape(-1)[flat]
    later = (rank > 0).nonzero()[0]
    later = later[rng.permutation(len(later))]
    earlier = later - rank[later] + rng.integers(0, rank[later])
    return np.stack([flat[earlier], flat[later]], axis=1)


def _usable_before(usable_RT: np.ndarray, documents_RT: np.ndarray) -> np.ndarray:
    """How many usable tokens of its row and document lie before each token."""
    begins_RT = np.ones_like(usable_RT)
    begins_RT[:, 1:] = documents_RT[:, 1:] != documents_RT[:, :-1]
    before = np.cumsum(usable_RT.reshape(-1)) - usable_RT.reshape(-1)
    begins = begins_RT.reshape(-1)
    at_begin = before[begins.nonzero()[0]][np.cumsum(begins) - 1]
    return (before - at_begin).reshape(usable_RT.shape)


def _enough(once: Callable[[], np.ndarray], n: int) -> np.ndarray | None:
    """At least ``n`` items, from as many draws of a pool's items as that takes; None where there are none."""
    parts = [once()]
    while (have := sum(map(len, parts))) < n:
        if have == 0:
            return None
        parts.append(once())
    return np.concatenate(parts)


def _pairs_cut(at_N2: np.ndarray, context: int, bounds: np.ndarray) -> Cut:
    positions_N2 = at_N2 % context
    return Cut(at_N2[:, 0] // context, positions_N2[:, 0], positions_N2 - positions_N2[:, :1], bounds)


def _no_pair() -> UsageError:
    return UsageError("a pool of the store holds no two usable tokens of one document in one row: extract longer text")


def take_rows(x_ND: torch.Tensor, index_N: torch.Tensor, *, pin_memory: bool = False) -> torch.Tensor:
    """``x_ND[index_N]`` of bfloat16, by one thread, on request into page-locked memory.

    Torch would share the work among OpenMP threads, and while others keep the cores busy (the prefetch thread does)
    waiting for them takes ten times as long as copying a batch.
    """
    out = torch.empty((len(index_N), x_ND.shape[1]), dtype=x_ND.dtype, pin_memory=pin_memory)
    unit = torch.int64 if x_ND.shape[1] % 4 == 0 else torch.int16
    np.take(x_ND.view(unit).numpy(), index_N.numpy(), axis=0, out=out.view(unit).numpy(), mode="clip")
    return out
