"""Pools: the rows of a store that are in memory at the same time.

The chunks of a store are read in a random order given by a seed; every chunk is read once per epoch. Consecutive chunks
of that order form a pool. If all rows fit into one pool, they are read only once, whatever the number of epochs.

Shapes: R rows of a pool, T positions of a row, D model width, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import StoreError
from .format.layout import of_role
from .statistics import cached_statistics, counted, kept_norms, token_norms
from .store import ActivationStore

_POOL_BYTES = 512_000_000  # size of one pool; two are in memory, one in use and one being read
_POOL_BATCHES = 32  # at least so many batches per pool if the store is large enough, so that little is dropped


@dataclass(frozen=True)
class Pool:
    """Rows in memory, and which of their tokens may be used.

    Attributes:
        x_ND: bfloat16, all tokens in memory.
        rows_R: row number in the store of every row of the pool.
        places_R: index of every row within ``x_ND``, counted in rows.
        usable_RT: bool, true for tokens that are neither special nor padding nor over the norm limit.
        documents_RT: running document numbers.
        spans_RT: int64, equal for two positions of a row that a pair may join: of one document or, if one role's tokens
            alone are used, of one message.

    """

    x_ND: torch.Tensor
    rows_R: np.ndarray
    places_R: np.ndarray
    usable_RT: np.ndarray
    documents_RT: np.ndarray
    spans_RT: np.ndarray

    @property
    def context(self) -> int:
        """T, positions per row."""
        return self.usable_RT.shape[1]

    @property
    def n_tokens(self) -> int:
        """Number of usable tokens."""
        return int(self.usable_RT.sum())


class PoolReader:
    """Reads one pool after the other. Not thread-safe.

    The last two pools stay valid; reading a third one overwrites the memory of the first.

    Args:
        store: the store to read.
        pool_tokens: tokens per pool; None: as many as fit into 512 MB, but at least 32 batches and one chunk.
        tokens_per_batch: tokens per batch, for the default of ``pool_tokens``.
        seed: decides the order of the chunks.
        norm_limit: tokens with a larger norm are not usable.
        rows: use only the first ``rows`` rows; None: all.
        only: use only the tokens in messages of this role; empty: all.

    Raises:
        StoreError: ``rows`` is larger than the number of stored rows, or the store says of no token whose it is.

    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        pool_tokens: int | None,
        tokens_per_batch: int,
        seed: int,
        norm_limit: float | None,
        rows: int | None,
        only: str = "",
    ):
        self._store, self._seed, self._limit, self._only = store, seed, norm_limit, only
        if only and not store.manifest.text.chat_template:
            raise StoreError(
                f"{store.path} does not say whose each token is, so that --only {only} selects nothing: extract rows "
                "of messages with --chat-template"
            )
        self.rows = store.n_rows if rows is None else rows
        if not 0 < self.rows <= store.n_rows:
            raise StoreError(f"{self.rows} rows are to be streamed, {store.path} holds {store.n_rows}")
        self._norms_kept = norm_limit is not None and cached_statistics(store) is not None
        if pool_tokens is None:
            pool_tokens = max(_POOL_BYTES // (2 * store.d_model), _POOL_BATCHES * tokens_per_batch)
        per_pool = max(1, pool_tokens // (store.chunk_rows * store.context))
        self.pools = -(-store.layout.chunks_for(self.rows) // per_pool)  # per epoch
        self._buffers = [torch.empty(0, dtype=torch.bfloat16) for _ in range(2)]
        self._order: tuple[int, np.ndarray] | None = None
        self._whole: torch.Tensor | None = None  # all rows, if they fit into one pool

    def read(self, epoch: int, pool: int) -> Pool:
        """Read one pool of an epoch.

        Raises:
            StoreError: damage.

        """
        store = self._store
        chunks = self._chunks(epoch, pool)
        ranges = [store.chunk_range(chunk) for chunk in chunks]
        rows_R = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
        x_RTD, places_R = self._tokens(chunks, rows_R, (epoch * self.pools + pool) % 2)
        documents_RT = np.concatenate([store.documents(r.start, r.stop) for r in ranges])
        flags_RT = np.concatenate([store.flags(r.start, r.stop) for r in ranges])
        usable_RT = self._usable(x_RTD, places_R, ranges, flags_RT) & (rows_R < self.rows)[:, None]
        spans_RT = documents_RT
        if self._only:
            of_role_RT = of_role(flags_RT, self._only)
            usable_RT &= of_role_RT
            spans_RT = message_spans(documents_RT, of_role_RT)
        return Pool(x_RTD.flatten(0, 1), rows_R, places_R, usable_RT, documents_RT, spans_RT)

    def _chunks(self, epoch: int, pool: int) -> list[int]:
        """The chunks of a pool. The order of an epoch is kept until another one is asked for."""
        if self._order is None or self._order[0] != epoch:
            n_chunks = self._store.layout.chunks_for(self.rows)
            # As permutation() draws it, which would hold 8 bytes per chunk.
            order = np.arange(n_chunks, dtype=np.int32 if n_chunks < 1 << 31 else np.int64)
            np.random.default_rng([self._seed, epoch]).shuffle(order)
            self._order = epoch, order
        order = self._order[1]
        size, longer = divmod(len(order), self.pools)  # as np.array_split divides: the first pools have one more
        start = pool * size + min(pool, longer)
        return order[start : start + size + (pool < longer)].tolist()

    def _tokens(self, chunks: list[int], rows_R: np.ndarray, buffer: int) -> tuple[torch.Tensor, np.ndarray]:
        """Rows in memory, and the index among them of each of ``rows_R`` (the rows of ``chunks``)."""
        if self._whole is not None:
            return self._whole, rows_R
        if len(self._buffers[buffer]) < len(rows_R):
            shape = (len(rows_R), self._store.context, self._store.d_model)
            self._buffers[buffer] = torch.empty(shape, dtype=torch.bfloat16)
        if self.pools > 1:
            return self._store.read_chunks(chunks, self._buffers[buffer]), np.arange(len(rows_R))
        self._whole = self._store.read_chunks(sorted(chunks), self._buffers[buffer])
        return self._whole, rows_R

    def _usable(self, x_RTD: torch.Tensor, places_R: np.ndarray, ranges: list[range], flags: np.ndarray) -> np.ndarray:
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


def message_spans(documents_RT: np.ndarray, of_role_RT: np.ndarray) -> np.ndarray:
    """Numbers within a row that change wherever a document ends, or a message of the role begins or ends."""
    changes_RT = np.zeros(documents_RT.shape, dtype=np.int64)
    changes_RT[:, 1:] = (documents_RT[:, 1:] != documents_RT[:, :-1]) | (of_role_RT[:, 1:] != of_role_RT[:, :-1])
    return changes_RT.cumsum(1)
