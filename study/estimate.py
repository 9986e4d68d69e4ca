"""What a study will take: time, disk and memory of every stage, before it runs.

Times follow from a batch and a few steps made now, on this machine and under its present load: rates of earlier studies
depend on their layers and sizes. What depends on weights that are not here yet is not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..console import format_bytes, format_duration
from ..errors import ModelError, TextError
from ..evaluate.codes.beside_report import bytes_of
from ..evaluate.config import REFERENCES
from ..evaluate.metrics.all import families, memory_over_weights
from ..evaluate.run import PASS_BYTES
from ..extract.model.files import weights_in
from ..extract.plan import Plan, estimate, make_plan
from ..system.device import DTYPES, resolve_device, resolve_dtype
from ..train.loop.memory_plan import available_bytes, member_bytes, split_passes, step_bytes
from ..train.loop.step_time import seconds_per_step
from ..train.plan import MemberPlan
from ..train.sae.registry import ARCHITECTURES
from .alone import in_processes
from .checks import check_outcomes, member_plans
from .plan import AloneStage, PlannedText, StudyPlan, Training

_CHECKPOINTS = 3  # two are kept, and one is being written
_STATES = 3  # weight and two moments in a checkpoint, float32
# What a row of an evaluation's table costs, in passes of a token through one layer. Measured on the CPU with
# SmolLM2-135M and 1024 features; a layer has about 12 d² weights, the head V d.
_OF_HEAD = 3.0  # times its weights: in float32, with softmax and KL
_PER_TOKEN = 2.0  # code, reconstruction and everything that is summed over tokens
_PER_ROW = 60_000.0  # null distributions, probes, passages for the feature browser
_START = 8.0
"""Seconds until a new process has loaded torch and opened a store, on two slow cores."""
_UNKNOWN, _STEPS = "unknown until the model's weights are here", "two steps of each kind"


@dataclass(frozen=True)
class StageEstimate:
    """One line of the plan."""

    stage: str
    what: str
    seconds: float | None
    """None where nothing is known."""
    from_what: str
    """Where the time comes from."""
    disk_bytes: int
    """At most, while it runs."""
    memory_bytes: int | None

    @property
    def time(self) -> str:
        """In words."""
        return self.from_what if self.seconds is None else format_duration(self.seconds)


def estimate_study(plan: StudyPlan, done: Sequence[str] = ()) -> list[StageEstimate]:
    """Every stage that is not done, in order.

    Raises:
        TcsaeError: a disk or memory that is too small, or a model or text that cannot be had; where the file brings an
            estimate, made elsewhere, the latter is said in the table instead.

    """
    check_outcomes(plan)
    device = torch.device("cpu") if plan.texts[0].extraction.scheduler else resolve_device(_device(plan))
    found: list[StageEstimate] = []
    for text in plan.texts:
        if all(stage in done for stage in text.stages):
            continue
        try:
            stages = list(_of_text(text, device))
        except (ModelError, TextError) as failure:
            if not plan.study.sizes.estimate:
                raise
            why = f"unknown: {failure}"
            stages = [StageEstimate(stage, "", None, why, 0, None) for stage in text.stages]
        found += [each for each in stages if each.stage not in done]
    return found


def _device(plan: StudyPlan) -> str:
    return plan.texts[0].evaluation.device


def _of_text(text: PlannedText, device: torch.device) -> Iterator[StageEstimate]:
    planned = make_plan(text.extraction)
    outline, context, rows = planned.outline, planned.config.text.context, planned.config.rows
    weights = weights_in(outline.files.folder)
    of_model = sum(path.stat().st_size for path in weights) if weights else None
    rate = estimate(text.extraction).tokens_per_second if weights or outline.files.gguf_file else None
    stored = planned.stored.rows if planned.stored else 0
    left = max(0, rows - stored) * context
    stores = len(text.extraction.paths)
    yield StageEstimate(
        f"extract {text.name}",
        f"{rows:,} rows of {context} tokens, {stores} store{'s' if stores > 1 else ''}",
        None if rate is None else left / rate,
        _UNKNOWN if rate is None else "one batch",
        planned.store_bytes * stores,
        None if of_model is None else of_model + text.extraction.shard_bytes * stores,
    )
    for training in text.trainings:
        yield _of_training(training, planned, device)
    if text.alone is not None:
        yield _of_alone(text.alone, planned, device)
    yield _of_evaluation(text, planned, rate, of_model)


def _of_training(training: Training, planned: Plan, device: torch.device) -> StageEstimate:
    context, d_model = planned.config.text.context, planned.outline.d_model
    plans = member_plans(training, d_model, planned.config.rows * context, context)
    dtype = DTYPES[resolve_dtype(plans[0].config.run.dtype, device)]
    each = seconds_per_step(plans, context, device, dtype)
    steps = plans[0].config.run.steps
    parameters = sum(plan.n_parameters for plan in plans)
    passes = split_passes(plans, available_bytes(device), device.type)
    memory = max(sum(map(member_bytes, one)) + max(map(step_bytes, one)) for one in passes)
    return StageEstimate(
        training.key,
        f"{len(plans)} SAEs, {steps} steps, {len(passes)} pass{'es' if len(passes) > 1 else ''}",
        each * steps,
        _STEPS,
        4 * parameters * (1 + _STATES * _CHECKPOINTS),
        memory,
    )


def _of_alone(stage: AloneStage, planned: Plan, device: torch.device) -> StageEstimate:
    context = planned.config.text.context
    plans = member_plans(stage, planned.outline.d_model, planned.config.rows * context, context)
    dtype = DTYPES[resolve_dtype(plans[0].config.run.dtype, device)]
    n, steps = len(plans), plans[0].config.run.steps
    seconds = stage.repeats * (n * _START + steps * seconds_per_step(plans, context, device, dtype))
    return StageEstimate(
        stage.key,
        f"{n} SAEs, {steps} steps, each in {in_processes(stage.repeats)}",
        seconds,
        _STEPS,
        max(4 * plan.n_parameters for plan in plans),
        max(member_bytes(plan) + step_bytes(plan) for plan in plans),
    )


def _of_evaluation(text: PlannedText, planned: Plan, rate: float | None, of_model: int | None) -> StageEstimate:
    config = text.evaluation
    kinds = {(m.config.sae.architecture, m.config.sae.activation) for m in text.members}
    rows = len(text.members) + len(text.trainings) * (len(REFERENCES) - 1 + len(kinds))
    about = planned.outline.d_model, 1, planned.config.text.context
    plans = [plan for t in text.trainings for plan in member_plans(t, *about)]
    of_saes = sum(4 * plan.n_parameters for plan in plans)
    over = memory_over_weights(families(), about[2], about[0])
    of_codes = sum(bytes_of(config.rows * about[2], _most_codes(plan)) for plan in plans) if config.codes else 0
    return StageEstimate(
        f"evaluate {text.name}",
        f"{len(text.members)} SAEs and {rows - len(text.members)} references on {config.rows:,} rows",
        None if rate is None else _evaluation_seconds(text, planned, rate, rows),
        _UNKNOWN if rate is None else "the rate of the forward passes",
        rows * 1_000_000 + round(of_codes),
        None if of_model is None else of_model + min(round(PASS_BYTES), round(of_saes * over)),
    )


def _most_codes(plan: MemberPlan) -> float:
    """Codes of a token that are not zero; where training does not set their number, as if none were."""
    sae, kind = plan.config.sae, ARCHITECTURES.get(plan.config.sae.architecture)
    if kind.fixes_sparsity(sae) and not kind.summands:
        return kind.active_features(sae)
    return plan.config.loss.target_l0 or sae.width


def _evaluation_seconds(text: PlannedText, planned: Plan, rate: float, rows: int) -> float:
    """For ``rows`` rows of the table, from the tokens per second of the extraction's pass."""
    outline, config, context = planned.outline, text.evaluation, planned.config.text.context
    layers = [training.at.layer for training in text.trainings]
    above = outline.n_layers - 1 - sum(layers) / len(layers) + _OF_HEAD * outline.vocab_size / (12 * outline.d_model)
    each = (config.splice_rows or config.rows) * context * above + config.rows * context * _PER_TOKEN + _PER_ROW
    return rows * each / (rate * (max(layers) + 1))


def total(stages: Sequence[StageEstimate]) -> dict[str, Any]:
    """Sums for the foot of the table: time where all of it is known, disk of everything, memory of the largest."""
    seconds = [each.seconds for each in stages]
    known = [each for each in seconds if each is not None]
    time = format_duration(sum(known)) + ("" if len(known) == len(seconds) else " and what is unknown")
    memory = [each.memory_bytes for each in stages if each.memory_bytes is not None]
    return {
        "time": time,
        "disk": format_bytes(sum(each.disk_bytes for each in stages)),
        "memory": format_bytes(max(memory)) if memory else "unknown",
    }
