"""A finished report that is asked for again is shown as it is: nothing is loaded, measured or drawn.

Beside a report lies what was asked (every option, the versions of the packages that shape numbers) and the state of
every file that it was made of and that it consists of: size, time of the last change in nanoseconds and inode. Where
any of these differs, or one of the inputs is on the hub and may have moved, the evaluation runs as ever.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import TcsaeError
from ..system.atomic_files import write_json
from ..system.checksums import content_hash
from ..system.untrusted_files import read_json
from .config import CODES_FOLDER, EvaluateConfig
from .flat import write_tables
from .results import EvaluationReport, Failure, read_results, write_results

ASKED = "asked.json"
_MOST_FILES = 20_000
_PACKAGES = ("torch", "transformers", "numpy", "scikit-learn", "matplotlib", "jinja2", "tcsae")


@dataclass(frozen=True)
class Outcome:
    """One report and where it lies."""

    report: EvaluationReport
    folder: Path
    page: Path | None
    sentences: tuple[str, ...] | None = None
    """What its verdict says first, where that is known without computing it."""

    def with_failures(self, failures: Sequence[Failure]) -> Outcome:
        """The same, with what failed after its report was written; written again."""
        from .report.page import write_report

        report = self.report.model_copy(update={"failures": [*self.report.failures, *failures]})
        write_results(report, self.folder)
        write_tables(report, self.folder)
        return Outcome(report, self.folder, write_report(report, self.folder))


@dataclass
class Asked:
    """What is asked, and the states of what it is answered from, noted before anything of that is read."""

    question: dict[str, Any]
    inputs: dict[str, Any] | None
    """By path; None where something may change without a trace here."""

    @classmethod
    def of(cls, config: EvaluateConfig) -> Asked:
        """The options and the files that they name."""
        return cls(_question(config), _state_of(_inputs(config)))

    def reads(self, paths: Iterable[Path] | None) -> None:
        """Note files and folders that are read besides; None: something that may change without a trace here."""
        more = None if paths is None else _state_of(paths)
        self.inputs = None if more is None or self.inputs is None else self.inputs | more

    def remember(self, outcomes: Sequence[Outcome]) -> None:
        """Write it beside the reports that answer it, with the states of these."""
        from .report.verdict import first_sentences, verdicts

        if self.inputs is None:
            return
        reports = [
            {
                "folder": one.folder.name,
                "page": one.page is not None,
                "state": _state_of(_parts(one.folder)),
                "sentences": list(first_sentences(verdicts(one.report))),
            }
            for one in outcomes
        ]
        for outcome in outcomes:
            write_json(outcome.folder / ASKED, {"question": self.question, "inputs": self.inputs, "reports": reports})


def shown_again(config: EvaluateConfig) -> list[Outcome] | None:
    """The reports that answer exactly this, untouched since they were written; None where there are none."""
    if config.fresh:
        return None
    question = _question(config)
    for file in sorted(Path(config.out).glob(f"*/{ASKED}")):
        try:
            found = read_json(file)
            if found["question"] == question and _state_of(map(Path, found["inputs"])) == found["inputs"]:
                return [_outcome(Path(config.out), one) for one in found["reports"]]
        except (TcsaeError, KeyError, TypeError, ValueError):
            continue  # damaged, or of a report that is no longer whole: evaluated as ever
    return None


def _outcome(out: Path, kept: dict[str, Any]) -> Outcome:
    folder = out / Path(kept["folder"]).name
    if kept["state"] is None or _state_of(_parts(folder)) != kept["state"]:
        raise ValueError("the report has changed")
    page = folder / "index.html" if kept["page"] else None
    return Outcome(read_results(folder), folder, page, tuple(map(str, kept["sentences"])))


def _question(config: EvaluateConfig) -> dict[str, Any]:
    """Everything but files that an answer depends on, in plain JSON."""
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
        if name not in _NO_DIFFERENCE
    }
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    return {"options": options, "versions": versions, "environment": seen, "code": _code(), "place": os.getcwd()}


def _code() -> str:
    """Of every source file of this program: where they lie and their states."""
    root = Path(__file__).parents[1]
    found = {}
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and name not in _NO_CODE]
        for name in files:
            if name.endswith((".py", ".j2", ".css", ".js")):
                path = os.path.join(place, name)
                found[path] = _state(path)
    return content_hash(found)


_NO_DIFFERENCE = {"workers", "scheduler"}
"""Options on which no answer depends."""
_NO_CODE = {"tests", "docs", "benchmarks", "node_modules", "cache_demo", "build", "dist", "runs", "reports"}


def _inputs(config: EvaluateConfig) -> set[Path]:
    """Files and folders that the options name; finished runs may appear among those in their folder."""
    named = {Path(path) for path in (*config.runs, *config.saes, *config.plugins)}
    return named if config.runs or config.saes else named | {Path(config.runs_folder)}


def _parts(folder: Path) -> list[Path]:
    """The files of a report, of kept codes what says that they are there; without panels there are no figures."""
    figures = folder / "figures"
    codes = sorted(folder.glob(f"{CODES_FOLDER}/*/zarr.json"))
    return [folder / "results.json", folder / "index.html", *([figures] if figures.is_dir() else []), *codes]


def _state_of(paths: Iterable[Path]) -> dict[str, Any] | None:
    """The states of files, and of all files in folders, by path; None where one is not there or there are too many."""
    found: dict[str, Any] = {}
    n = 0
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            found[str(path)] = {str(file.relative_to(path)): _state(file) for file in files}
            n += len(files)
        elif path.is_file():
            found[str(path)] = _state(path)
        else:
            return None
        if n > _MOST_FILES:
            return None
    return found


def _state(path: str | Path) -> list[int]:
    about = os.stat(path)
    return [about.st_size, about.st_mtime_ns, about.st_ino]
