"""How much memory members need, how much there is, and how a sweep that does not fit is split into passes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..console import format_bytes
from ..errors import ResourceError
from .plan import MemberPlan, tokens_per_step

_USABLE = 0.8  # of what is free: the window pool, the allocator and the rest of the machine need some
_STATES = 4  # weight, gradient and AdamW's two moments, float32
_CODE_BUFFERS = 4  # pre-activations, codes, their gradient and one temporary, per token and feature, in the dense step


def member_bytes(plan: MemberPlan) -> int:
    """Bytes that a member occupies for as long as it trains."""
    return _STATES * 4 * plan.n_parameters


def step_bytes(plan: MemberPlan) -> int:
    """Bytes that one dense step of a member needs beside that; members take turns, so a pass needs the largest only."""
    return tokens_per_step(plan.config) * 4 * (_CODE_BUFFERS * plan.config.sae.width + 4 * plan.d_model)


def split_passes(members: Sequence[MemberPlan], available: int) -> list[list[MemberPlan]]:
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
        if passes and _needed([*passes[-1], plan]) <= available:
            passes[-1].append(plan)
        else:
            passes.append([plan])
    return passes


def _needed(members: Sequence[MemberPlan]) -> int:
    return sum(map(member_bytes, members)) + max(map(step_bytes, members))


def estimate(members: Sequence[MemberPlan]) -> str:
    """One line for the user: what the members of a pass need."""
    weights, step = sum(map(member_bytes, members)), max(map(step_bytes, members))
    return f"{format_bytes(weights + step)} ({format_bytes(weights)} of weights and moments, {format_bytes(step)} for a step)"


def available_bytes(device: torch.device) -> int:
    """Memory that members may take on ``device``."""
    if device.type == "cuda":
        return int(_USABLE * torch.cuda.mem_get_info(device)[0])
    return int(_USABLE * min(_free_memory(), _container_free()))


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_free() -> int:
    """What a control group leaves, where there is one (version 2)."""
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62
