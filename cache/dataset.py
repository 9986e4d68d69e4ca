"""A store for training loops from elsewhere: rows as a dataset of PyTorch, or an iterator of shuffled batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.data import Dataset

from ..errors import UsageError
from .format.layout import PADDING, SPECIAL
from .store import ActivationStore
from .stream import TokenStream
from .views import Windows


class ActivationDataset(Dataset[dict[str, torch.Tensor]]):
    """Rows of a finished store.

    An item has ``x`` [T, D], ``tokens`` and ``documents`` (int64 [T]) and ``usable`` (bool [T]: neither special token
    nor padding). Every process that reads opens the store by itself, so workers may be forked or spawned. Rows that a
    store gains later are not seen.

    Args:
        path: the store's folder or URL.
        dtype: of ``x``; it is stored in bfloat16.

    Raises:
        StoreError: see :meth:`ActivationStore.open`.

    """

    def __init__(self, path: str | Path, *, dtype: torch.dtype = torch.float32):
        self.path, self.dtype = path, dtype
        store = ActivationStore.open(path)
        self._n_rows = store.n_rows
        store.close()
        self._opened: tuple[int, ActivationStore] | None = None

    def __len__(self) -> int:
        """Rows."""
        return self._n_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row; negative numbers count from the end.

        Raises:
            IndexError: there is no such row.
            StoreError: it is damaged.

        """
        row = index + self._n_rows if index < 0 else index
        if not 0 <= row < self._n_rows:
            raise IndexError(f"row {index} of {self.path}, which has {self._n_rows} rows")
        store, span = self._store(), (row, row + 1)
        flags_T = torch.from_numpy(store.flags(*span)[0].copy())
        return {
            "x": store.rows(*span, dtype=self.dtype)[0],
            "tokens": torch.from_numpy(store.tokens(*span)[0].astype("int64")),
            "documents": torch.from_numpy(store.documents(*span)[0].astype("int64")),
            "usable": (flags_T & (SPECIAL | PADDING)) == 0,
        }

    def _store(self) -> ActivationStore:
        """The process's own: threads of an opened store do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), ActivationStore.open(self.path)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned worker needs: not the opened store."""
        return self.__dict__ | {"_opened": None}


class ActivationBatches:
    """Batches of single tokens of a finished store, shuffled: an iterator of ``[batch_size, D]``.

    Special tokens and padding are left out. What is in memory is bounded by ``pool_tokens``, whatever the store's size:
    chunks are read in random order, and the tokens of a pool of them are shuffled together. The same seed gives the
    same batches. In an epoch a token comes at most once; of each pool the last tokens, which fill no batch, are left
    out. SAELens' ``SAETrainer`` takes it as ``data_provider``, dictionary_learning's ``trainSAE`` as ``data``.

    Close it at the end, or use it as a context manager. It is for one consumer, in one process.

    Attributes:
        d_model: D, the width of an activation.

    Args:
        store: the store, or its folder or URL.
        batch_size: tokens in a batch.
        seed: decides the whole order.
        epochs: how often the store is read before the iterator ends; None: it never ends.
        pool_tokens: tokens that are shuffled together, two such pools are in memory; default: 512 MB of them, but at
            least 32 batches and one chunk.
        rows: only the first rows of the store; default: all.
        outliers: also give the tokens that ``pipeline train`` leaves out, those whose norm is over ten times the
            median. Without them the store's statistics are computed once, and kept in it.
        dtype: of the batches; activations are stored in bfloat16.
        device: where to they are copied.

    Raises:
        StoreError: see :meth:`ActivationStore.open`; or it is damaged.
        UsageError: a size that cannot be, or more tokens in a batch than a pool has.

    """

    def __init__(
        self,
        store: str | Path | ActivationStore,
        batch_size: int = 4096,
        *,
        seed: int = 0,
        epochs: int | None = None,
        pool_tokens: int | None = None,
        rows: int | None = None,
        outliers: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        for name, value in (("batch_size", batch_size), ("epochs", epochs), ("pool_tokens", pool_tokens)):
            if value is not None and value < 1:
                raise UsageError(f"{name} = {value} is no number of {'passes' if name == 'epochs' else 'tokens'}")
        opened = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
        self.d_model, self._epochs, self._dtype, self._device = opened.d_model, epochs, dtype, torch.device(device)
        self._view = Windows(1)
        self._stream = TokenStream(
            opened,
            [self._view],
            tokens_per_batch=batch_size,
            pool_tokens=pool_tokens,
            seed=seed,
            norm_limit=None if outliers else opened.statistics().norm_limit,
            rows=rows,
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        if self._epochs is not None and self._stream.epoch >= self._epochs:
            raise StopIteration
        (batch,) = self._stream.next_batches()
        if self._epochs is not None and self._stream.epoch >= self._epochs:
            raise StopIteration
        return batch.x_NWD.flatten(0, 1).to(self._device, self._dtype)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch lies, as plain JSON."""
        return self._stream.state_dict(self._view)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the batches are bit-identical.

        Raises:
            UsageError: the state is of other settings; the one that differs is named.

        """
        self._stream.load_state_dict(state, self._view)

    def close(self) -> None:
        """End the reading thread."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
