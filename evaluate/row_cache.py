"""Rows kept on disk: which rows a report needs, which of them an earlier evaluation of the same text measured, and
which are measured in one pass.

Rows lie in ``rows/FINGERPRINT/`` in the report's folder. The fingerprint covers everything that changes what a row
would say: the model's weights and dtype, every token of the text, the seed, and the code that measures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from inspect import getsource
from pathlib import Path

from ..errors import UsageError
from ..registry import Registry
from ..sites import Location
from .config import UNTRAINED_TWINS
from .metrics.registry import METRICS
from .subjects import Subject, UntrainedTwin, untrained_twins
from .table_row import MeasuredRow

MEASURING = (
    *("evaluate/features", "evaluate/intervals", "evaluate/metrics", "evaluate/model"),
    *("evaluate/one_pass.py", "evaluate/protocol.py", "evaluate/table_row.py", "extract/model", "train/sae"),
)
"""The source that rows are made by: files, and folders with all their files."""
_NOT_MEASURING = {"report panel", "temporal term", "partner"}
"""What a plug-in may register without any row depending on it: rows come before the page and after the training."""


def measuring_code(plugins: Mapping[str, str]) -> str:
    """Hash of everything that measures: this program's source and the plug-ins (file name → SHA-256) that matter.

    Raises:
        UsageError: a metric was registered by no file whose source could be hashed.

    """
    root, digest = Path(__file__).parents[1], sha256()
    for part in MEASURING:
        files = [root / part] if part.endswith(".py") else sorted((root / part).rglob("*.py"))
        for file in files:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    for name, plugin in sorted(plugins.items()):
        kinds = Registry.kinds(name)
        if not kinds or kinds - _NOT_MEASURING:
            digest.update(plugin.encode())
    for name in METRICS.among(plugins):
        if not METRICS.is_own(name) and METRICS.owner(name) is None:  # in a notebook, say
            try:
                digest.update(getsource(METRICS.get(name).written_as).encode())
            except (OSError, TypeError):
                raise UsageError(
                    f"the source of the metric '{name}' cannot be read, so rows measured with another version of it "
                    "could not be told from these: write it into a file and load that as a plug-in"
                ) from None
    return digest.hexdigest()


def slug(text: str) -> str:
    """A name fit for a file."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


class RowCache:
    """The rows of one report.

    Args:
        folder: of the report.
        facts: everything that the measurements depend on, :func:`measuring_code` included.
        locations: at which references are measured.
        references: their names.
        subjects: the SAEs.
        fresh: take no row that was there before.

    """

    def __init__(
        self,
        folder: Path,
        facts: Sequence[object],
        locations: Sequence[Location],
        references: Sequence[str],
        subjects: Sequence[Subject],
        *,
        fresh: bool,
    ):
        self._inside = f"rows/{sha256(repr(tuple(facts)).encode()).hexdigest()[:12]}"
        self._folder = folder / self._inside
        self.wanted: dict[str, tuple[Location, str | Subject | UntrainedTwin]] = {
            f"{at.short}-{name}.npz": (at, name) for at in locations for name in references if name != UNTRAINED_TWINS
        }
        for twin in untrained_twins(subjects) if UNTRAINED_TWINS in references else ():
            self.wanted[f"{twin.at.short}-{slug(twin.name)}-{twin.fingerprint[:8]}.npz"] = (twin.at, twin)
        for subject in subjects:
            split = "" if subject.scope == 1 else f"-split{subject.scope:g}"
            key = f"{subject.at.short}-{slug(subject.name)[:100]}-{subject.fingerprint[:8]}{split}.npz"
            self.wanted[key] = (subject.at, subject)
        self._rows: dict[str, MeasuredRow] = {}
        if not fresh:
            found = {key: MeasuredRow.load(self._folder / key) for key in self.wanted}
            self._rows = {key: self._refreshed(key, row) for key, row in found.items() if row is not None}

    def _refreshed(self, key: str, row: MeasuredRow) -> MeasuredRow:
        """A kept row, with what may have changed around unchanged weights: its path, name, pair and notes."""
        what = self.wanted[key][1]
        row.file = f"{self._inside}/{key}"
        return row.described_by(what) if isinstance(what, Subject) else row

    def put(self, key: str, row: MeasuredRow) -> None:
        """Keep a finished row."""
        row.save(self._folder / key)
        row.file = f"{self._inside}/{key}"
        self._rows[key] = row

    @property
    def finished(self) -> list[MeasuredRow]:
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
            size = 0.0 if isinstance(what, str) else float(what.n_bytes)
            if part and size and held + size > limit_bytes:
                yield part
                part, held = [], 0.0
            part.append(key)
            held += size
        if part:
            yield part
