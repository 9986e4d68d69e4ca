"""Views: how the rows of a pool become training batches, as windows, as pairs of tokens, or as whole rows.

All views of a pool give the same number of batches, each of about the same number of tokens. The batches of one view
therefore do not depend on the other views. A view that runs out of windows takes a second set from the same pool, from
other random offsets.

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

_LEAST_PAST = 2  # whole rows are refused if tokens have fewer usable tokens before them on average


@dataclass(frozen=True)
class TokenBatch:
    """Items of one view. All tokens of a window or pair are usable and belong to one document (and message, see Pool).

    Attributes:
        x_NWD: bfloat16 activations.
        documents_N: int64, the document of every item; for a row, the document of its first usable token.
        rows_N: int64, the row number in the store.
        positions_NW: int64, the position of every token in its row.
        valid_NW: bool, which tokens are usable; None for windows and pairs, where all are.
        documents_NW: the document of every token; None for windows and pairs, which have only one document.

    """

    x_NWD: torch.Tensor
    documents_N: torch.Tensor
    rows_N: torch.Tensor
    positions_NW: torch.Tensor
    valid_NW: torch.Tensor | None = None
    documents_NW: torch.Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Number of usable tokens."""
        n, w = self.positions_NW.shape
        return n * w if self.valid_NW is None else int(self.valid_NW.sum())

    def part(self, share: slice) -> TokenBatch:
        """The items in ``share``."""
        rest = (None if each is None else each[share] for each in (self.valid_NW, self.documents_NW))
        return TokenBatch(
            self.x_NWD[share], self.documents_N[share], self.rows_N[share], self.positions_NW[share], *rest
        )


@dataclass(frozen=True)
class Cut:
    """The items of a pool in the order of the batches: batch b holds items ``bounds[b]`` … ``bounds[b + 1]``."""

    local_N: np.ndarray  # row number within the pool
    start_N: np.ndarray  # position of the first token in its row
    offsets_NW: np.ndarray  # distance of every token from the first; [1, W] if it is the same for all items
    bounds: np.ndarray


