"""The endless stream of shuffled batches over a store.

The batches depend only on the store's rows, the settings and a seed, and a stream can be resumed from a few numbers.
The store is read once for everyone who trains on it: each pool (:mod:`.pools`) is presented in several views
(:mod:`.views`) while a thread reads the next pool. A pool gives as many batches as its usable tokens fill; the
remaining tokens are dropped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import StoreError, UsageError
from .pools import Pool, PoolReader
from .store import ActivationStore
from .views import Cut, TokenBatch, View


@dataclass(frozen=True)
class _Ready:
    """A pool, and the items that every view takes from it."""

    pool: Pool
    n_batches: int
    cuts: dict[View, Cut]


class TokenStream:
    """Batches for every view, epoch after epoch.

    For one consumer. Call :meth:`close` at the end, or use it as a context manager.

    Args:
        store: the store to read.
        views: the views to serve, without repetition.
        tokens_per_batch: upper limit of tokens in a batch of windows or pairs; about the number in a batch of rows.
        pool_tokens: tokens per pool, which are shuffled together; default: as many as fit into 512 MB, but at least 32
            batches and one chunk.
        seed: decides the whole order.
        norm_limit: tokens with a larger norm are left out, and no window contains one.
        rows: use only the first ``rows`` rows (default: all), so that the stream stays the same if the store grows.
        only: use only the tokens in messages of this role (of a store of conversations); no window contains another.
        prefetch: read the next pool in a thread.
        pin_memory: return batches in page-locked memory, so that a GPU can copy them while it computes.

    Raises:
        UsageError: the rows cannot fill a whole batch of such windows.
        StoreError: ``rows`` is larger than the number of stored rows, or the store is damaged.

    """

    def __init__(
        self,
        store: ActivationStore,
        views: Sequence[View],
        *,
        tokens_per_batch: int,
        pool_tokens: int | None = None,
        seed: int,
        norm_limit: float | None = None,
        rows: int | None = None,
        only: str = "",
        prefetch: bool = True,
        pin_memory: bool = False,
    ):
        for view in views:
            view.check(store.context, tokens_per_batch)
        self.views, self._path, self._context = tuple(views), store.path, store.context
        self._budget, self._seed, self._limit = tokens_per_batch, seed, norm_limit
        sizes = {"pool_tokens": pool_tokens, "tokens_per_batch": tokens_per_batch, "rows": rows, "only": only}
        self._only = only
        self._reader = PoolReader(store, seed=seed, norm_limit=norm_limit, **sizes)
        self._pin = pin_memory
        self._thread = ThreadPoolExecutor(1, "pool-prefetch") if prefetch else None
        self._next: tuple[tuple[int, int], Future[_Ready]] | None = None
        self.seconds_waiting = 0.0
        self._begin(epoch=0, pool=0, batch=0)

    # --- position

    @property
    def epoch(self) -> int:
        """Number of passes over the rows completed before the next batch."""
        return self._epoch

    def position(self) -> dict[str, int]:
        """The position of the next batch; it is the same for all views."""
        return {"epoch": self._epoch, "pool": self._pool, "batch": self._batch}

    def identity(self, view: View) -> dict[str, Any]:
        """The settings that decide the batches of a view; the other views have no influence on them."""
        return {
            "rows": self._reader.rows,
            "view": view.name,
            "tokens_per_batch": self._budget,
            "pools": self._reader.pools,
            "seed": self._seed,
            "norm_limit": self._limit,
            **({"only": self._only} if self._only else {}),
        }

    def state_dict(self, view: View) -> dict[str, Any]:
        """The position and the stream's identity for a view, as plain JSON."""
        return {**self.position(), "of": self.identity(view)}

    def load_state_dict(self, state: dict[str, Any], view: View) -> None:
        """Go to a position from :meth:`state_dict`; the batches that follow are bit-identical.

        Raises:
            StoreError: the state was written by a version of this program that orders windows differently.
            UsageError: the state belongs to another stream; the differing setting is named.

        """
        if "view" not in state["of"]:
            raise StoreError(
                "the run was begun by a version of this program that put windows in another order: finish it with that "
                "version, or begin anew with --fresh"
            )
        mine, theirs = self.identity(view), state["of"]
        for name in {**mine, **theirs}:
            if theirs.get(name) != mine.get(name):
                raise UsageError(
                    f"the stream's {name} was {theirs.get(name)} and is now {mine.get(name)}: resume with the same "
                    "settings"
                )
        self._begin(**{name: state[name] for name in ("epoch", "pool", "batch")})

    def _begin(self, *, epoch: int, pool: int, batch: int) -> None:
        self._epoch, self._pool, self._batch = epoch, pool, batch
        self._current: _Ready | None = None
        if self._next is not None:  # the thread may be writing into a buffer that is about to be reused
            wait([self._next[1]])
        self._next = None

    # --- batches

    def add_view(self, view: View) -> None:
        """Serve one view more from the next batch on; nothing is read for it, and the others stay as they are.

        Raises:
            UsageError: no such windows fit into the store's rows or into a batch.

        """
        view.check(self._context, self._budget)
        if view not in self.views:
            self.views = (*self.views, view)

    def next_batches(self) -> list[TokenBatch]:
        """The next batch of every view, in the order of the views."""
        found = False
        for _ in range(self._reader.pools + 1):
            if self._current is None:
                self._current = self._take(self._epoch, self._pool)
            ready = self._current
            found |= ready.pool.n_tokens > 0
            if self._batch < ready.n_batches:
                for view in self.views:
                    if view not in ready.cuts:  # it was added after the pool was read
                        ready.cuts[view] = self._cut(view, ready.pool, ready.n_batches, self._epoch, self._pool)
                pairs = [(view, ready.cuts[view]) for view in self.views]
                batches = [view.gather(ready.pool, cut, self._batch, pin_memory=self._pin) for view, cut in pairs]
                self._batch += 1
                return batches
            self._current, self._batch = None, 0
            self._epoch, self._pool = self._after(self._epoch, self._pool)
        if self._only and not found:
            raise UsageError(
                f"{self._path} has no usable token in a message of the role '{self._only}': name another role"
            )
        whose = f" in messages of the role '{self._only}'" if self._only else ""
        raise UsageError(
            f"no batch of {self._budget} tokens{whose} can be filled from a pool of {self._path}: "
            "use a smaller batch, a larger pool, or extract more tokens"
        )

    def _after(self, epoch: int, pool: int) -> tuple[int, int]:
        return (epoch, pool + 1) if pool + 1 < self._reader.pools else (epoch + 1, 0)

    def _take(self, epoch: int, pool: int) -> _Ready:
        """The pool, prefetched or read now; then the prefetch of the following pool begins."""
        began = time.perf_counter()
        ahead = self._next is not None and self._next[0] == (epoch, pool)
        taken = self._next[1].result() if ahead and self._next else self._read(epoch, pool)
        self.seconds_waiting += time.perf_counter() - began
        if self._thread is not None:
            after = self._after(epoch, pool)
            self._next = after, self._thread.submit(self._read, *after)
        return taken

    def _read(self, epoch: int, number: int) -> _Ready:
        pool = self._reader.read(epoch, number)
        n_batches = pool.n_tokens // self._budget
        views = self.views if n_batches else ()
        return _Ready(pool, n_batches, {view: self._cut(view, pool, n_batches, epoch, number) for view in views})

    def _cut(self, view: View, pool: Pool, n_batches: int, epoch: int, number: int) -> Cut:
        rng = np.random.default_rng([self._seed, epoch, number])  # one per view: other views change nothing
        return view.cut(pool, n_batches, self._budget, rng)

    def close(self) -> None:
        """End the reading thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
