"""A store as a map-style dataset of PyTorch: one row of the text per item, for a DataLoader with or without workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .format.layout import PADDING, SPECIAL
from .store import ActivationStore


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
