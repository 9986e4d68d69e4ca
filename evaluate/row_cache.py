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
from .codes.beside_report import ReportCodes
from .config import UNTRAINED_TWINS
from .metrics.registry import METRICS
from .shared_references import SharedReferences, fingerprint_of
from .subjects import Subject, UntrainedTwin, untrained_twins
from .table_row import MADE_OF, MeasuredRow, row_of_zero_sae

MEASURING = (
    *("evaluate/features", "evaluate/intervals", "evaluate/metrics", "evaluate/model"),
    *("evaluate/one_pass.py", "evaluate/protocol.py", "evaluate/table_row.py", "extract/model", "train/sae"),
    "system/dense_product.py",
)
"""The source that rows are made by: files, and folders with all their files."""
_NOT_MEASURING = {"report panel", "temporal term", "partner"}
"""What a plug-in may register without any row depending on it: rows come before the page and after the training."""
_OF_SAES = {
    *("metric", "architecture", "activation", "SAE file format"),
    *("hand-written step", "hand-written temporal gradient"),
}
"""What it may register without the splice of a reference depending on it."""


def measuring_code(plugins: Mapping[str, str], *, of_saes: bool = True) -> str:
    """Hash of everything that measures: this program's source and the plug-ins (file name → SHA-256) that matter.

    ``of_saes``: SAEs and their features, too; else only what splices references.

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
        if not kinds or kinds - _NOT_MEASURING - (set() if of_saes else _OF_SAES):
            digest.update(plugin.encode())
    for name in METRICS.among(plugins) if of_saes else ():
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
        shared: the reference rows of all reports beside this one.
        codes: those that the report keeps; None: of what has none.
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
        shared: SharedReferences,
        codes: ReportCodes | None = None,
        fresh: bool,
    ):
        self._inside = f"rows/{fingerprint_of(facts)}"
        self._folder, self._shared, self._codes = folder / self._inside, shared, codes
        names = [name for name in references if name != UNTRAINED_TWINS]
        self.wanted: dict[str, tuple[Location, str | Subject | UntrainedTwin]] = {
            _key(at, name): (at, name) for at in locations for name in names
        }
        bases = {_key(at, base): (at, base) for at in locations for name, base in MADE_OF.items() if name in names}
        self._hidden = bases.keys() - self.wanted.keys()
        self.wanted |= {key: bases[key] for key in self._hidden}
        for twin in untrained_twins(subjects) if UNTRAINED_TWINS in references else ():
            self.wanted[f"{twin.at.short}-{slug(twin.name)}-{twin.fingerprint[:8]}.npz"] = (twin.at, twin)
        for subject in subjects:
            split = "" if subject.scope == 1 else f"-split{subject.scope:g}"
            key = f"{subject.at.short}-{slug(subject.name)[:100]}-{subject.fingerprint[:8]}{split}.npz"
            self.wanted[key] = (subject.at, subject)
        self._rows: dict[str, MeasuredRow] = {}
        if not fresh:
            for key in self.wanted:
                if (row := MeasuredRow.load(self._folder / key)) is None:
                    continue
                if self._lacks_codes(key):
                    self.without_codes += 1
                else:
                    self._rows[key] = self._refreshed(key, row)
            for key in list(self._rows):
                self._make_others(key)
            self.from_others = sum(self._copied(key) for key in self.missing)

    from_others = 0
    """How many rows were measured for other reports."""
    without_codes = 0
    """How many that were measured before are measured again, since their codes were not kept then."""

    def _lacks_codes(self, key: str) -> bool:
        what = self.wanted[key][1]
        return self._codes is not None and isinstance(what, Subject) and self._codes.missing(key, what)

    def _name_files(self, key: str, row: MeasuredRow) -> None:
        what = self.wanted[key][1]
        row.file = f"{self._inside}/{key}"
        row.codes = self._codes.found(key, what) if self._codes is not None and isinstance(what, Subject) else ""

    def _refreshed(self, key: str, row: MeasuredRow) -> MeasuredRow:
        """A kept row, with what may have changed around unchanged weights: its path, name, pair and notes."""
        what = self.wanted[key][1]
        self._name_files(key, row)
        return row.described_by(what) if isinstance(what, Subject) else row

    def _copied(self, key: str) -> bool:
        """Whether a reference row was taken over from other reports."""
        what = self.wanted[key][1]
        row = None if isinstance(what, Subject) else self._shared.row(key, what if isinstance(what, str) else what.name)
        if row is not None:
            self._keep(key, row)
        return row is not None

    def put(self, key: str, row: MeasuredRow) -> None:
        """Keep a finished row."""
        if not isinstance(self.wanted[key][1], Subject):
            self._shared.put(key, row)
        self._keep(key, row)

    def _keep(self, key: str, row: MeasuredRow) -> None:
        row.save(self._folder / key)
        self._name_files(key, row)
        self._rows[key] = row
        self._make_others(key)

    def _make_others(self, key: str) -> None:
        """Rows that are made of this one, without measuring."""
        at, what = self.wanted[key]
        for name, base in MADE_OF.items():
            if what == base and (made := _key(at, name)) in self.wanted and made not in self._rows:
                self._keep(made, row_of_zero_sae(self._rows[key]))

    @property
    def finished(self) -> list[MeasuredRow]:
        """All finished rows, in the report's order."""
        return [self._rows[key] for key in self.wanted if key in self._rows and key not in self._hidden]

    @property
    def missing(self) -> list[str]:
        """Keys of rows still to be measured."""
        made = [key for key, (_, what) in self.wanted.items() if isinstance(what, str) and what in MADE_OF]
        return [key for key in self.wanted if key not in self._rows and key not in made]

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


def _key(at: Location, name: str) -> str:
    return f"{at.short}-{name}.npz"
