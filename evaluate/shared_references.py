"""Reference rows that all reports of a folder share, and what a look at the text found: each is measured once.

They depend on the model, the text, the place and the arithmetic alone, not on the SAEs beside them. They lie in
``.references/FINGERPRINT/`` beside the reports; a fingerprint covers all of these and the code that measures. A report
copies what it uses into its own folder, so that it is whole without the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from ..console import warn
from ..sites import Location
from ..system.atomic_files import write_file
from ..system.untrusted_files import open_regular, reason
from .config import REFERENCES_FOLDER, STATES_FOLDER, WITH_FEATURES
from .model.heldout_text import Survey
from .table_row import MeasuredRow, array_hash


def fingerprint_of(facts: Sequence[object]) -> str:
    """A name for what was measured from these facts."""
    return sha256(repr(tuple(facts)).encode()).hexdigest()[:12]


class SharedReferences:
    """Rows by the name of their file.

    Args:
        reports: the folder of the reports.
        plain: everything that a splice depends on: model, text, arithmetic, code.
        more: what the metrics of features depend on besides: seed, metrics, plug-ins.
        quick: whether references are spliced into a share of the rows.

    """

    def __init__(self, reports: Path, plain: Sequence[object], more: Sequence[object], *, quick: bool = False):
        self._plain = reports / REFERENCES_FOLDER / fingerprint_of(plain)
        self._splices = reports / REFERENCES_FOLDER / fingerprint_of((*plain, "quick")) if quick else self._plain
        self._more = reports / REFERENCES_FOLDER / fingerprint_of((*plain, *more))

    @property
    def states(self) -> Path:
        """The folder for the states of the untouched model."""
        return self._plain / STATES_FOLDER

    def _path(self, key: str, name: str) -> Path:
        with_features = name in WITH_FEATURES or name.startswith("untrained:")
        return (self._more if with_features else self._splices) / key

    def row(self, key: str, name: str) -> MeasuredRow | None:
        """The row of the reference called ``name``; None where it was not measured, or is damaged (said)."""
        return MeasuredRow.load(self._path(key, name))

    def put(self, key: str, row: MeasuredRow) -> None:
        """Keep a measured row."""
        row.save(self._path(key, row.name))

    def survey(self, at: Location) -> Survey | None:
        """What a look at a location found; None as for a row."""
        path = self._plain / f"{at.short}-survey.npz"
        if not path.exists():
            return None
        try:
            with open_regular(path) as file, np.load(file, allow_pickle=False) as kept:
                arrays = {name: kept[name] for name in kept.files}
            if str(arrays.pop("check")) != array_hash(arrays):
                raise ValueError("it does not have the hash it says")
            counts = (int(arrays[name]) for name in ("n_outliers", "n_tokens"))
            return Survey(torch.from_numpy(arrays["mean_D"]), float(arrays["norm_limit"]), *counts)
        except Exception as failure:  # damaged archives raise errors of many kinds, and each means the same here
            warn(f"{path} cannot be used ({reason(failure)}): the text is looked at again")
            return None

    def put_survey(self, at: Location, found: Survey) -> None:
        """Keep what a look found."""
        numbers = {name: np.array(getattr(found, name)) for name in ("norm_limit", "n_outliers", "n_tokens")}
        arrays = {"mean_D": found.mean_D.cpu().numpy()} | numbers
        check = np.array(array_hash(arrays))
        path = self._plain / f"{at.short}-survey.npz"
        write_file(path, lambda file: np.savez_compressed(file, allow_pickle=False, check=check, **arrays))
