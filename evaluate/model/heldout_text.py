"""The text that is evaluated on, held in memory whole: rows of tokens, what counts in them, and the units that are
resampled.

A unit is a run of consecutive rows (or parts of rows) of one document with about a thousand tokens that count.

Shapes: R rows of the text, B rows of a batch, T positions, D model width, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...cache.format.layout import PADDING, SPECIAL, RowBlock, of_role
from ...console import progress
from ...errors import TextError
from ...sites import Location
from ..protocol import State, TokenBatch

UNIT_TOKENS = 1000
OUTLIER_FACTOR = 10.0
ENOUGH_DOCUMENTS = 64
READ_AHEAD_ROWS = 4096


@dataclass(frozen=True)
class HeldOutText:
    """Rows of text nobody trained on."""

    tokens_RT: np.ndarray  # int64
    documents_RT: np.ndarray  # int64
    units_RT: np.ndarray  # int64
    real_RT: np.ndarray  # bool: neither special nor padding
    unit_documents: np.ndarray  # int64 [U]
    spliced_R: np.ndarray | None = None  # bool: rows in which SAEs are spliced into the model; None: all
    labels_RT: np.ndarray | None = None  # int64: the label of the token's document, −1 where it has none
    label_names: tuple[str, ...] = ()
    classes_RT: np.ndarray | None = None  # int64: see token_text.py
    read_R: np.ndarray | None = None  # int64: the number of each row among all that could be read
    first_row: int = 0  # of a part of a text: the number of its first row in the whole

    @classmethod
    def gather(
        cls,
        blocks: Iterable[RowBlock],
        rows: int,
        label: Callable[[int], str | None] = lambda _: None,
        *,
        only: str | None = None,
    ) -> HeldOutText:
        """``rows`` rows of ``blocks``, spread evenly over the documents; fewer where the text ends.

        Documents are what intervals are made of, so a few more rows are read than are wanted where these come from few.
        ``label`` knows the label of a document that was read. ``only``: nothing counts but the messages of this role.

        Raises:
            TextError: there is not one row, or no token of that role.

        """
        taken: list[RowBlock] = []
        documents: set[int] = set()
        read = 0
        for block in blocks:
            taken.append(block)
            read += len(block)
            documents.update(np.unique(block.documents_BT).tolist())
            if read >= rows and (len(documents) >= ENOUGH_DOCUMENTS or read >= max(4 * rows, READ_AHEAD_ROWS)):
                break
        if not read:
            raise TextError(
                "there is no held-out text to evaluate on: use a longer text, a larger --held-out, or --dataset"
            )
        tokens_RT, documents_RT, flags_RT = (
            np.concatenate([getattr(block, name) for block in taken])
            for name in ("tokens_BT", "documents_BT", "flags_BT")
        )
        chosen = spread_over_documents(documents_RT[:, -1], rows)
        tokens_RT, documents_RT, flags_RT = tokens_RT[chosen], documents_RT[chosen], flags_RT[chosen]
        real_RT = (flags_RT & (SPECIAL | PADDING)) == 0
        if only:
            real_RT &= of_role(flags_RT, only)
            if not real_RT.any():
                raise TextError(
                    f"the text has no token in a message of the role '{only}': evaluate rows of messages with "
                    "--chat-template, or leave --only out"
                )
        units_RT, unit_documents = number_units(documents_RT, real_RT)
        numbers = (tokens_RT.astype(np.int64), documents_RT.astype(np.int64), units_RT)
        return cls(*numbers, real_RT, unit_documents, read_R=chosen).labelled(label)

    def labelled(self, label: Callable[[int], str | None]) -> HeldOutText:
        """The same text with the label of every document, numbered in alphabetical order."""
        documents, at_RT = np.unique(self.documents_RT, return_inverse=True)
        found = [label(int(document)) for document in documents]
        names = sorted({name for name in found if name is not None})
        if not names:
            return self
        number = {name: at for at, name in enumerate(names)}
        labels = np.array([-1 if name is None else number[name] for name in found], dtype=np.int64)
        return replace(self, labels_RT=labels[at_RT].reshape(self.documents_RT.shape), label_names=tuple(names))

    def __len__(self) -> int:
        """Rows."""
        return len(self.tokens_RT)

    @property
    def context(self) -> int:
        """Positions per row."""
        return self.tokens_RT.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens that are neither special nor padding."""
        return int(self.real_RT.sum())

    @property
    def n_documents(self) -> int:
        """Different documents."""
        return len(np.unique(self.unit_documents))

    @property
    def fingerprint(self) -> str:
        """Of every token and of what counts: equal fingerprints mean paired measurements."""
        digest = sha256(repr(self.tokens_RT.shape).encode())
        for array in (self.tokens_RT, self.documents_RT, self.real_RT):
            digest.update(np.ascontiguousarray(array).tobytes())
        if self.labels_RT is not None:
            digest.update(repr(self.label_names).encode() + self.labels_RT.tobytes())
        return digest.hexdigest()[:16]

    def part(self, rows: slice) -> HeldOutText:
        """Some of its rows, with their numbers, documents and units in the whole."""
        names = ("tokens_RT", "documents_RT", "units_RT", "real_RT", "spliced_R", "labels_RT", "classes_RT", "read_R")
        cut = {name: None if (array := getattr(self, name)) is None else array[rows] for name in names}
        return replace(self, **cut, first_row=self.first_row + rows.start)

    def spliced_in(self, rows: int) -> HeldOutText:
        """The same text, of which SAEs are spliced into ``rows`` rows, spread evenly over the documents; 0: all."""
        if not 0 < rows < len(self):
            return self
        spliced_R = np.zeros(len(self), dtype=bool)
        spliced_R[spread_over_documents(self.documents_RT[:, -1], rows)] = True
        return replace(self, spliced_R=spliced_R)

    def spliced(self, rows: slice) -> Tensor:
        """Which of these rows are spliced, by their number among them."""
        if self.spliced_R is None:
            return torch.arange(rows.stop - rows.start)
        return torch.from_numpy(np.flatnonzero(self.spliced_R[rows]))

    def batches(self, rows: int, limit: int | None = None) -> Iterator[slice]:
        """Consecutive row ranges of at most ``rows`` rows."""
        for start in list(range(0, len(self), rows))[:limit]:
            yield slice(start, min(start + rows, len(self)))

    def tokens(self, rows: slice | Sequence[int], device: torch.device) -> Tensor:
        """Tokens [B, T] of some rows."""
        return torch.from_numpy(self.tokens_RT[rows]).to(device)

    def batch(self, rows: slice, x_BTD: Tensor, norm_limit: float) -> TokenBatch:
        """These rows with the tensor ``x_BTD`` of one location."""
        x_BTD = x_BTD.float()
        tokens, documents, units, real = (
            torch.from_numpy(part[rows]).to(x_BTD.device)
            for part in (self.tokens_RT, self.documents_RT, self.units_RT, self.real_RT)
        )
        valid = real & (x_BTD.norm(dim=-1) <= norm_limit)
        numbers = self.first_row + torch.arange(rows.start, rows.stop, device=x_BTD.device)
        labels, classes = (
            torch.full_like(tokens, -1) if part is None else torch.from_numpy(part[rows]).to(x_BTD.device)
            for part in (self.labels_RT, self.classes_RT)
        )
        return TokenBatch(x_BTD, tokens, documents, units, valid, real, numbers, labels, classes)


