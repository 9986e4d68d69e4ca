"""Codes beside a report: those of its runs on the held-out text, as the evaluation's own pass computed them.

Lists, searches, probes and the page of every feature read them: the language model is not needed again, the text is one
that training did not see, and probes ask exactly the codes that the report's numbers are of.

Shapes: R rows, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...cache.format.layout import StoreLayout
from ...cache.format.manifest import Execution, ModelIdentity, StoreManifest, TextIdentity, checksum
from ...cache.format.zarr_documents import to_json
from ...cache.storage.open_place import place_of
from ...console import format_bytes, note
from ...errors import ResourceError, StoreError
from ...sites import Location
from ...system.untrusted_files import parse_json
from ...train.sae.protocol import RowTokens
from ..config import CODES_FOLDER
from ..model.heldout_text import Activations, HeldOutText
from ..results import read_results
from ..subjects import Subject
from ..table_row import Candidate
from .encode import SPARE, weights_hash
from .format import REMEDY, CodesManifest, read_manifest
from .of_pass import CodesOfPass
from .store import CodeStore
from .writer import CodesWriter

LABELS = "values/documents.json"
"""Inside a store of codes: the label of every document that has one."""
KEPT = "codes"
"""The name of what takes the codes in, among the accumulators of a row."""
_SAMPLE_ROWS = 4  # of the estimate


@dataclass(frozen=True)
class MeasuredText:
    """What the codes of all runs of a report have in common."""

    text: HeldOutText
    identity: TextIdentity
    model: ModelIdentity
    fingerprint: str
    """Of the rows of the report's table, and so of everything that decides the codes but the SAE."""
    seed: int
    execution: Execution
    store: str = ""
    """The store of held-out vectors where there is no language model."""
    trained_on: bool = False
    """Whether the runs were trained on these very rows."""


class ReportCodes:
    """The codes of one report.

    Args:
        folder: of the report.
        measured: what they are of.
        wanted: whether a row without codes is measured again for their sake.

    """

    def __init__(self, folder: Path, measured: MeasuredText, *, wanted: bool):
        self._folder, self._measured, self.wanted = folder, measured, wanted

    def found(self, key: str, subject: Subject) -> str:
        """The codes of a row as the report names them; empty where there are none, or others."""
        inside = _inside(key)
        if subject.facts.source != "run" or not (self._folder / inside / "zarr.json").is_file():
            return ""
        try:
            there = read_manifest(self._folder / inside)
        except StoreError as damage:
            note(str(damage))
            return ""
        return inside if there.finished and there.difference(self._manifest(subject)) is None else ""

    def missing(self, key: str, subject: Subject) -> bool:
        """Whether a row that was measured before has to be measured again, since its codes are wanted."""
        return self.wanted and subject.facts.source == "run" and not self.found(key, subject)

    def begin(
        self,
        subjects: Mapping[str, Subject],
        candidates: Sequence[Candidate],
        activations: Activations,
        stack: ExitStack,
    ) -> None:
        """Say what the codes of a pass will take, and make room for them; ``stack`` releases what is opened.

        Args:
            subjects: whose codes are kept, by the keys of their rows.
            candidates: of the pass.
            activations: of the text.
            stack: left when the pass is over, or is given up.

        Raises:
            ResourceError: the disk does not suffice.
            StoreError: another process writes them.

        """
        kept = {one.key: one for one in candidates if KEPT in one.accumulators}
        if not kept:
            return
        n_bytes = self._estimate(list(kept.values()), activations)
        place = place_of(self._folder / CODES_FOLDER)
        free = place.free_bytes()
        if free is not None and n_bytes * SPARE > free[1]:
            raise ResourceError(
                f"{place} needs about {format_bytes(n_bytes)} for codes and {format_bytes(free[1])} are free: free "
                "some space, evaluate fewer --batches, or leave --codes out"
            )
        saes = f"{len(kept)} SAE{'s' if len(kept) > 1 else ''}"
        note(f"the codes of {saes} take about {format_bytes(n_bytes)} in {place}")
        for key, candidate in kept.items():
            path = self._folder / _inside(key)
            manifest = self._manifest(subjects[key], candidate.survey.norm_limit)
            writer = stack.enter_context(CodesWriter.open(path, manifest, fresh=True))
            _keep_labels(path, self._measured.text)
            accumulator: CodesOfPass = candidate.accumulators[KEPT]
            accumulator.write_to(writer)

    @torch.no_grad()
    def _estimate(self, candidates: Sequence[Candidate], activations: Activations) -> int:
        """Bytes of all of them, from a few rows."""
        text, tokens = self._measured.text, len(self._measured.text) * self._measured.text.context
        rows = slice(0, min(_SAMPLE_ROWS, len(text)))
        at_BTD = activations.of_rows(text, rows, sorted({one.row.location for one in candidates}))
        total = 0.0
        for one in candidates:
            assert one.sae is not None  # noqa: S101 - whose codes they are
            batch = text.batch(rows, at_BTD[one.row.location], one.survey.norm_limit)
            z_BTF = one.sae.on_rows(batch.x_BTD, RowTokens.of(batch.valid_BT, batch.documents_BT)).features
            entries = int(torch.count_nonzero(z_BTF[batch.valid_BT]))
            total += bytes_of(tokens, entries / batch.valid_BT.numel())
        return round(total)

    def _manifest(self, subject: Subject, norm_limit: float = float("inf")) -> CodesManifest:
        measured, facts = self._measured, subject.facts
        return CodesManifest(
            run=subject.name,
            weights=weights_hash(facts.path),
            architecture=facts.architecture,
            n_features=facts.n_features,
            store=measured.store,
            store_fingerprint=measured.fingerprint,
            store_manifest=self._manifest_of_store(subject.at, facts.d_model).model_dump(mode="json"),
            planned_rows=len(measured.text),
            trained_rows=len(measured.text) if measured.trained_on else 0,
            norm_limit=norm_limit,
            kept_by="evaluate",
            seed=measured.seed,
        )

    def _manifest_of_store(self, at: Location, d_model: int) -> StoreManifest:
        """As the manifest of a store of the same activations, if there were one."""
        measured, rows, context = self._measured, len(self._measured.text), self._measured.text.context
        return StoreManifest(
            layer=at.layer,
            hook_name=at.hook_name,
            d_model=d_model,
            model=measured.model,
            text=measured.identity,
            execution=measured.execution,
            layout=StoreLayout(d_model, context, rows, rows),
            planned_rows=rows,
            finished=True,
        )


