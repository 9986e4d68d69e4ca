"""Stage two as one function: a store and a configuration become run folders.

The members of a sweep and their twins train side by side on one stream; what memory cannot hold at once is split into
passes over the same stream. A run folder is complete when its record says so, and the record is written last.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch

from .. import __version__
from ..cache.public_names import hub_name
from ..cache.storage.local_cache import DEFAULT_FOLDER, LocalCache
from ..cache.store import ActivationStore
from ..console import format_bytes, format_count, format_duration, note, progress, warn
from ..errors import ResourceError, RunError, UsageError
from ..plugins import load_plugins
from ..system.device import DTYPES, resolve_device, resolve_dtype
from .config import TrainConfig
from .formats.locate import OWN_MODEL
from .loop.alarms import MembersFailedError
from .loop.compared_inputs import Facts, in_words
from .loop.diagnostics import Metrics
from .loop.distributed import World, joined, seen_by_share
from .loop.inputs import Inputs
from .loop.member import Member
from .loop.memory_plan import available_bytes, estimate, split_passes, step_of
from .loop.schedule import rate_lengths
from .loop.trainer import Pass, siblings_wanted
from .loop.warm_start import begin_from_source, check_sources
from .loss.objective import group_sizes
from .plan import MemberPlan, plan_together, tokens_per_step, view_of
from .presets import changed
from .run_folder.checkpoint import drop_checkpoints, latest_common, load_checkpoint
from .run_folder.member_folders import MemberFolder, locked, member_folders
from .run_folder.metrics_log import check_loggers
from .run_folder.record import RunRecord, TrainedPart, load_run
from .sae.protocol import PREFIX_SIZES

_NAMED = 4  # runs in the sentence that announces them
_OF_A_PASS = (
    *("out", "device", "dtype", "log", "log_every", "checkpoint_every", "checkpoint_minutes"),
    *("local_cache", "cache_dir"),
)


@dataclass(frozen=True)
class TrainSummary:
    """What :func:`train` did."""

    runs: list[Path]  # every run folder asked for that is finished now
    skipped: list[Path]  # those of them that were finished before
    steps: int  # of each run
    tokens: int  # each run has seen
    seconds: float
    metrics: dict[str, Metrics]  # the last ones of every run trained now, by folder name
    failures: dict[str, str] = field(default_factory=dict)  # sentences of those that failed, by folder name

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the closing summary: plain values for machines, words for people."""
        if as_json:
            return asdict(self) | {"runs": list(map(str, self.runs)), "skipped": list(map(str, self.skipped))}
        facts: dict[str, Any] = {path.name: _in_words(self.metrics.get(path.name)) for path in self.runs}
        facts |= {name: f"failed: {sentence}" for name, sentence in self.failures.items()}
        facts |= {"steps": self.steps, "tokens": format_count(self.tokens), "time": format_duration(self.seconds)}
        return facts | {"folder": self.runs[0].parent}


