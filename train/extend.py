"""A finished run goes on: its weights are trained further in a folder of their own, and take the place of the old ones
when all that goes on with them is done.

Whatever stops it, the finished run stays as it was, and the same command goes on. Runs that are compared go on
together: a TC-SAE, its twin, and every other member of a sweep that has the same twin.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cache.store import ActivationStore
from ..console import note
from ..errors import RunError, UsageError
from ..plugins import changed_plugin, load_plugins
from ..system.atomic_files import plain_errors, sync_folder, write_file
from ..system.device import DTYPES, resolve_device, resolve_dtype
from ..system.untrusted_files import read_json
from .config import TrainConfig
from .loop.distributed import World, joined
from .loop.inputs import Inputs
from .passes import train_members
from .plan import MemberPlan
from .presets import changed
from .run import TrainSummary
from .run_folder.checkpoint import checkpoints
from .run_folder.member_folders import MemberFolder, lock_folder, locked
from .run_folder.metrics_log import METRICS, check_loggers, metrics_until
from .run_folder.record import EXTENSION, RECORD, SAE_CONFIG, SAE_WEIGHTS, RunRecord, find_runs, load_run


def extend(
    runs: Iterable[str | Path],
    *,
    steps: int = 0,
    tokens: int = 0,
    fresh: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> TrainSummary:
    """Train finished runs further, by the same number of steps, each with those it is compared with.

    Args:
        runs: run folders, or folders that hold them.
        steps: how many more; or
        tokens: how many tokens more. Neither is needed to go on with an extension that was begun.
        fresh: begin an extension anew that was stopped.
        changes: dotted fields that do not change what is computed, such as ``run.device``; ``data.store`` where the
            store has moved.

    Raises:
        RunError: a run is not finished or damaged, or one of those that go on together fails: then none is replaced.
        StoreError, UsageError, ResourceError: see :func:`~tcsae.train.run.train`.
        KeyboardInterrupt: Ctrl-C; checkpoints are written, and its message says how to go on.

    """
    began = time.perf_counter()
    changes = dict(changes or {})
    chosen = _with_relatives(runs)
    records = {run: load_run(run) for run in chosen}
    for run in chosen:
        _check_can_go_on(run, records[run], changes)
    device = resolve_device(changes.get("run.device", "auto"))
    with ExitStack() as mine:
        world = mine.enter_context(joined(device))
        for run in chosen if world.writes else ():
            mine.enter_context(lock_folder(run))
        begun = {run: load_run(run / EXTENSION) for run in chosen if (run / EXTENSION / RECORD).exists()}
        if fresh and not all(part.finished for part in begun.values()):  # else they are taking their runs' places
            for run in begun if world.writes else ():
                shutil.rmtree(run / EXTENSION)
            begun = {}
        world.wait()
        plans = _plans(records, begun, steps=steps, tokens=tokens, changes=changes)
        metrics: dict[str, Any] = {}
        for path in dict.fromkeys(plan.config.data.store for plan in plans.values()):
            part = {run: plan for run, plan in plans.items() if plan.config.data.store == path}
            metrics |= _train(part, records, ActivationStore.open(path), device, world)
        for run in chosen if world.writes else ():
            take_over(run)
        world.wait()
    now = load_run(chosen[0])
    return TrainSummary(
        runs=chosen,
        skipped=[run for run in chosen if run not in plans],
        steps=now.steps,
        tokens=now.tokens,
        seconds=time.perf_counter() - began,
        metrics=metrics,
    )


def _with_relatives(paths: Iterable[str | Path]) -> list[Path]:
    """The runs, and all in their folders that have the same twin."""
    named: list[Path] = []
    for path in map(Path, paths):
        inside = [] if (path / RECORD).exists() else find_runs(path)
        named += inside or [path]
    found: dict[Path, None] = {}
    for run in named:
        twin = _twin_of(run.name, load_run(run))
        beside = [other.parent for other in sorted(run.parent.glob(f"*/{RECORD}"))]
        family = [other for other in beside if twin is not None and _twin_or_none(other) == twin]
        found |= dict.fromkeys(family if run in family else [run])
    return list(found)


def _twin_of(name: str, record: RunRecord) -> str | None:
    """The name of the twin of its family."""
    return name if record.role == "twin" else record.twin


def _twin_or_none(run: Path) -> str | None:
    try:
        return _twin_of(run.name, load_run(run))
    except RunError:
        return None  # another run than those that were named


def _check_can_go_on(run: Path, record: RunRecord, changes: Mapping[str, Any]) -> None:
    if not record.finished:
        done = max(checkpoints(run), default=0)
        what = f"{run} is not finished ({done:,} of {record.planned_steps:,} steps)"
        raise RunError(f"{what}: finish it with the command that began it, then extend it")
    if not (run / EXTENSION / RECORD).exists():  # which may be taking its place
        record.check_files(run)
    if original := read_json(run / SAE_CONFIG).get("metadata", {}).get("pruned_from"):
        raise UsageError(f"{run} was pruned from {original}: extend {original}, and prune it again")
    plugins = changes.get("run.plugins", record.config.get("run", {}).get("plugins", ()))
    if plugin := changed_plugin(record.plugins, load_plugins(plugins)):
        raise RunError(f"{run}: {plugin}; only the plug-ins that it was trained with can take it further")
    store = ActivationStore.open(changes.get("data.store", record.store))
    if store.n_rows < record.store_rows or store.fingerprint(record.store_rows) != record.store_fingerprint:
        what = f"the first {record.store_rows} rows of {store.path} are not those that {run} was trained on"
        raise RunError(f"{what}: give its store with --store, or train a new run")


def _plans(
    records: Mapping[Path, RunRecord],
    begun: Mapping[Path, RunRecord],
    *,
    steps: int,
    tokens: int,
    changes: Mapping[str, Any],
) -> dict[Path, MemberPlan]:
    """What is still to be trained, or to take its run's place."""
    plans: dict[Path, MemberPlan] = {}
    for run, record in records.items():
        if (run / EXTENSION / METRICS).exists() and run not in begun:
            continue  # it has just taken its run's place
        config = TrainConfig.model_validate(record.config)
        family = [other for other in begun if _twin_of(other.name, records[other]) == _twin_of(run.name, record)]
        relatives = [begun[other] for other in family if other == run or record.twin or record.role == "twin"]
        asked = steps or max(1, tokens // config.data.batch_size) if steps or tokens else 0
        if relatives:
            part = relatives[0].parts[-1]
            if asked not in (0, part.steps):
                what = f"{run} is being extended by {part.steps:,} steps, not by {asked:,}"
                raise UsageError(f"{what}: leave the number out to finish that, or begin it anew with --fresh")
            if record.parts and record.parts[-1].from_step == part.from_step:
                continue  # it has taken its run's place already
            asked = part.steps
        if not asked:
            raise UsageError("--extend needs to know how far: give --steps or --tokens")
        fields = {"run.out": str(run.parent), "run.steps": record.steps + asked, "data.store": record.store, **changes}
        role, store = record.role, record.store_manifest
        plans[run] = MemberPlan(
            run.name, changed(config, fields), role, record.twin, int(store["d_model"]), begun_at=record.steps
        )
    _check_alike(records, plans)
    return plans


def _check_alike(records: Mapping[Path, RunRecord], plans: Mapping[Path, MemberPlan]) -> None:
    """Whether those that are compared have gone equally far.

    Raises:
        RunError: they have not.

    """
    for run in plans:
        for other in plans:
            one, two = records[run], records[other]
            if _twin_of(run.name, one) == _twin_of(other.name, two) is not None and one.steps != two.steps:
                what = f"{run} has {one.steps:,} steps and {other}, which has the same twin, {two.steps:,}"
                raise RunError(f"{what}: they cannot go on side by side, train them again")


def _train(
    plans: Mapping[Path, MemberPlan],
    records: Mapping[Path, RunRecord],
    store: ActivationStore,
    device: Any,
    world: World,
) -> dict[str, Any]:
    """Train what is left; the last metrics by name.

    Raises:
        RunError: one fails: then none of its run's files is touched.

    """
    config = next(iter(plans.values())).config
    check_loggers(config.run.log)
    dtype = DTYPES[resolve_dtype(config.run.dtype, device)]
    folders = [_folder(plan) for plan in plans.values()]
    failures = {each.plan.name: each.failure for each in folders if each.failure}
    with locked(folders if world.writes else []):
        world.wait()
        by_name = {plan.name: records[run] for run, plan in plans.items()}
        metrics: dict[str, Any] = {}
        if not failures:
            metrics, failures = train_members(
                folders, store, lambda each: _inputs(each.plan, by_name[each.plan.name], store), device, dtype, world
            )
    if failures:
        why = next(iter(failures.values()))
        raise RunError(f"{why}; the finished runs stay as they are ('--fresh' begins the extension anew)")
    return metrics


def _folder(plan: MemberPlan) -> MemberFolder:
    if not (plan.folder / RECORD).exists():
        return MemberFolder(plan, plan.folder)
    record = load_run(plan.folder)
    if not record.finished and not record.failure and not checkpoints(plan.folder):
        return MemberFolder(plan, plan.folder)
    return MemberFolder(plan, plan.folder, record, done=record.finished)


def _inputs(plan: MemberPlan, record: RunRecord, store: ActivationStore) -> Inputs:
    """Scale, rows and limit of the finished run, though the store may have grown since."""
    found = Inputs.of(plan.config.data, store.statistics())
    stream = record.ends.get("stream", {}).get("of", {})
    return replace(
        found,
        rows=record.store_rows,
        scale=record.input_scale,
        norm_limit=stream.get("norm_limit", found.norm_limit),
        mean_D=found.mean_D * (record.input_scale / found.scale),
    )


def take_over(run: Path) -> None:
    """Put a finished extension into its run's place; begun again, it ends the same.

    The new files are on the disk before; each takes the place of the old one by a rename, and the record, which says
    which belong together, comes last.

    Raises:
        RunError, ResourceError: the folder cannot be written.

    """
    extension = run / EXTENSION
    if (extension / RECORD).exists():
        record = load_run(extension)
        lines = metrics_until(run, record.parts[-1].from_step) + metrics_until(extension, record.steps)
        write_file(run / METRICS, "".join(f"{line}\n" for line in lines))
        with plain_errors(f"replace the files of {run}"):
            for name in (SAE_CONFIG, SAE_WEIGHTS, RECORD):
                if (extension / name).exists():
                    os.replace(extension / name, run / name)
            sync_folder(run)
        note(f"{run} has {record.steps:,} steps now")
    shutil.rmtree(extension, ignore_errors=True)
