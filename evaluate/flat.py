"""A report as tables for one's own analysis: a row per record, a column per number."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..system.atomic_files import write_file
from .results import EvaluationReport, Metric, Paired, Record


@dataclass(frozen=True)
class Report:
    """One evaluation. The tables are pandas DataFrames where pandas is installed, else lists of dictionaries."""

    results: EvaluationReport
    """All of it, typed: definitions, curves, feature cards, failures, what was evaluated in and on."""

    @property
    def records(self) -> Any:
        """A row per SAE or reference row and layer: name, kind, role, pair, every metric, its settings by dotted name.

        A metric ``m`` has the columns ``m``, ``m_low`` and ``m_high``: value and 95 % interval, None where undefined.
        """
        return _table([_row(record) for record in self.results.records])

    @property
    def paired(self) -> Any:
        """A row per pair (TC-SAE − twin, pruned − original): paired differences of metrics, named as in ``records``."""
        return _table([_pair(pair) for pair in self.results.paired])

    @property
    def definitions(self) -> Any:
        """A row per metric: what it means, its unit, which direction is good, how its interval is made."""
        return _table([{"metric": key} | one.model_dump() for key, one in self.results.definitions.items()])


def write_tables(results: EvaluationReport, folder: Path) -> tuple[Path, Path]:
    """Write ``records.csv`` and ``paired.csv``, which hold what :class:`Report` has; returns their paths.

    Raises:
        RunError, ResourceError: the files cannot be written.

    """
    records = _write_csv(folder / "records.csv", [_row(record) for record in results.records])
    return records, _write_csv(folder / "paired.csv", [_pair(pair) for pair in results.paired])


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_file(path, text.getvalue())


def _pair(pair: Paired) -> dict[str, Any]:
    about = {"kind": pair.kind, "first": pair.first, "second": pair.second, "layer": pair.layer, "site": pair.site}
    return about | _numbers(pair.metrics) | {"warning": pair.warning}


def _row(record: Record) -> dict[str, Any]:
    about = {name: getattr(record, name) for name in ("name", "layer", "site", "kind", "role", "pair")}
    sae = record.sae
    facts = {} if sae is None else {"path": sae.path, "architecture": sae.architecture, "n_features": sae.n_features}
    return about | facts | _numbers(record.metrics) | ({} if sae is None else sae.settings)


def _numbers(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {
        f"{key}{end}": value
        for key, metric in metrics.items()
        for end, value in (("", metric.value), ("_low", metric.low), ("_high", metric.high))
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    """The rows with the same columns in each."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    whole = [{name: row.get(name) for name in columns} for row in rows]
    try:
        import pandas
    except ImportError:
        return whole
    return pandas.DataFrame(whole, columns=columns)