def train(
    configs: TrainConfig | Sequence[TrainConfig],
    *,
    sweep: Mapping[str, Sequence[str]] | None = None,
    fresh: bool = False,
    only: Collection[str] | None = None,
) -> TrainSummary:
    """Train an SAE, its twin with λ2 = 0, and every other point of a sweep; go on with what was begun, keep what is
    finished. Several configurations train side by side on one stream, as far as they agree in its order and scale.

    An SAE whose training fails is left out, and the others go on from the last checkpoint, as they would without it.

    Args:
        configs: the base configuration, or several (:func:`.presets.rivals_of`, say); ``data.store`` names the store.
        sweep: dotted field → values; every combination is trained of every configuration.
        fresh: replace what is there.
        only: names of the runs that are trained now; what all of them share of the stream depends on all.

    Raises:
        StoreError, UsageError, RunError, ResourceError: see the modules that check; also if no run succeeds.
        KeyboardInterrupt: Ctrl-C; checkpoints are written, and its message says how to go on.

    """
    began = time.perf_counter()
    several = [configs] if isinstance(configs, TrainConfig) else list(configs)
    config = _common(several)
    check_loggers(config.run.log)
    for each in several:
        load_plugins(each.run.plugins)
    device = resolve_device(config.run.device)
    dtype = DTYPES[resolve_dtype(config.run.dtype, device)]
    store = ActivationStore.open(config.data.store, cache=_cache(config))
    statistics = store.statistics()
    about = {"layer": store.layer, "site": store.location.site, "d_model": store.d_model}
    members = plan_together(several, sweep or {}, **about, n_tokens=statistics.n_tokens)
    members = [plan for plan in with_siblings(members, store.context) if only is None or plan.name in only]
    with joined(device) as world, ExitStack() as mine:
        folders = member_folders(
            members, store, fresh=fresh, default_length=not (config.run.steps or config.run.tokens)
        )
        check_sources([each.plan for each in folders if not each.settled and not each.has_checkpoint], store)
        failures = {each.plan.name: each.failure for each in folders if each.failure}
        mine.enter_context(locked(folders if world.writes else []))
        metrics, failed = train_members(
            folders, store, lambda each: Inputs.of(each.plan.config.data, statistics), device, dtype, world
        )
        failures |= failed
    if len(failures) == len(folders):
        raise RunError(next(iter(failures.values())))
    first = folders[0].plan.config
    return TrainSummary(
        runs=[each.folder for each in folders if each.plan.name not in failures],
        skipped=[each.folder for each in folders if each.done],
        steps=first.run.steps,
        tokens=first.run.steps * tokens_per_step(first),
        seconds=time.perf_counter() - began,
        metrics=metrics,
        failures=failures,
    )


def _cache(config: TrainConfig) -> LocalCache | None:
    run = config.run
    return LocalCache(round(run.local_cache * 1e9), run.cache_dir or DEFAULT_FOLDER) if run.local_cache else None


def train_members(
    folders: Sequence[MemberFolder],
    store: ActivationStore,
    inputs_of: Callable[[MemberFolder], Inputs],
    device: torch.device,
    dtype: torch.dtype,
    world: World,
) -> tuple[dict[str, Metrics], dict[str, str]]:
    """Train all members that are not settled, in as few passes as memory allows; last metrics and failures, by name."""
    metrics: dict[str, Metrics] = {}
    failures: dict[str, str] = {}
    _check_alike(folders, store, world)
    if world.writes and world.size > 1:
        _say_what_differs([each.plan for each in folders if not each.settled], world)
    for group in _groups([each for each in folders if not each.settled]):
        for plans in split_passes([each.plan for each in group], available_bytes(device), device.type):
            part = [each for each in group if each.plan in plans]
            try:
                trained, failed = _train_those_that_can(part, store, inputs_of(group[0]), device, dtype, world)
            except torch.OutOfMemoryError as failure:
                raise _too_large(plans, device) from failure
            metrics |= trained
            failures |= failed
    return metrics, failures


def _common(configs: Sequence[TrainConfig]) -> TrainConfig:
    """The first configuration, whose store, folder, device, dtype and logging are those of all.

    Raises:
        UsageError: they are not, or no store is named.

    """
    first = configs[0]
    if not first.data.store:
        raise UsageError("no store was named: give --store, such as --store cache/l12.zarr")
    for group, key in (("data", "store"), *(("run", key) for key in _OF_A_PASS)):
        values = list(dict.fromkeys(str(getattr(getattr(config, group), key)) for config in configs))
        if len(values) > 1:
            raise UsageError(f"{group}.{key} is the same for all that train together, not {' and '.join(values)}")
    return first


def _train_those_that_can(
    part: Sequence[MemberFolder],
    store: ActivationStore,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
) -> tuple[dict[str, Metrics], dict[str, str]]:
    """A pass, begun again from its last checkpoint without the members that failed in it; their sentences."""
    failures: dict[str, str] = {}
    while part:
        try:
            return _train_pass(part, store, inputs, device, dtype, world), failures
        except MembersFailedError as failed:
            failures |= failed.sentences
            for each in part if world.writes else ():
                if sentence := failed.sentences.get(each.plan.name):
                    warn(f"{sentence}; it is left out")
                    load_run(each.folder).model_copy(update={"failure": sentence}).save(each.folder)
            world.wait()
            part = [_begun(each) for each in part if each.plan.name not in failed.sentences]
    return {}, failures


def _begun(each: MemberFolder) -> MemberFolder:
    """The state of its folder now."""
    now = replace(each, record=load_run(each.folder))
    return now if now.has_checkpoint else replace(now, record=None)


