"""The paper's Table 1 in its own layout beside what was measured, with rows that nothing was trained for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ..evaluate.results import Frozen, Number
from .claims import baseline_variant, paper_variant
from .file import StudyFile
from .statistics.effects import At, Measured
from .statistics.resampling import Estimate

TABLE = (  # quantity, the paper's baseline and TC-SAE (Gemma-2-2b, layer 19, width 2304), our metric
    ("KL (nats)", "10.06", "17.75", "kl"),
    ("CE (nats)", "12.44", "20.38", "ce"),
    ("MSE per token", "47.25", "92.5", "mse_per_token"),
    ("explained variance", "", "", "explained_variance"),
    ("cosine(x, x̂)", "−1.0", "0.012", "cosine"),
    ("L0", "0", "1138.52", "l0"),
    ("L1", "0", "8256", "l1"),
)
FORENSIC = {
    "zero_all": "zero, every position",
    "zero_sae": "all-zero SAE",
    "untrained": "untrained SAE",
    "mean": "mean",
    "identity_bf16": "identity (bf16)",
}


class PublishedRow(Frozen):
    """One quantity."""

    quantity: str
    paper_baseline: str
    paper_tc: str
    baseline: Estimate | None
    tc: Estimate | None
    forensic: list[Number] = Field(description="of the reference rows, in the table's order; null where undefined")


class PublishedTable(Frozen):
    """The table at the deepest place of the first model."""

    model: str
    place: str
    width: int | None
    ln_vocabulary: float
    baseline: str | None
    tc: str | None
    forensic: list[str]
    rows: list[PublishedRow]


def published_table(study: StudyFile, measured: Measured, settings: Mapping[str, Mapping[str, Any]]) -> PublishedTable:
    """Paper beside study: its variants of the preset ``paper`` with and without the term, and the reference rows."""
    observations = measured.observations
    first = observations.places[0][0]
    at = [place for place in observations.places if place[0] == first][-1]
    member = next(one for key, one in observations.members.items() if (key[2], key[3]) == at)
    report = observations.reader.report(member.report)
    references = {
        record.name: record
        for record in report.records
        if record.kind == "reference" and record.location.short == at[1] and record.name in FORENSIC
    }
    names = [name for name in FORENSIC if name in references]
    tc, baseline = paper_variant(study, settings), baseline_variant(study, settings)
    rows = [
        PublishedRow(
            quantity=quantity,
            paper_baseline=theirs,
            paper_tc=ours,
            baseline=_level(measured, baseline, at, metric),
            tc=_level(measured, tc, at, metric),
            forensic=[
                None if metric not in references[name].metrics else references[name].metrics[metric].value
                for name in names
            ],
        )
        for quantity, theirs, ours, metric in TABLE
    ]
    width = next((int(settings[name]["n_features"]) for name in (tc, baseline) if name is not None), None)
    return PublishedTable(
        model=at[0],
        place=at[1],
        width=width,
        ln_vocabulary=math.log(report.model.vocab_size),
        baseline=baseline,
        tc=tc,
        forensic=names,
        rows=rows,
    )


def _level(measured: Measured, variant: str | None, at: At, metric: str) -> Estimate | None:
    if variant is None:
        return None
    seeds = measured.seeds([variant], at, metric)
    sampled = measured.of(variant, at, metric, seeds) if seeds else None
    return None if sampled is None else measured.sampling.estimate(sampled)
