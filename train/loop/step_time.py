"""How long a step takes on this machine, from a few steps on random numbers: for plans, before there is a store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..loss.registry import PARTNERS
from ..plan import MemberPlan, view_of
from ..presets import changed
from ..sae.protocol import RowTokens
from .member import Member
from .memory_plan import alone
from .single import Single
from .stack import Stack

_STEPS = 2  # timed, after one that is not: the first allocates


def seconds_per_step(plans: Sequence[MemberPlan], context: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that one step of all these members takes, each stepped by itself; members of one kind are timed once.

    Partners that are drawn are taken for neighbours, which costs the same but for the draw.

    Args:
        plans: the members.
        context: positions of a row, for architectures that see rows.
        device: where they train.
        dtype: of their products.

    """
    known: dict[tuple[object, ...], float] = {}
    total = 0.0
    for plan in plans:
        kind = _kind(plan)
        if kind not in known:
            known[kind] = _time(plan, context, device, dtype)
        total += known[kind]
    return total


def _kind(plan: MemberPlan) -> tuple[object, ...]:
    config = plan.config
    term = config.temporal
    form = PARTNERS.get(term.partner).form or term.form if term.form != "none" and term.weight else "none"
    sizes = (view_of(config.data), config.data.batch_size, config.run.step, plan.d_model)
    return (form, term.scope < 1, config.sae.model_dump_json(), *sizes)


def _time(plan: MemberPlan, context: int, device: torch.device, dtype: torch.dtype) -> float:
    config = plan.config
    if config.temporal.form != "none" and PARTNERS.get(config.temporal.partner).form is None:
        config = changed(config, {"temporal.partner": "next"})
    plan = replace(plan, config=config)
    member = Member(plan, torch.zeros(plan.d_model, device=device), device, dtype)
    step = alone(plan, device.type)
    stepper = Single(member, step) if step else Stack([member])
    view = view_of(config.data)
    window = context if view.name == "rows" else config.data.window
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, config.data.batch_size // window), window, plan.d_model)
    x_NWD = torch.randn(shape, generator=generator).to(device)
    rows = RowTokens.whole(x_NWD) if view.name == "rows" else None
    began = 0.0
    for number in range(1 + _STEPS):
        if number == 1:
            began = _now(device)
        stepper.train_step(x_NWD, rows=rows)
    return (_now(device) - began) / _STEPS


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