def _say_what_differs(plans: Sequence[MemberPlan], world: World) -> None:
    if found := seen_by_share(plan.config for plan in plans):
        what = f"{' and '.join(found)} see{'s' if len(found) == 1 else ''} one process's share of a batch at a time"
        warn(f"{what}: with {world.size} processes the result is not exactly that of one")


def _check_alike(folders: Sequence[MemberFolder], store: ActivationStore, world: World) -> None:
    """Raise a RunError where processes would train on different data, or go on from different states."""
    if not world.agrees(store.fingerprint()):
        raise RunError(
            f"the {world.size} processes do not read the same store under {store.path}: give all machines the same "
            "disk or object storage, or equal copies"
        )
    if not world.agrees([(each.folder.name, each.settled, each.has_checkpoint) for each in folders]):
        raise RunError(
            f"the {world.size} processes do not see the same runs in {folders[0].folder.parent}: put them on a disk "
            "that all machines share, or begin anew with --fresh"
        )


def _too_large(plans: Sequence[MemberPlan], device: torch.device) -> ResourceError:
    batch = format_count(plans[0].config.data.batch_size)
    what = (
        f"{device} ran out of memory with {len(plans)} SAE{'s' if len(plans) > 1 else ''} and batches of {batch} tokens"
    )
    return ResourceError(f"{what}: sweep fewer values at once, or give a smaller --batch-size or --width (and --fresh)")


def _in_words(metrics: Metrics | None) -> str:
    if not metrics:
        return "was finished before"
    shown = {
        "explained": "explained_variance",
        "L0": "l0",
        "temporal variation": "temporal_variation",
        "dead": "dead_share",
    }
    return ", ".join(f"{name} {value:.3g}" for name, key in shown.items() if (value := metrics.get(key)) is not None)