class View(ABC):
    """A way to take items from a pool. Equal views give equal batches."""

    together: int = 1
    """Number of consecutive items that come from the same row and document."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The view's name, for messages and to distinguish views."""

    @abstractmethod
    def tokens_per_batch(self, budget: int) -> int:
        """Tokens in a batch limited to ``budget`` tokens; exact if all items have the same length, else the average."""

    @abstractmethod
    def describe(self, budget: int) -> str:
        """The contents of a batch with that budget, in words."""

    @abstractmethod
    def check(self, context: int, budget: int) -> None:
        """Check that such items can exist.

        Raises:
            UsageError: rows of ``context`` positions or batches of ``budget`` tokens are too small for one.

        """

    @abstractmethod
    def cut(self, pool: Pool, n_batches: int, budget: int, rng: np.random.Generator) -> Cut:
        """Choose the items for ``n_batches`` batches of at most ``budget`` tokens.

        Raises:
            UsageError: the pool holds no such item.

        """

    def gather(self, pool: Pool, cut: Cut, batch: int, *, pin_memory: bool = False) -> TokenBatch:
        """Copy one batch out of the pool."""
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
    """Windows of ``window`` consecutive tokens, in groups of ``together`` from one row and document.

    Every run of usable tokens is cut into windows from a random offset, and the groups of all runs are shuffled. A
    token is therefore seen at most once until all windows of the pool are used.
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

        at = _repeat_until(once, n_batches * size)
        if at is None:
            what = f"{self.window} consecutive tokens"
            if self.together > 1:
                what = f"{self.together} windows of {what} in one row"
            raise UsageError(
                f"a pool of the store holds no {what} of one document, without special ones and those over the norm "
                "limit: give a smaller --window"
            )
        return Cut(*np.divmod(at, pool.context), np.arange(self.window)[None], np.arange(n_batches + 1) * size)


@dataclass(frozen=True)
class Pairs(View):
    """Pairs of a token and an earlier one of the same row and document: [earlier, token].

    ``draw = "token"``: every token occurs once, in random order, and its partner is drawn from all usable tokens before
    it. ``draw = "batch"``: within a batch, the earlier token has the same position in all pairs, as Temporal SAE was
    published (arXiv 2511.05541), and the later token is drawn from all positions after it.

    ``earlier_extra``: the budget counts the later tokens only, so that an epoch has (nearly) every token as the later
    one; otherwise it counts both, and an epoch has half of them.
    """

    draw: Literal["token", "batch"] = "token"
    earlier_extra: bool = False

    @property
    def name(self) -> str:
        """See :class:`View`."""
        kind = "tokens with an earlier one each" if self.earlier_extra else "pairs"
        return kind + (" of one earlier position per batch" if self.draw == "batch" else "")

    def tokens_per_batch(self, budget: int) -> int:
        """See :class:`View`."""
        return budget if self.earlier_extra else budget // 2 * 2

    def describe(self, budget: int) -> str:
        """See :class:`View`."""
        return f"{self._size(budget)} {self.name}"

    def _size(self, budget: int) -> int:
        """Pairs in a batch."""
        return budget if self.earlier_extra else budget // 2

    def check(self, context: int, budget: int) -> None:
        """See :class:`View`."""
        if context < 2 or budget < 2:
            raise UsageError(f"rows of {context} positions and batches of {budget} tokens hold no pair of tokens")

    def cut(self, pool: Pool, n_batches: int, budget: int, rng: np.random.Generator) -> Cut:
        """See :class:`View`."""
        size = self._size(budget)
        if self.draw == "batch":
            return self._by_batch(pool, n_batches, size, rng)
        found = _repeat_until(lambda: draw_pairs(pool.usable_RT, pool.spans_RT, rng), n_batches * size)
        if found is None:
            raise _no_pair()
        return _pairs_cut(found, pool.context, np.arange(n_batches + 1) * size)

    def _by_batch(self, pool: Pool, n_batches: int, size: int, rng: np.random.Generator) -> Cut:
        batches = [self._from_one_source(pool, size, rng) for _ in range(n_batches)]
        found = np.concatenate(batches) if batches else np.empty((0, 2), np.int64)
        return _pairs_cut(found, pool.context, np.arange(n_batches + 1) * size)

    def _from_one_source(self, pool: Pool, size: int, rng: np.random.Generator) -> np.ndarray:
        for source in rng.permutation(pool.context - 1):
            same_RT = pool.spans_RT[:, source + 1 :] == pool.spans_RT[:, source, None]
            later_RT = pool.usable_RT[:, source + 1 :] & same_RT
            row, after = (later_RT & pool.usable_RT[:, source, None]).nonzero()
            if len(row):
                rounds = [rng.permutation(len(row)) for _ in range(-(-size // len(row)))]
                chosen = np.concatenate(rounds)[:size]
                at = row[chosen] * pool.context + source
                return np.stack([at, at + 1 + after[chosen]], axis=1)
        raise _no_pair()


@dataclass(frozen=True)
class Rows(View):
    """Whole rows in order, with the mask of usable tokens and the document of every token; every row once per epoch.

    The rows of a pool are divided evenly among its batches, so that batches differ by at most one row.
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
                f"in this store a token has on average {past:.1f} earlier tokens of its document in its row, too few "
                "for an SAE that sees whole rows: extract longer documents, or use --packing document"
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

    A run of n tokens gives n // window windows without gaps. The remaining n % window tokens are split at random (with
    equal probability) between the beginning and the end of the run.

    Args:
        usable_RT: bool, rows × positions.
        documents_RT: document of every token.
        window: tokens per window.
        rng: decides the offsets.

    Returns:
        Flat index (row · T + position) of every window's first token, in order, and the number of usable tokens that
        are in no window.

    """
    first_RT = usable_RT.copy()
    first_RT[:, 1:] &= ~usable_RT[:, :-1] | (documents_RT[:, 1:] != documents_RT[:, :-1])
    begins = first_RT.reshape(-1).nonzero()[0]
    # The length of a run is the number of usable tokens from its beginning to the beginning of the next run.
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
    """Put windows into random order; each group of ``together`` consecutive windows is from one row and document.

    Returns:
        The windows' first tokens in that order, and the number of windows left out since their row and document had too
        few windows to complete a group.

    """
    at = rng.permutation(at)
    if together == 1:
        return at, 0
    source = np.stack([at // documents_RT.shape[1], documents_RT.reshape(-1)[at]])  # (row, document) of each window
    order = np.lexsort(source)  # a stable sort: windows of one source stay in random order
    at, source = at[order], source[:, order]
    begins = np.append(True, (source[:, 1:] != source[:, :-1]).any(0)).nonzero()[0] if len(at) else np.empty(0, int)
    counts = np.diff(np.append(begins, len(at)))
    within = np.arange(len(at)) - np.repeat(begins, counts)
    whole = within < np.repeat(counts // together * together, counts)
    return rng.permutation(at[whole].reshape(-1, together)).reshape(-1), int((~whole).sum())


def draw_pairs(usable_RT: np.ndarray, documents_RT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For every usable token that has an earlier one of its document in its row: a random earlier one. In random order.

    Returns:
        Flat indices (row · T + position) [N, 2]: the earlier token, drawn uniformly from the usable tokens before, and
        the token itself.

    """
    rank_RT = _usable_before(usable_RT, documents_RT)
    flat = usable_RT.reshape(-1).nonzero()[0]  # usable tokens of a row and document follow each other in this list
    rank = rank_RT.reshape(-1)[flat]
    later = (rank > 0).nonzero()[0]
    later = later[rng.permutation(len(later))]
    earlier = later - rank[later] + rng.integers(0, rank[later])
    return np.stack([flat[earlier], flat[later]], axis=1)


