"""Which run folders may be written: new ones, unfinished ones of the same run, and finished ones never by accident."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...cache.store import ActivationStore
from ...errors import RunError
from ...plugins import changed_plugin, load_plugins
from ...system.atomic_files import PARTIAL, make_folder, plain_errors, sync_folder
from ...system.untrusted_files import shown
from ..config import DataConfig, TrainConfig
from ..plan import MemberPlan
from ..presets import changed
from .checkpoint import checkpoints, drop_checkpoints
from .metrics_log import METRICS, read_metrics
from .record import RECORD, SAE_CONFIG, SAE_WEIGHTS, RunRecord, load_run

# Fields that may differ when a run is resumed: where and how it is written, not what it computes.
_FREE = {
    "run.out",
    "run.name",
    "run.baseline",
    "run.device",
    "run.log",
    "run.checkpoint_every",
    "run.checkpoint_minutes",
    "run.log_every",
    "run.plugins",
    "run.local_cache",
    "run.cache_dir",
    "data.store",
}


_LEFT = {"tensorboard", "wandb"}  # folders that are kept when a run starts again


@dataclass(frozen=True)
class MemberFolder:
    """A member and the state of its folder.

    ``done``: the run is finished. ``record``: the record of an existing run, finished or not; None for a new one.
    """

    plan: MemberPlan
    folder: Path
    record: RunRecord | None = None
    done: bool = False

    @property
    def failure(self) -> str:
        """Why the same training failed before; empty where it did not. It is not tried again."""
        return self.record.failure if self.record is not None else ""

    @property
    def settled(self) -> bool:
        """Whether nothing is left to train."""
        return self.done or bool(self.failure)

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run can be resumed from a checkpoint."""
        return self.record is not None and bool(checkpoints(self.folder))


def member_folders(
    plans: Sequence[MemberPlan], store: ActivationStore, *, fresh: bool, default_length: bool = False
) -> list[MemberFolder]:
    """Decide for every member whether it starts, continues or is finished; changes nothing.

    Args:
        plans: the members.
        store: the store they are trained on.
        fresh: replace existing runs.
        default_length: the user gave no number of steps; an existing run then keeps its number, even if the store has
            grown since.

    Raises:
        RunError: without ``fresh``: a run of that name exists with another configuration or store, or is finished but
            damaged. In any case: the folder holds other files.
        UsageError: the name cannot be the name of a folder.

    """
    return [_member_folder(plan, store, fresh=fresh, default_length=default_length) for plan in plans]


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a run folder for the duration of the block; the kernel releases it if this process dies.

    Raises:
        RunError: another process trains in it, or it cannot be opened.

    """
    with plain_errors(f"lock {folder}"):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise RunError(f"another process trains {folder}: wait for it, or give another --name or --out") from None
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def locked(folders: Sequence[MemberFolder]) -> Iterator[None]:
    """Lock the run folders that will be written, for the duration of the block.

    The kernel releases the locks if this process dies. Once all folders are locked, those of members that start again
    are emptied of the files of a run.

    Raises:
        RunError: another process trains in one of them, or a folder cannot be created.

    """
    with ExitStack() as locks:
        for each in folders:
            if not each.settled:
                with plain_errors(f"write into {each.folder}"):
                    make_folder(each.folder)
                locks.enter_context(lock_folder(each.folder))
        for each in folders:
            if each.record is None:
                _clear(each.folder)
            elif each.done:  # a process that was killed while deleting checkpoints may have left some
                drop_checkpoints(each.folder)
        yield


def _member_folder(plan: MemberPlan, store: ActivationStore, *, fresh: bool, default_length: bool) -> MemberFolder:
    folder = plan.folder
    with plain_errors(f"look into {folder}"):
        begun = (folder / RECORD).exists()
        if not begun:
            _refuse_foreign(folder)
    if not begun:
        return MemberFolder(plan, folder)
    if fresh:
        return MemberFolder(plan, folder)
    record = load_run(folder)
    asked = plan
    was_asked = record.parts and plan.config.run.steps == record.parts[0].steps  # before it was extended
    if default_length or was_asked:
        plan = replace(plan, config=changed(plan.config, {"run.steps": record.planned_steps}))
    failed = bool(record.failure) and first_difference(record.config, plan.config.model_dump(mode="json")) is None
    if not record.finished and not failed and not checkpoints(folder) and not read_metrics(folder):
        return MemberFolder(asked, folder)  # it ended before the first line of metrics, so there is nothing to resume
    _same(plan.config, record, store, folder)
    if record.finished:
        record.check_files(folder)
    return MemberFolder(plan, folder, record, done=record.finished)


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder without a record, unless it holds only what an interrupted run leaves."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{folder} is a file: give another --name or --out")
    for found in sorted(folder.iterdir()):
        if found.name not in _LEFT and not found.name.endswith(PARTIAL):
            what = f"{folder} is no training run and holds other files ({shown(found.name)})"
            raise RunError(f"{what}: give another --name or --out, or remove it")


def _same(config: TrainConfig, record: RunRecord, store: ActivationStore, folder: Path) -> None:
    plugin = changed_plugin(record.plugins, load_plugins(config.run.plugins))
    if plugin:
        raise RunError(f"{folder}: {plugin}; give another --name or --out, or replace it with --fresh")
    difference = first_difference(record.config, config.model_dump(mode="json"))
    if difference:
        raise RunError(
            f"{folder} holds another run: {difference}; give another --name or --out, or replace it with --fresh"
        )
    if store.n_rows < record.store_rows or store.fingerprint(record.store_rows) != record.store_fingerprint:
        what = f"the first {record.store_rows} rows of {store.path} are not those that {folder} was trained on"
        raise RunError(f"{what}: give the store it began with, another --name, or replace it with --fresh")


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first field in which two configurations would compute something different, in words.

    A field that the old configuration does not have yet counts as its default.
    """
    defaults = TrainConfig().model_dump(mode="json")
    if "data" in old:  # whose siblings were true or false
        old = old | {"data": DataConfig.model_validate(old["data"]).model_dump(mode="json")}
    for group, fields in new.items():
        if not isinstance(fields, dict):
            continue
        for key, value in fields.items():
            before = old.get(group, {}).get(key, defaults[group].get(key))
            if f"{group}.{key}" not in _FREE and before != value:
                return f"{group}.{key} was {before!r} and is now {value!r}"
    return None


def _clear(folder: Path) -> None:
    """Remove a run.

    Its record is removed last, after the other removals are durable: a folder without a record does not count as a run.
    """
    with plain_errors(f"empty {folder}"):
        drop_checkpoints(folder)
        for name in (METRICS, SAE_CONFIG, SAE_WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
        (folder / RECORD).unlink(missing_ok=True)
