"""What a finished study consists of: which SAE of which report is which variant, seed and place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StudyMember:
    """One SAE of a study, trained and evaluated, or failed with a sentence."""

    model: str
    place: str
    """Layer and site, as names of stores have it: ``l12`` or ``l12.mlp_out``."""
    variant: str
    seed: int
    row: str
    """Name of its record in the report."""
    untrained: str | None
    """Name of the record of its untrained twin in the same report; None where it has none."""
    report: Path
    """Folder of the report: ``results.json``, and ``rows/`` with sums per unit of text."""
    run: Path
    """Run folder."""
    failure: str | None = None