def with_siblings(members: list[MemberPlan], context: int) -> list[MemberPlan]:
    """Give all members that see windows the same ones, where one of them needs several of a row side by side.

    Raises:
        UsageError: a row of ``context`` positions does not hold two of them.

    """
    wanted = max(map(siblings_wanted, members), default=0)
    if not wanted:
        return members
    found, said = [], set()
    for plan in members:
        data = plan.config.data
        if data.view != "windows" or data.siblings > 1:
            found.append(plan)
            continue
        held = max((context - 1) // data.window, min(2, context // data.window))  # one position may be a BOS
        held = min(held, data.batch_size // data.window)
        if held < 2:
            if siblings_wanted(plan):
                what = f"partner {plan.config.temporal.partner} takes tokens of several windows of a row"
                sizes = (
                    f"rows of {context} positions and batches of {data.batch_size} tokens hold {held} of {data.window}"
                )
                raise UsageError(f"{what}, and {sizes}: give a smaller --window")
            found.append(plan)
            continue
        said.add(min(wanted, held))
        found.append(replace(plan, config=changed(plan.config, {"data.siblings": min(wanted, held)})))
    for siblings in sorted(said):
        what = f"batches hold {siblings} windows of one row and document side by side (data.siblings)"
        note(f"{what}, for the partners that were asked for; what is left of a document is not used")
    return found


def _groups(folders: Sequence[MemberFolder]) -> list[list[MemberFolder]]:
    """Members that share a stream and a point of departure; what they see of the stream may differ."""
    groups: dict[tuple[object, ...], list[MemberFolder]] = {}
    for each in folders:
        rows = each.record.store_rows if each.record and each.has_checkpoint else 0
        data = each.plan.config.data
        stream = (data.store, data.batch_size, data.pool, data.seed, data.scale, data.norm_filter, data.only)
        groups.setdefault(
            (*stream, each.plan.begun_at, each.plan.config.run.steps, rows, each.has_checkpoint), []
        ).append(each)
    return list(groups.values())


def _train_pass(
    folders: Sequence[MemberFolder],
    store: ActivationStore,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
) -> dict[str, Metrics]:
    paths = [each.folder for each in folders]
    step = latest_common(paths, remove_damaged=world.writes) if folders[0].has_checkpoint else None
    if step is None and world.writes:
        for each in folders:
            if each.record is not None:
                note(f"{each.folder} was begun and has no sound checkpoint: it begins again")
    if step is not None:
        inputs = Inputs.from_state_dict(load_checkpoint(paths[0], step)["inputs"])
    plans = [_as_begun(each) for each in folders]
    extended = plans[0].begun_at > 0
    if step is None and not extended and any(plan.config.sae.b_dec == "geometric_median" for plan in plans):
        inputs = inputs.with_median(store)
    if world.writes:
        _announce(plans, inputs, store, step, device)
    work = Pass(plans, store, inputs, device, dtype, world)
    if step is not None:
        work.restore(step)
    config = plans[0].config
    kept = {each.plan.name: each.record for each in folders if each.record and step is not None}
    records = {plan.name: kept.get(plan.name) or new_record(plan, store, inputs, device) for plan in plans}
    if step is None and extended:
        work.go_on({plan.name: load_run(plan.folder.parent) for plan in plans})
    for member in work.members if step is None and not extended else ():
        origin = begin_from_source(member, inputs.scale)
        records[member.plan.name] = records[member.plan.name].model_copy(update={"origin": origin})
    if world.writes:
        for each in folders:
            records[each.plan.name].save(each.folder)

    def tell_pairs(found: dict[str, Facts]) -> None:
        said = {in_words(plan.config.temporal.partner, found[plan.name]) for plan in plans if plan.name in found}
        for line in sorted(said):
            note(line)
        for each in folders:
            if each.plan.name in found:
                kept_now = records[each.plan.name].model_copy(update={"pairs": found[each.plan.name]})
                records[each.plan.name] = kept_now
                kept_now.save(each.folder)

    total, done = (n * tokens_per_step(config) for n in (work.steps, work.step))
    with progress(f"training {len(plans)} SAE{'s' if len(plans) > 1 else ''}", total, done=done) as bar:
        work.run(bar, tell_pairs)
    if world.writes:
        for member, each in zip(work.members, folders, strict=True):
            finish(member, records[each.plan.name], each.folder, work)
    world.wait()
    return {each.plan.name: work.last_metrics.get(each.plan.name, {}) for each in folders}


def _as_begun(begun: MemberFolder) -> MemberPlan:
    """The plan with the step that a run was begun with: the two steps agree up to rounding, not bit for bit."""
    if begun.record is None or not begun.has_checkpoint:
        return begun.plan
    step = begun.record.step or "fast"
    return replace(begun.plan, config=changed(begun.plan.config, {"run.step": step}))


def _announce(
    plans: Sequence[MemberPlan], inputs: Inputs, store: ActivationStore, step: int | None, device: torch.device
) -> None:
    config = plans[0].config
    more = f" and {len(plans) - _NAMED} more" if len(plans) > _NAMED else ""
    note(f"layer {store.location}: {', '.join(plan.name for plan in plans[:_NAMED])}{more}")
    if config.data.only:
        note(f"only tokens in messages of the role '{config.data.only}' are trained on")
    for data in {view_of(plan.config.data): plan.config.data for plan in plans}.values():
        view, most = view_of(data), data.batch_size
        per_step = view.tokens_per_batch(most)
        remainder = f", {most - per_step} tokens of {most} left out" if most > per_step else ""
        steps = config.run.steps - plans[0].begun_at
        tokens = format_count(steps * per_step)
        note(f"{steps} steps of {per_step} tokens ({view.describe(most)}{remainder}), {tokens} in all")
    if plans[0].begun_at:
        warmup, decay = rate_lengths(config.run.steps - plans[0].begun_at, config.optimiser)
        rate = f"the learning rate grows over {warmup} steps and falls over the last {decay}"
        note(f"after {plans[0].begun_at} steps that are done, with fresh Adam moments; {rate}")
    note(
        f"memory {estimate(plans, device.type)}; store {format_bytes(inputs.rows * store.context * store.d_model * 2)}"
    )
    for reason in dict.fromkeys(why for plan in plans if (why := step_of(plan, device.type)[1])):
        note(f"step: autograd ({reason})")
    if step is not None:
        note(f"going on from step {step}")


def new_record(plan: MemberPlan, store: ActivationStore, inputs: Inputs, device: torch.device) -> RunRecord:
    """The record of a run that is about to begin, or to go on."""
    record = _new_record(plan, store, inputs, device)
    if not plan.begun_at:
        return record
    before = load_run(plan.folder.parent)
    warmup, decay = rate_lengths(plan.config.run.steps - plan.begun_at, plan.config.optimiser)
    part = TrainedPart(
        from_step=plan.begun_at,
        steps=plan.config.run.steps - plan.begun_at,
        tokens=(plan.config.run.steps - plan.begun_at) * tokens_per_step(plan.config),
        lr=plan.config.optimiser.lr,
        warmup=warmup,
        decay=decay,
        created=record.created,
        versions=record.versions,
    )
    of_before = {"pairs": before.pairs, "origin": before.origin, "created": before.created}
    return record.model_copy(update={"parts": [*(before.parts or [_whole(before)]), part], **of_before})


def _whole(record: RunRecord) -> TrainedPart:
    """A run that was trained in one, as the first part of one that goes on."""
    config = TrainConfig.model_validate(record.config)
    warmup, decay = rate_lengths(record.steps, config.optimiser)
    return TrainedPart(
        from_step=0,
        steps=record.steps,
        tokens=record.tokens,
        lr=config.optimiser.lr,
        warmup=warmup,
        decay=decay,
        created=record.created,
        cost=record.cost,
        versions=record.versions,
    )


def _new_record(plan: MemberPlan, store: ActivationStore, inputs: Inputs, device: torch.device) -> RunRecord:
    return RunRecord(
        name=plan.name,
        role="twin" if plan.role == "twin" else "tc",
        twin=plan.twin,
        layer=store.layer,
        store=plan.config.data.store,
        store_fingerprint=store.fingerprint(inputs.rows),
        store_rows=inputs.rows,
        store_manifest=store.manifest.model_dump(mode="json"),
        config=plan.config.model_dump(mode="json"),
        input_scale=inputs.scale,
        seed=plan.config.run.seed,
        steps=0,
        planned_steps=plan.config.run.steps,
        tokens=0,
        finished=False,
        metrics={},
        step=step_of(plan, device.type)[0],
        plugins=load_plugins(plan.config.run.plugins),
        versions={
            "tcsae": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def finish(member: Member, record: RunRecord, folder: Path, work: Pass) -> None:
    """Write the weights in raw units, then the record that says so, then drop the checkpoints."""
    sae = member.sae.rescaled(work.inputs.scale).eval()
    sae.metadata = metadata_of(record)
    sae.save(folder)
    done = {"steps": member.step, "tokens": member.step * tokens_per_step(member.config), "finished": True}
    done |= {"cost": work.cost(member), "ends": work.ends.get(record.name, {})}
    if record.parts:
        *before, last = record.parts
        parts = [*before, last.model_copy(update={"cost": done["cost"]})]
        done |= {"parts": parts, "cost": _summed([part.cost for part in parts])}
    record.model_copy(update=done | {"metrics": work.last_metrics.get(record.name, {})}).save(folder)
    drop_checkpoints(folder)


def _summed(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds of all parts; of memory and members the most."""
    known = [cost for cost in costs if cost]
    keys = dict.fromkeys(key for cost in known for key in cost)
    of = {"seconds": sum} if len(known) == len(costs) else {}
    return {key: of.get(key, max)(cost[key] for cost in known if key in cost) for key in keys}


def metadata_of(record: RunRecord) -> dict[str, object]:
    """What a run's SAE says of its place and its nested groups, under the names SAELens uses."""
    manifest = record.store_manifest
    model, text = manifest["model"], manifest["text"]
    config = TrainConfig.model_validate(record.config)
    sizes = group_sizes(config.sae, config.sae.width)
    nested: dict[str, object] = {PREFIX_SIZES: list(sizes)} if len(sizes) > 1 else {}
    public = hub_name(model["id"]) or model["id"]
    return {
        "model_name": public,
        **({OWN_MODEL: model["id"]} if public != model["id"] else {}),
        "hook_name": manifest["hook_name"],
        "layer": record.layer,
        "context_size": text["context"],
        "prepend_bos": text["bos_token_id"] is not None,
        "dataset_path": text["dataset"],
        "model_revision": model["revision"],
        "tcsae_run": record.name,
        "tcsae_activation": record.config["sae"]["activation"],
        "tcsae_temporal": record.config["temporal"],
        "tcsae_tokens": record.planned_steps * tokens_per_step(config),
        **nested,
    }