def _usable_before(usable_RT: np.ndarray, documents_RT: np.ndarray) -> np.ndarray:
    """For each token, the number of usable tokens before it in the same row and document."""
    begins_RT = np.ones_like(usable_RT)
    begins_RT[:, 1:] = documents_RT[:, 1:] != documents_RT[:, :-1]
    before = np.cumsum(usable_RT.reshape(-1)) - usable_RT.reshape(-1)
    begins = begins_RT.reshape(-1)
    at_begin = before[begins.nonzero()[0]][np.cumsum(begins) - 1]
    return (before - at_begin).reshape(usable_RT.shape)


def _repeat_until(draw: Callable[[], np.ndarray], n: int) -> np.ndarray | None:
    """At least ``n`` items, by drawing from the pool as often as necessary; None if the pool has no such item."""
    parts = [draw()]
    while (have := sum(map(len, parts))) < n:
        if have == 0:
            return None
        parts.append(draw())
    return np.concatenate(parts)


def _pairs_cut(at_N2: np.ndarray, context: int, bounds: np.ndarray) -> Cut:
    positions_N2 = at_N2 % context
    return Cut(at_N2[:, 0] // context, positions_N2[:, 0], positions_N2 - positions_N2[:, :1], bounds)


def _no_pair() -> UsageError:
    return UsageError("a pool of the store holds no two usable tokens of one document in one row: extract longer text")


def take_rows(x_ND: torch.Tensor, index_N: torch.Tensor, *, pin_memory: bool = False) -> torch.Tensor:
    """``x_ND[index_N]`` for bfloat16, in a single thread, into page-locked memory if requested.

    Torch would divide the work among OpenMP threads. While other threads use the cores (as the prefetch thread does),
    waiting for the OpenMP threads takes ten times as long as copying a batch.
    """
    out = torch.empty((len(index_N), x_ND.shape[1]), dtype=x_ND.dtype, pin_memory=pin_memory)
    unit = torch.int64 if x_ND.shape[1] % 4 == 0 else torch.int16
    np.take(x_ND.view(unit).numpy(), index_N.numpy(), axis=0, out=out.view(unit).numpy(), mode="clip")
    return out
