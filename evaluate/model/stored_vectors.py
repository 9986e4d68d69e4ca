"""Vectors of a store in the place of a language model: what is evaluated where no language model made them.

They are read again as often as they are asked for. Nothing can be spliced into them, and no altered text can be run.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...cache.arrays.config import HELD_OUT
from ...cache.format.layout import RowBlock
from ...cache.store import ActivationStore
from ...console import note
from ...errors import NoLanguageModelError, RunError
from ...sites import Location
from ..results import ModelFacts
from .heldout_text import HeldOutText

NO_TOKEN = "·"  # noqa: S105 - what is shown in the place of a token's text


class StoredVectors:
    """The vectors of a store at their one location.

    Args:
        store: opened.
        device: where tensors are wanted.

    """

    def __init__(self, store: ActivationStore, device: torch.device):
        self.store, self.device, self.dtype = store, device, torch.bfloat16
        said = [commit.cursor for commit in store.commits if commit.cursor]
        self._labels = {int(key): str(label) for cursor in said for key, label in cursor.get("labels", {}).items()}
        self._token_text = next((cursor["token_text"] for cursor in said if "token_text" in cursor), None)

    @property
    def facts(self) -> ModelFacts:
        """What the report says in the place of a language model."""
        known = self.store.manifest.model
        shared = {name: getattr(known, name) for name in ModelFacts.model_fields if name != "d_model"}
        return ModelFacts(d_model=self.store.d_model, **shared)

    @property
    def has_tokens(self) -> bool:
        """Whether the positions are of something that has a number."""
        return self.store.manifest.model.tokenizer_fingerprint != self.store.manifest.model.architecture

    bos_token_id: int | None = None

    def blocks(self, rows: int) -> Iterator[RowBlock]:
        """The store's tokens, documents and flags, ``rows`` rows at a time.

        Where there are no tokens every position has a number of its own, so that no two are taken for the same.
        """
        context = self.store.context
        for start in range(0, self.store.n_rows, rows):
            span = start, min(start + rows, self.store.n_rows)
            tokens = self.store.tokens(*span)
            if not self.has_tokens:
                tokens = np.arange(span[0] * context, span[1] * context, dtype=np.int32).reshape(-1, context)
            yield RowBlock(tokens, self.store.documents(*span), self.store.flags(*span))

    def label(self, document: int) -> str | None:
        """The label of a sequence; None where it has none."""
        return self._labels.get(document)

    def of_rows(
        self, text: HeldOutText, rows: slice | Sequence[int], locations: Sequence[Location]
    ) -> dict[Location, Tensor]:
        """The vectors [B, T, D] of rows of the text, in bfloat16."""
        assert text.read_R is not None  # noqa: S101 - a text that was gathered
        numbers = text.read_R[rows].tolist()
        x_BTD = torch.cat([self.store.rows(number, number + 1) for number in numbers]).to(self.device)
        return dict.fromkeys(locations, x_BTD)

    def activations(self, tokens_BT: Tensor, locations: Sequence[Location]) -> dict[Location, Tensor]:
        """Refused: only a model can be asked about another text.

        Raises:
            NoLanguageModelError: always.

        """
        raise NoLanguageModelError(
            f"{len(tokens_BT)} rows of altered text cannot be run at layer {locations[0]} of "
            f"{self.store.manifest.model.id}: there is no language model"
        )

    def token_text(self, token: int) -> str:
        """What a token looks like: as the import was told, else its number."""
        if not self.has_tokens:
            return NO_TOKEN
        known = self._token_text
        return str(known[token]) if known is not None and token < len(known) else str(token)


def open_held_out(path: str, trained_on: ActivationStore | None, device: torch.device) -> StoredVectors:
    """The vectors that evaluation reads.

    Args:
        path: their store.
        trained_on: the store of the run, where it is still there.
        device: where tensors are wanted.

    Raises:
        StoreError: there is none.
        RunError: a language model made them.

    """
    store = ActivationStore.open(path)
    if store.manifest.of_language_model:
        raise RunError(
            f"{path} holds activations of {store.manifest.model.id}, a language model: name a text with --dataset, "
            "not a store"
        )
    if trained_on is not None and store.fingerprint() == trained_on.fingerprint():
        note(f"{path} is what was trained on: its figures flatter")
    elif store.manifest.text.split != HELD_OUT:
        note(f"{path} was not held out when it was imported: all of it is evaluated on")
    return StoredVectors(store, device)