def spread_over_documents(documents_R: np.ndarray, rows: int) -> np.ndarray:
    """Indices of at most ``rows`` rows in order: a random one of every document, then a second one …"""
    key_R = np.random.default_rng(0).random(len(documents_R))
    order = np.lexsort((key_R, documents_R))
    _, first, counts = np.unique(documents_R[order], return_index=True, return_counts=True)
    turn_R = np.empty(len(order), dtype=np.int64)
    turn_R[order] = np.arange(len(order)) - np.repeat(first, counts)
    return np.sort(np.lexsort((key_R, turn_R))[:rows])


def number_units(documents_RT: np.ndarray, real_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number every position's unit, and say which document each unit belongs to."""
    units_RT = np.zeros(documents_RT.shape, dtype=np.int64)
    open_units: dict[int, tuple[int, int]] = {}  # document → its current unit and how much of it is filled
    owners: list[int] = []
    for row, (documents_T, real_T) in enumerate(zip(documents_RT, real_RT, strict=True)):
        for document in np.unique(documents_T).tolist():
            here_T = documents_T == document
            unit, filled = open_units.get(document, (-1, UNIT_TOKENS))
            if filled >= UNIT_TOKENS:
                unit, filled = len(owners), 0
                owners.append(document)
            units_RT[row, here_T] = unit
            open_units[document] = (unit, filled + int(real_T[here_T].sum()))
    return units_RT, np.array(owners, dtype=np.int64)


class Activations(Protocol):
    """Where the activations of a text come from: a language model that is run, or a store that is read."""

    @property
    def device(self) -> torch.device:
        """Where they are."""
        ...

    def of_rows(
        self, text: HeldOutText, rows: slice | Sequence[int], locations: Sequence[Location]
    ) -> dict[Location, Tensor]:
        """The tensor [B, T, D] at every location, of some rows of the text."""
        ...


@dataclass(frozen=True)
class Survey:
    """What a look at a location finds: the mean that ablation uses, and where outliers begin."""

    mean_D: Tensor  # float32, over tokens that are neither special, padding nor outlying
    norm_limit: float
    """10 × the median norm; attention sinks lie far beyond it."""
    n_outliers: int
    n_tokens: int


@torch.no_grad()
def survey(
    model: Activations, text: HeldOutText, locations: Sequence[Location], batch_rows: int
) -> dict[Location, Survey]:
    """Look at the whole text in a pass that ends at the deepest location.

    Nothing of what is found depends on how the text is cut into batches, but for the rounding of the forward passes.
    """
    looks = {at: Look() for at in locations}
    while open_ := {at: look for at, look in looks.items() if look.found is None}:
        look_at(model, text, open_, batch_rows)
        for look in open_.values():
            look.conclude()
    return {at: look.found for at, look in looks.items() if look.found is not None}


@torch.no_grad()
def look_at(model: Activations, text: HeldOutText, looks: Mapping[Location, Look], batch_rows: int) -> None:
    """Show a text, or a part of one, to looks at some locations."""
    with progress("looking at the text", len(text) * text.context) as bar:
        for rows in text.batches(batch_rows):
            real_BT = torch.from_numpy(text.real_RT[rows]).to(model.device)
            for at, x_BTD in model.of_rows(text, rows, list(looks)).items():
                looks[at].add(x_BTD.float()[real_BT])
            bar.advance((rows.stop - rows.start) * text.context)


class Look:
    """The mean within ten times the median norm, which is known only at the end: what may lie beyond it is kept apart.

    Apart are tokens beyond half the limit that the first batch suggests. Should the limit be lower still, the text is
    looked at once more.
    """

    def __init__(self, apart: float | None = None) -> None:
        self.found: Survey | None = None
        self.apart = apart
        """The norm beyond which a token is kept apart; None before the first batch."""
        self._begin()

    def _begin(self) -> None:
        self._norms: list[Tensor] = []
        self._far: list[Tensor] = []
        self._sum_D: Tensor | None = None

    def add(self, x_ND: Tensor) -> None:
        """Take the tokens of a batch in, special ones and padding left out."""
        norms_N = x_ND.norm(dim=-1)
        if self.apart is None:
            self.apart = OUTLIER_FACTOR / 2 * float(norms_N.median()) if len(norms_N) else float("inf")
        far_N = norms_N > self.apart
        self._norms.append(norms_N.cpu())
        self._far.append(x_ND[far_N].cpu())
        near_D = x_ND[~far_N].double().sum(0)
        self._sum_D = near_D if self._sum_D is None else self._sum_D + near_D

    def state(self) -> State:
        """What it holds."""
        nothing = torch.zeros(0)
        parts = {"norms": torch.cat(self._norms or [nothing]), "far": torch.cat(self._far or [nothing])}
        sum_D = None if self._sum_D is None else self._sum_D.cpu().numpy()
        return {"apart": self.apart, "sum": sum_D} | {name: part.numpy() for name, part in parts.items()}

    def merge(self, later: State) -> None:
        """Take in what another look saw of other rows."""
        if later["sum"] is None:
            return
        sum_D = torch.from_numpy(later["sum"])
        self._norms.append(torch.from_numpy(later["norms"]))
        self._far.append(torch.from_numpy(later["far"]))
        self._sum_D = sum_D if self._sum_D is None else self._sum_D + sum_D.to(self._sum_D.device)
        # What is not apart lies within the limit only if the limit is beyond each of them.
        self.apart = later["apart"] if self.apart is None else max(self.apart, later["apart"])

    def conclude(self) -> None:
        """After the last batch: what was found, if what was kept apart suffices to say it."""
        norms_N, far_ND = torch.cat(self._norms), torch.cat(self._far)
        limit = OUTLIER_FACTOR * float(norms_N.median()) if len(norms_N) else float("inf")
        if self.apart is not None and limit < self.apart:
            self.apart = limit
            self._begin()
            return
        assert self._sum_D is not None  # noqa: S101 - a text has at least one row
        inlying = int((norms_N <= limit).sum())
        near_D = far_ND[far_ND.norm(dim=-1) <= limit].double().sum(0).to(self._sum_D.device)
        mean_D = (self._sum_D + near_D) / max(1, inlying)
        self.found = Survey(mean_D.float(), limit, len(norms_N) - inlying, len(norms_N))
