"""How much memory members need, how much there is, and how a sweep is split into passes, and a pass into stacks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from ...console import format_bytes
from ...errors import ResourceError
from ...system.free_memory import free_memory
from ..loss.objective import StepResult, objective_of
from ..plan import MemberPlan, tokens_per_step, view_of
from ..sae.registry import ARCHITECTURES
from ..step.autograd import autograd_step
from ..step.registry import STEPS, Step, choose_step

_USABLE = 0.8  # of what is free: the window pool, the allocator and the rest of the machine need some
_STATES = 4  # weight, gradient and AdamW's two moments, float32
# Pre-activations of a stack, up to which members step together. CPU, measured for 8 members on Zen 5: the stack takes
# 0.47 of their time one by one at 2¹⁷, 0.6 at 2¹⁹, 0.8 to 1.4 at 2²² and above, where its matrices no longer fit the
# caches. CUDA: an estimate, of where the launches of a step take as long as its arithmetic.
STACK_BELOW = {"cpu": 2**20, "cuda": 2**26}


def stacks(members: Sequence[MemberPlan], device: str) -> list[list[MemberPlan]]:
    """The members of a pass in stacks that step together (:mod:`.stack`), as even as possible.

    Members agree in what makes their kernels one: widths, activation, decoder, the dead features' term and optimiser. A
        stack
    holds as many as have ``STACK_BELOW`` pre-activations together: beyond that, a step costs arithmetic and memory, not
    calls.
    """
    alike: dict[tuple[object, ...], list[MemberPlan]] = {}
    found: list[list[MemberPlan]] = []
    for plan in members:
        config, objective = plan.config, objective_of(plan.config, plan.d_model, plan.config.sae.width)
        terms = (objective.decoder_norms, objective.groups, objective.l0_aim > 0, objective.aux_k, objective.aux_weight)
        # Their rows lie in another order, which is written for one member.
        terms = (*terms, objective.aux_normalised, plan.name if objective.current_only else None)
        shape = (
            plan.d_model,
            config.sae.width,
            config.sae.activation,
            config.sae.k,
            config.sae.bandwidth,
            config.sae.decoder,
        )
        if alone(plan, device):
            found.append([plan])
            continue
        seen = view_of(config.data)
        alike.setdefault((*shape, *terms, seen, config.optimiser, config.run.steps, plan.begun_at), []).append(plan)
    for plans in alike.values():
        each = tokens_per_step(plans[0].config) * plans[0].config.sae.width
        n_stacks = math.ceil(len(plans) / max(1, STACK_BELOW.get(device, 0) // each))
        cuts = [len(plans) * at // n_stacks for at in range(n_stacks + 1)]
        found += [plans[low:high] for low, high in itertools.pairwise(cuts)]
    return found


def step_of(plan: MemberPlan, device: str) -> tuple[Step, str]:
    """How a member steps on a kind of device, and why where that is not by hand."""
    objective = objective_of(plan.config, plan.d_model, plan.config.sae.width)
    return choose_step(plan.config, objective.temporal.form if objective.temporal.active else "none", device)


def alone(plan: MemberPlan, device: str) -> Callable[..., StepResult] | None:
    """What a member is stepped by that steps by itself; None where it steps in a stack."""
    by_hand = step_of(plan, device)[0] == "fast"
    return STEPS.get(plan.config.sae.architecture).step if by_hand else autograd_step


def member_bytes(plan: MemberPlan) -> int:
    """Bytes that a member occupies for as long as it trains."""
    return _STATES * 4 * plan.n_parameters


def step_bytes(plan: MemberPlan) -> int:
    """Bytes that one dense step of a member needs beside that.

    Stacks take turns, so a pass needs the largest one's only.
    """
    sae, n_tokens = plan.config.sae, tokens_per_step(plan.config)
    if objective_of(plan.config, plan.d_model, sae.width).current_only:
        n_tokens *= 2  # earlier tokens are encoded, too
    return ARCHITECTURES.get(sae.architecture).step_bytes(sae, plan.d_model, n_tokens)


def split_passes(members: Sequence[MemberPlan], available: int, device: str = "cpu") -> list[list[MemberPlan]]:
    """Members in passes over the same stream that each fit ``available`` bytes, in order; one pass if they all do.

    Raises:
        ResourceError: one member alone does not fit.

    """
    passes: list[list[MemberPlan]] = []
    for plan in members:
        alone = member_bytes(plan) + step_bytes(plan)
        if alone > available:
            sizes = f"{plan.name} needs {format_bytes(alone)}, {format_bytes(available)} are free"
            raise ResourceError(f"{sizes}: give a smaller --width or --batch-size")
        if passes and sum(_needed([*passes[-1], plan], device)) <= available:
            passes[-1].append(plan)
        else:
            passes.append([plan])
    return passes


def _needed(members: Sequence[MemberPlan], device: str) -> tuple[int, int]:
    """Bytes of weights and moments, and of the largest stack's step."""
    return sum(map(member_bytes, members)), max(sum(map(step_bytes, stack)) for stack in stacks(members, device))


def estimate(members: Sequence[MemberPlan], device: str = "cpu") -> str:
    """One line for the user: what the members of a pass need."""
    weights, step = _needed(members, device)
    return (
        f"{format_bytes(weights + step)} ({format_bytes(weights)} of weights and moments, "
        f"{format_bytes(step)} for a step)"
    )


def available_bytes(device: torch.device) -> int:
    """Memory that members may take on ``device``."""
    if device.type == "cuda":
        return int(_USABLE * torch.cuda.mem_get_info(device)[0])
    return int(_USABLE * free_memory())
