"""Endless shuffled windows over a store: a pure function of its rows, the settings and a seed, resumable from a few
numbers.

An *epoch* visits every chunk once, in a seeded order. Consecutive chunks of that order form a *pool* in memory, while a
thread reads the next one; rows that fit into one pool are read once, whatever the number of epochs. Inside a pool every
run of usable consecutive tokens is cut into windows from a random offset, and the windows of all its runs are shuffled
together. What is left of a pool after its last whole batch is dropped and counted.

Shapes: W window, D model width, N windows of a batch.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import StoreError, UsageError
from .statistics import cached_statistics, counted, kept_norms, token_norms
from .store import ActivationStore


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
        Their first tokens in that order, and how many windows were left out for want of company.

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


_POOL_BYTES = 512_000_000  # of one pool; two are held while the next is read
_POOL_BATCHES = 32  # a pool holds at least this many batches where the store allows, so that little is dropped


@dataclass(frozen=True)
class WindowBatch:
    """Windows of consecutive tokens, none of them special, padding, over the norm limit, or of another document."""

    x_NWD: torch.Tensor  # bfloat16
    documents_N: torch.Tensor  # int64 running document numbers
    rows_N: torch.Tensor  # int64 rows of the store
    starts_N: torch.Tensor  # int64 position of the first token in its row


@dataclass(frozen=True)
class _Pool:
    """Chunks in memory and the shuffled windows in them."""

    x_ND: torch.Tensor  # all tokens of the pool
    at_N: torch.Tensor  # first token of every window, index into x_ND
    documents_N: torch.Tensor
    rows_N: torch.Tensor
    starts_N: torch.Tensor
    unused_tokens: int  # usable tokens that no window holds: ends of runs


class WindowStream:
    """Batches of windows, epoch after epoch. Single consumer; :meth:`close` it, or use it as a context manager.

    Args:
        store: finished rows.
        window: W, tokens per window; 1 gives shuffled tokens.
        tokens_per_batch: a batch is ``tokens_per_batch // window`` windows (the remainder is left out).
        pool_tokens: tokens shuffled together; by default as many as fit into 512 MB, at least 32 batches and one chunk.
        seed: of the whole order.
        norm_limit: tokens of a larger norm are left out, and windows end at them.
        rows: use only the first so many rows (all by default), so that a store may grow without changing the stream.
        prefetch: read the next pool in a thread.
        pin_memory: batches come in page-locked memory, from which a GPU copies while it computes.
        together: so many windows of one row and document stay side by side, for pairs that are no neighbours.

    Raises:
        UsageError: the rows hold no whole batch of such windows.
        StoreError: more rows asked for than there are, or damage.

    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        window: int,
        tokens_per_batch: int,
        pool_tokens: int | None = None,
        seed: int,
        norm_limit: float | None = None,
        rows: int | None = None,
        prefetch: bool = True,
        pin_memory: bool = False,
        together: int = 1,
    ):
        if not 1 <= window <= store.context or tokens_per_batch < window * together:
            raise UsageError(
                f"windows of {window} tokens in batches of {tokens_per_batch}: the store's rows have {store.context} "
                "positions, and a batch takes at least one window"
            )
        self._store, self.window, self._seed, self._together = store, window, seed, together
        self.windows_per_batch = tokens_per_batch // (window * together) * together
        self._rows = store.n_rows if rows is None else rows
        if not 0 < self._rows <= store.n_rows:
            raise StoreError(f"{self._rows} rows are to be streamed, {store.path} holds {store.n_rows}")
        self._limit = norm_limit
        self._norms_kept = norm_limit is not None and cached_statistics(store) is not None
        self._pools = self._split(pool_tokens, tokens_per_batch)
        self._pin = pin_memory
        self._thread = ThreadPoolExecutor(1, "window-prefetch") if prefetch else None
        self._buffers = [torch.empty(0, dtype=torch.bfloat16) for _ in range(2)]
        self._whole: torch.Tensor | None = None  # all rows, where they are one pool
        self._next: tuple[tuple[int, int], Future[_Pool]] | None = None
        self.seconds_waiting = 0.0
        self._begin(epoch=0, pool=0, batch=0, dropped_windows=0, unused_tokens=0)

    def _split(self, pool_tokens: int | None, tokens_per_batch: int) -> int:
        """Pools per epoch; an epoch's chunks are dealt to them as evenly as they go."""
        store = self._store
        if pool_tokens is None:
            pool_tokens = max(_POOL_BYTES // (2 * store.d_model), _POOL_BATCHES * tokens_per_batch)
        chunks = store.layout.chunks_for(self._rows)
        per_pool = max(1, pool_tokens // (store.chunk_rows * store.context))
        return -(-chunks // per_pool)

    # --- position
    # ------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Passes over the rows completed before the next batch's."""
        return self._epoch

    @property
    def dropped_windows(self) -> int:
        """Windows left over at the ends of pools so far."""
        return self._dropped

    @property
    def unused_tokens(self) -> int:
        """Usable tokens at the ends of runs that no window held so far."""
        return self._unused

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, before the next batch; plain JSON."""
        return {
            "epoch": self._epoch,
            "pool": self._pool_number,
            "batch": self._batch,
            "dropped_windows": self._dropped,
            "unused_tokens": self._unused,
            "of": self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that :meth:`state_dict` gave; the batches that follow are bit-identical.

        Raises:
            UsageError: the state is of another stream; the differing setting is named.

        """
        for name, mine in self._identity().items():
            if state["of"].get(name) != mine:
                raise UsageError(
                    f"the stream's {name} was {state['of'].get(name)} and is now {mine}: resume with the same settings"
                )
        self._begin(**{name: state[name] for name in ("epoch", "pool", "batch", "dropped_windows", "unused_tokens")})

    def _identity(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "window": self.window,
            "windows_per_batch": self.windows_per_batch,
            "pools": self._pools,
            "seed": self._seed,
            "together": self._together,
            "norm_limit": self._limit,
        }

    def _begin(self, *, epoch: int, pool: int, batch: int, dropped_windows: int, unused_tokens: int) -> None:
        self._epoch, self._pool_number, self._batch = epoch, pool, batch
        self._dropped, self._unused = dropped_windows, unused_tokens
        self._current: _Pool | None = None
        if self._next is not None:  # it may be writing into a buffer that is about to be reused
            wait([self._next[1]])
        self._next = None

    # --- batches
    # -------------------------------------------------------------------------------------------------------

    def next_batch(self) -> WindowBatch:
        """The next ``windows_per_batch`` windows."""
        size = self.windows_per_batch
        for _ in range(self._pools + 1):
            if self._current is None:
                self._current = self._take(self._epoch, self._pool_number)
            low = self._batch * size
            if low + size <= len(self._current.at_N):
                self._batch += 1
                return self._gather(self._current, low, low + size)
            self._leave(self._current)
        if not self._dropped:
            raise UsageError(
                f"{self._store.path} holds no {self.window} consecutive tokens of one document, "
                "without special ones and "
                "those over the norm limit: give a smaller --window"
            )
        raise UsageError(
            f"no batch of {size} windows of {self.window} tokens can be filled from a pool of {self._store.path}: "
            "use a smaller batch, a larger pool, or extract more tokens"
        )

    def _leave(self, pool: _Pool) -> None:
        self._dropped += len(pool.at_N) - self._batch * self.windows_per_batch
        self._unused += pool.unused_tokens
        self._current, self._batch = None, 0
        self._epoch, self._pool_number = self._after(self._epoch, self._pool_number)

    def _after(self, epoch: int, pool: int) -> tuple[int, int]:
        return (epoch, pool + 1) if pool + 1 < self._pools else (epoch + 1, 0)

    def _gather(self, pool: _Pool, low: int, high: int) -> WindowBatch:
        index = (pool.at_N[low:high, None] + torch.arange(self.window)).flatten()
        x_NWD = take_rows(pool.x_ND, index, pin_memory=self._pin).unflatten(0, (high - low, self.window))
        return WindowBatch(x_NWD, pool.documents_N[low:high], pool.rows_N[low:high], pool.starts_N[low:high])

    # --- pools
    # ---------------------------------------------------------------------------------------------------------

    def _take(self, epoch: int, pool: int) -> _Pool:
        """The pool, read ahead or now; starts reading the one after it."""
        began = time.perf_counter()
        ahead = self._next is not None and self._next[0] == (epoch, pool)
        taken = self._next[1].result() if ahead and self._next else self._read(epoch, pool)
        self.seconds_waiting += time.perf_counter() - began
        if self._thread is not None:
            after = self._after(epoch, pool)
            self._next = after, self._thread.submit(self._read, *after)
        return taken

    def _read(self, epoch: int, pool: int) -> _Pool:
        store = self._store
        order = np.random.default_rng([self._seed, epoch]).permutation(store.layout.chunks_for(self._rows))
        chunks = [int(c) for c in np.array_split(order, self._pools)[pool]]
        ranges = [store.chunk_range(chunk) for chunk in chunks]
        rows_R = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
        x_RTD, places_R = self._tokens(chunks, rows_R, (epoch * self._pools + pool) % 2)
        documents_RT = np.concatenate([store.documents(r.start, r.stop) for r in ranges])
        usable_RT = self._usable(x_RTD, places_R, ranges) & (rows_R < self._rows)[:, None]
        rng = np.random.default_rng([self._seed, epoch, pool])
        at, unused = cut_windows(usable_RT, documents_RT, self.window, rng)
        at, alone = shuffle_windows(at, documents_RT, self._together, rng)
        unused += alone * self.window
        row, start = np.divmod(at, store.context)
        documents = documents_RT.reshape(-1)[at].astype(np.int64)
        found = (places_R[row] * store.context + start, documents, rows_R[row], start)
        numbers = [torch.from_numpy(np.ascontiguousarray(a, np.int64)) for a in found]
        return _Pool(x_RTD.flatten(0, 1), numbers[0], numbers[1], numbers[2], numbers[3], unused)

    def _tokens(self, chunks: list[int], rows_R: np.ndarray, buffer: int) -> tuple[torch.Tensor, np.ndarray]:
        """Rows in memory, and the place of each of ``rows_R`` (those of ``chunks``) among them."""
        if self._whole is not None:
            return self._whole, rows_R
        if len(self._buffers[buffer]) < len(rows_R):
            shape = (len(rows_R), self._store.context, self._store.d_model)
            self._buffers[buffer] = torch.empty(shape, dtype=torch.bfloat16)
        if self._pools > 1:
            return self._store.read_chunks(chunks, self._buffers[buffer]), np.arange(len(rows_R))
        self._whole = self._store.read_chunks(sorted(chunks), self._buffers[buffer])
        return self._whole, rows_R

    def _usable(self, x_RTD: torch.Tensor, places_R: np.ndarray, ranges: list[range]) -> np.ndarray:
        store = self._store
        flags = np.concatenate([store.flags(r.start, r.stop) for r in ranges])
        if self._limit is None:
            return counted(np.zeros(flags.shape, np.float32), flags, 0.0)
        kept = [self._kept(r) for r in ranges] if self._norms_kept else [None]
        known = [norms for norms in kept if norms is not None]
        norms = np.concatenate(known) if len(known) == len(kept) else token_norms(x_RTD)[places_R]
        return counted(norms, flags, self._limit)

    def _kept(self, rows: range) -> np.ndarray | None:
        shard = rows.start // self._store.layout.shard_rows
        whole = self._store.layout.rows_of(shard, self._store.n_rows)
        norms = kept_norms(self._store, shard, len(whole))
        return None if norms is None else norms[rows.start - whole.start : rows.stop - whole.start]

    def close(self) -> None:
        """End the reading thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> WindowStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take_rows(x_ND: torch.Tensor, index_N: torch.Tensor, *, pin_memory: bool = False) -> torch.Tensor:
    """``x_ND[index_N]`` of bfloat16, by one thread, on request into page-locked memory.

    Torch would share the work among OpenMP threads, and while others keep the cores busy (the prefetch thread does)
    waiting for them takes ten times as long as copying a batch.
    """
    out = torch.empty((len(index_N), x_ND.shape[1]), dtype=x_ND.dtype, pin_memory=pin_memory)
    unit = torch.int64 if x_ND.shape[1] % 4 == 0 else torch.int16
    np.take(x_ND.view(unit).numpy(), index_N.numpy(), axis=0, out=out.view(unit).numpy(), mode="clip")
    return out
