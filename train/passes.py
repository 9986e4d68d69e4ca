"""The passes of a training: members that share a stream, as many at a time as memory holds, without those that fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..cache.store import ActivationStore
from ..console import format_bytes, format_count, note, progress, warn
from ..errors import ResourceError, RunError
from .loop.alarms import MembersFailedError
from .loop.compared_inputs import Facts, in_words
from .loop.diagnostics import Metrics
from .loop.distributed import World, seen_by_share
from .loop.inputs import Inputs
from .loop.memory_plan import available_bytes, estimate, split_passes, step_of
from .loop.schedule import rate_lengths
from .loop.trainer import Pass
from .loop.warm_start import begin_from_source
from .plan import MemberPlan, tokens_per_step, view_of
from .presets import changed
from .records import finish, new_record
from .run_folder.checkpoint import latest_common, load_checkpoint
from .run_folder.member_folders import MemberFolder
from .run_folder.record import load_run

_NAMED = 4  # runs in the sentence that announces them


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
