"""Rows on disk: which rows a report needs, which of them an earlier evaluation of the same text measured, which go
together.

Rows lie in ``rows/FINGERPRINT/`` in the report's folder; the fingerprint covers everything that changes what a row
would say: the model's weights and dtype, every token of the text, the seed and the version of the measures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from .subjects import Subject
from .table_row import MeasuredRow

MEASURES_VERSION = 2
"""Raised when a kept row of an earlier version would mean something else."""


def slug(text: str) -> str:
    """A name fit for a file."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


class Shelf:
    """The rows of one report.

    Args:
        folder: of the report.
        facts: everything the measurements depend on.
        layers: at which references are measured.
        references: their names.
        subjects: the SAEs.
        fresh: take no row that was there before.

    """

    def __init__(
        self,
        folder: Path,
        facts: Sequence[object],
        layers: Sequence[int],
        references: Sequence[str],
        subjects: Sequence[Subject],
        *,
        fresh: bool,
    ):
        self._folder = folder / "rows" / sha256(repr((MEASURES_VERSION, *facts)).encode()).hexdigest()[:12]
        self.wanted: dict[str, tuple[int, str | Subject]] = {
            f"l{layer}-{name}.npz": (layer, name) for layer in layers for name in references
        }
        for subject in subjects:
            split = "" if subject.scope == 1 else f"-split{subject.scope:g}"
            key = f"l{subject.layer}-{slug(subject.name)}-{subject.fingerprint[:8]}{split}.npz"
            self.wanted[key] = (subject.layer, subject)
        self._rows: dict[str, MeasuredRow] = {}
        if not fresh:
            found = {key: MeasuredRow.load(self._folder / key) for key in self.wanted}
            self._rows = {key: self._refreshed(key, row) for key, row in found.items() if row is not None}

    def _refreshed(self, key: str, row: MeasuredRow) -> MeasuredRow:
        """A kept row, with what may have changed around unchanged weights: its path, its name and its other half."""
        what = self.wanted[key][1]
        if not isinstance(what, str):
            row.name, row.role, row.pair, row.facts = what.name, what.role, what.pair, what.facts
        return row

    def put(self, key: str, row: MeasuredRow) -> None:
        """Keep a finished row."""
        row.save(self._folder / key)
        self._rows[key] = row

    @property
    def rows(self) -> list[MeasuredRow]:
        """All finished rows, in the report's order."""
        return [self._rows[key] for key in self.wanted if key in self._rows]

    @property
    def missing(self) -> list[str]:
        """Keys of rows still to be measured."""
        return [key for key in self.wanted if key not in self._rows]

    def passes(self, limit_bytes: float) -> Iterator[list[str]]:
        """Missing rows that are measured together: references beside the first SAEs, SAEs while their weights fit."""
        part: list[str] = []
        held = 0.0
        for key in self.missing:
            what = self.wanted[key][1]
            size = 0.0 if isinstance(what, str) else 8.0 * what.facts.d_model * what.facts.n_features
            if part and size and held + size > limit_bytes:
                yield part
                part, held = [], 0.0
            part.append(key)
            held += size
        if part:
            yield part