def bytes_of(tokens: int, entries_per_token: float) -> float:
    """Disk that codes take at most: text arrays and bounds of every token, number and value of every entry."""
    return tokens * (9 + 8 + 8 * entries_per_token)


def _inside(key: str) -> str:
    """Where the codes of a row are, seen from the report's folder; ``key`` is the file of the row."""
    return f"{CODES_FOLDER}/{Path(key).stem}.zarr"


def _keep_labels(path: Path, text: HeldOutText) -> None:
    labels: dict[str, str] = {}
    if text.labels_RT is not None:
        documents, first = np.unique(text.documents_RT, return_index=True)
        for document, label in zip(documents.tolist(), text.labels_RT.reshape(-1)[first].tolist(), strict=True):
            if label >= 0:
                labels[str(document)] = text.label_names[label]
    place_of(path).replace(LABELS, to_json({"labels": labels, "check": checksum(labels)}))


def document_labels(codes: CodeStore) -> dict[int, str]:
    """The labels of the documents of codes that an evaluation kept.

    Raises:
        StoreError: they are missing or damaged.

    """
    try:
        found: Any = parse_json(codes.place.read(LABELS))
        labels = found["labels"]
        if found["check"] != checksum(labels):
            raise ValueError("its checksum does not fit")
        return {int(document): str(label) for document, label in labels.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as damage:
        raise StoreError(f"{codes.path}/{LABELS} is missing or damaged ({damage}): {REMEDY}") from None


def kept_beside(run: str | Path, report: str | Path | None) -> Path | None:
    """The codes that a report keeps of a run; None where it keeps none, or there is no report.

    Raises:
        RunError: the report is missing or damaged.
        StoreError: its codes of this run are gone or damaged.

    """
    records = [] if report is None else [record for record in read_results(report).records if record.codes]
    weights = weights_hash(run) if records else ""
    for record in records:
        path = Path(str(report)) / CODES_FOLDER / Path(record.codes).name
        gone = not (path / "zarr.json").is_file()
        if gone and (record.sae is None or Path(record.sae.path).resolve() != Path(run).resolve()):
            continue  # of another run, whose codes nobody asks for
        if read_manifest(path).weights == weights:
            return path
    return None
