"""Stores, runs and reports on disk: found below a folder, told in a line each, and removed where nothing needs them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .console import format_count
from .errors import TcsaeError, UsageError
from .evaluate.config import REFERENCES_FOLDER, STATES_FOLDER
from .system.atomic_files import plain_errors, sync_folder
from .system.untrusted_files import shown

KINDS = ("store", "run", "report", "codes", "references")
_DEEPEST = 6  # folders below the one that is searched
_REMOVED = ".removed-"  # what a folder is renamed to before it is emptied, so that half of one is never taken for it


@dataclass(frozen=True)
class Entry:
    """A store, a run, a report, or the reference rows that reports share.

    Attributes:
        kind: store, run, report, codes, references, or removed: what a stopped ``rm`` left over.
        path: its folder.
        n_bytes: of all files in it.
        finished: whether nothing is left to do.
        state: what it is, and how to finish it.
        needs: folders of ours that it cannot do without.
        damaged: it cannot be read; ``state`` says why.

    """

    kind: str
    path: Path
    n_bytes: int
    finished: bool
    state: str
    needs: tuple[Path, ...] = field(default=())
    damaged: bool = False

    def facts(self) -> dict[str, Any]:
        """For machines."""
        plain = asdict(self) | {"path": str(self.path), "needs": [str(path) for path in self.needs]}
        return {name.removeprefix("n_"): value for name, value in plain.items()}


def entries(folders: Sequence[str | Path]) -> list[Entry]:
    """Everything of ours below ``folders``, sorted by path; folders that begin with a dot are not searched, but for
    the reference rows beside reports.

    Raises:
        UsageError: one of them is no folder.

    """
    found: dict[Path, Entry] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"{shown(folder)} is no folder: name one that holds stores, runs or reports")
        for kind, path in _below(folder):
            found.setdefault(path.resolve(), _entry(kind, path))
    return [found[path] for path in sorted(found)]


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    for place, inside, _ in os.walk(folder):
        path = Path(place)
        kind = _kind(path)
        if kind is not None:
            yield kind, path
            # A report may have further ones inside; nothing is inside a store or a run.
            inside[:] = [] if kind != "report" else [name for name in inside if name not in ("rows", "figures")]
        elif len(path.relative_to(folder).parts) >= _DEEPEST:
            inside[:] = []
        inside[:] = sorted(
            name for name in inside if not name.startswith(".") or _REMOVED in name or name == REFERENCES_FOLDER
        )


def _kind(path: Path) -> str | None:
    if _REMOVED in path.name:
        return "removed"
    if path.name == REFERENCES_FOLDER:
        return "references"
    for name, kind in (("train.json", "run"), ("results.json", "report")):
        if (path / name).is_file():
            return kind
    if next(path.glob("rows/*/*.npz"), None) is not None:
        return "report"  # of an evaluation that was stopped
    if path.suffix != ".zarr" or not (path / "zarr.json").is_file():
        return None
    return "codes" if (path / "values").is_dir() else "store"


def _entry(kind: str, path: Path) -> Entry:
    n_bytes = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    if kind == "removed":
        return Entry(kind, path, n_bytes, False, "left over by `pipeline rm`, which was stopped: remove it again")
    describe: Callable[[Path], tuple[bool, str, tuple[Path, ...]]] = {
        "store": _store,
        "run": _run,
        "report": _report,
        "codes": _codes,
        "references": _references,
    }[kind]
    try:
        return Entry(kind, path, n_bytes, *describe(path))
    except (TcsaeError, OSError) as failure:
        return Entry(kind, path, n_bytes, False, str(failure), damaged=True)


def _store(path: Path) -> tuple[bool, str, tuple[Path, ...]]:
    from .cache.store import ActivationStore

    store = ActivationStore.open(str(path), allow_unfinished=True)
    manifest = store.manifest
    what = f"{manifest.model.id} layer {manifest.location}, {format_count(store.n_tokens)} tokens × {store.d_model}"
    if store.finished:
        return True, what, ()
    rest = f"{store.n_rows} of {manifest.planned_rows} rows: the same `pipeline extract` goes on"
    return False, f"{what}, {rest}", ()


def _run(path: Path) -> tuple[bool, str, tuple[Path, ...]]:
    from .train.run_folder.checkpoint import checkpoints
    from .train.run_folder.record import EXTENSION, RECORD, load_run

    record = load_run(path)
    about = record.config.get("sae", {})
    what = f"{about.get('architecture', 'sae')} {about.get('activation', '')}, layer {record.location}"
    twin = (path.parent / record.twin,) if record.twin and (path.parent / record.twin / "train.json").is_file() else ()
    if record.finished:
        what = f"{what}, {format_count(record.steps)} step{'s' if record.steps != 1 else ''}"
        if (path / EXTENSION / RECORD).exists():
            planned = load_run(path / EXTENSION).planned_steps
            return (
                True,
                f"{what}, on the way to {planned}: `pipeline train --extend` goes on",
                (Path(record.store), *twin),
            )
        return True, what, twin
    done = max(checkpoints(path), default=0)
    command = "finetune" if record.finetuned else "train"
    begun = (Path(record.origin["path"]),) if record.finetuned else ()
    state = f"{what}, {done} of {record.planned_steps} steps: the same `pipeline {command}` goes on"
    return False, state, (Path(record.store), *twin, *begun)


def _report(path: Path) -> tuple[bool, str, tuple[Path, ...]]:
    from .evaluate.results import read_results

    if not (path / "results.json").is_file():
        rows = len(list(path.glob("rows/*/*.npz")))
        kept = f"{rows} row{'s are' if rows != 1 else ' is'} kept"
        return False, f"{kept}: the same `pipeline evaluate` goes on", ()
    report = read_results(path / "results.json")
    saes = sum(record.kind == "sae" for record in report.records)
    what = f"{saes} SAE{'s' if saes != 1 else ''} of {report.model.id} on {format_count(report.n_tokens)} tokens"
    failed = f", {len(report.failures)} could not be evaluated" if report.failures else ""
    return True, what + failed, ()


def _references(path: Path) -> tuple[bool, str, tuple[Path, ...]]:
    rows = sum(not file.name.endswith("-survey.npz") for file in path.glob("*/*.npz"))
    states = " and states of the model" if any(path.glob(f"*/{STATES_FOLDER}/*")) else ""
    kept = f"{rows} row{'s' if rows != 1 else ''}{states} that reports share"
    return True, f"{kept}: removing them costs the next evaluation their time, no report needs them", ()


def _codes(path: Path) -> tuple[bool, str, tuple[Path, ...]]:
    from .evaluate.codes.format import read_manifest

    manifest = read_manifest(path)
    what = f"of {manifest.run}, layer {manifest.location}, {manifest.planned_rows} rows"
    if manifest.kept_by == "evaluate":
        again = "" if manifest.finished else ", not all of them: the same `pipeline evaluate --codes` writes them anew"
        return manifest.finished, f"{what} that were evaluated on{again}", ()
    if manifest.finished:
        return True, what, ()
    return False, f"{what}, not all of them: the same `pipeline encode` goes on", (Path(manifest.store),)


def removable(paths: Sequence[str | Path], within: Sequence[str | Path], *, force: bool = False) -> list[Entry]:
    """What ``paths`` are, in the order in which they can go.

    Args:
        paths: folders of stores, runs, reports.
        within: folders that are searched for whoever needs them.
        force: even if something needs them.

    Raises:
        UsageError: a path is nothing of ours, or something that stays needs it.

    """
    chosen: list[Entry] = []
    for path in map(Path, paths):
        kind = _kind(path) if path.is_dir() and not path.is_symlink() else None
        if kind is None:
            raise UsageError(f"{shown(path)} is no store, run or report of ours: `pipeline ls` lists them")
        if path.resolve() not in {entry.path.resolve() for entry in chosen}:
            chosen.append(_entry(kind, path))
    going = {entry.path.resolve() for entry in chosen}
    for other in () if force else entries(within):
        if other.path.resolve() in going:
            continue
        for need in other.needs:
            if need.resolve() in going:
                why = f"the {other.kind} {other.path} needs it"
                raise UsageError(f"{shown(need)} is not removed: {why}; remove that one, too, or say --force")
    return chosen


def remove(entry: Entry) -> None:
    """Remove a folder: under another name first, so that whatever stops this, half of it is never taken for the whole.

    Raises:
        RunError: a process trains in it, or it cannot be removed.
        StoreError: a process writes it.

    """
    with plain_errors(f"remove {entry.path}"), ExitStack() as locks:
        if entry.kind == "run":
            from .train.run_folder.member_folders import lock_folder

            locks.enter_context(lock_folder(entry.path))
        if entry.kind == "store":
            from .cache.storage.lock import acquire
            from .cache.storage.open_place import place_of

            locks.callback(acquire(place_of(entry.path)).release)
        if entry.kind == "codes":
            from .cache.storage.lock import acquire
            from .cache.storage.open_place import place_of
            from .evaluate.codes.format import LOCK

            locks.callback(acquire(place_of(entry.path), key=LOCK).release)
        gone = entry.path
        if entry.kind != "removed":
            gone = entry.path.with_name(f".{entry.path.name}{_REMOVED}{uuid.uuid4().hex[:8]}")
            entry.path.rename(gone)
            sync_folder(gone.parent)
        shutil.rmtree(gone)
