"""The record of a run when it begins, and when it is finished; what its SAE's files say of it."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import torch

from .. import __version__
from ..cache.public_names import hub_name
from ..cache.store import ActivationStore
from ..plugins import load_plugins
from .config import TrainConfig
from .formats.locate import OWN_MODEL
from .loop.inputs import Inputs
from .loop.member import Member
from .loop.memory_plan import step_of
from .loop.schedule import rate_lengths
from .loop.trainer import Pass
from .loss.objective import group_sizes
from .plan import MemberPlan, tokens_per_step
from .run_folder.checkpoint import drop_checkpoints
from .run_folder.record import RunRecord, TrainedPart, load_run
from .sae.protocol import PREFIX_SIZES


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
