"""The same passage further down the row: does a feature follow the text or the position?

Shapes: R passages, T positions, M tokens of a passage, D model width, F features, K shifts.

Every passage is run right after BOS, and again behind k tokens of another document. The features of its tokens are
compared with those of the unshifted run. The similarity of the raw activations is the ceiling, since the model itself
reacts to what stands before. A second prefix of the same length is the control: there the context changes as much, but
the position stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...cache.format.layout import RowBlock
from ...train.sae.protocol import RowTokens, SparseCoder
from ..intervals.jackknife import GROUPS, jackknife
from ..protocol import Findings
from ..results import Curve, Definition, Metric
from .registry import metric

PASSAGES = 12
SHIFTS = (1, 4, 16, 64)
BURN_IN = 16
"""First tokens of a passage that are not compared: unshifted they have hardly any context, shifted they have."""

_PASSAGES = "delete-a-group jackknife over passages"

DEFINITIONS = {
    "prefix_shift": Definition(
        text="mean cosine between the codes of a passage's tokens run right after BOS and behind k unrelated tokens "
        f"(k: the largest of the curve), from the passage's {BURN_IN}th token on",
        unit="1",
        interval=_PASSAGES,
        better="higher",
        label="prefix shift",
    ),
    "prefix_shift_control": Definition(
        text="the same between two unrelated prefixes of the same length: the context differs, the position does not",
        unit="1",
        interval=_PASSAGES,
    ),
    "prefix_shift_activation": Definition(
        text="prefix_shift of the raw activations, centred on their mean: the ceiling",
        unit="1",
        interval=_PASSAGES,
        label="prefix shift, raw activations",
    ),
    "prefix_shift_activation_control": Definition(
        text="prefix_shift_control of the raw activations, centred", unit="1", interval=_PASSAGES
    ),
}


class ShiftContext(Protocol):
    """What the probe asks for: see ``probes.ProbeContext``."""

    sae: SparseCoder
    seed: int

    @property
    def rows(self) -> list[RowBlock]:
        """Held-out rows."""
        ...

    def run_rows(self, tokens_BT: Tensor) -> Tensor:
        """The residual stream [B, T, D] after the SAE's layer."""
        ...


@dataclass(frozen=True)
class ShiftPlan:
    """Which token rows to run, and where in them each passage lies."""

    plain_RT: np.ndarray
    shifted_KRT: np.ndarray
    control_KRT: np.ndarray
    shifts: tuple[int, ...]
    start: int  # of the passage in the unshifted rows; in the others the shift is added
    length: int  # M


def plan_shifts(
    block: RowBlock, seed: int, *, passages: int = PASSAGES, shifts: tuple[int, ...] = SHIFTS
) -> ShiftPlan | None:
    """Choose passages, each with two prefixes from other documents; None where the rows hold fewer than two documents.

    Shifts longer than half a row are left out. Passages come from as many documents as there are.
    """
    rows, context = block.tokens_BT.shape
    start = 1 if rows and (block.flags_BT[:, 0] != 0).all() else 0
    clean = (block.flags_BT[:, start:] == 0).all(1) & (
        block.documents_BT[:, start:] == block.documents_BT[:, start:][:, :1]
    ).all(1)
    usable, document = np.flatnonzero(clean), block.documents_BT[:, start]
    shifts = tuple(k for k in shifts if k <= context // 2)
    if len(np.unique(document[usable])) < 2 or not shifts:
        return None
    generator = np.random.default_rng(seed)
    order = generator.permutation(usable)
    turn = [int((document[order[:at]] == document[row]).sum()) for at, row in enumerate(order)]
    chosen = order[np.argsort(turn, kind="stable")][:passages]  # first one of every document, then a second one …
    others = [generator.choice(usable[document[usable] != document[row]], 2) for row in chosen]
    plain = block.tokens_BT[chosen]
    shifted, control = (
        np.stack([_behind(plain, block.tokens_BT[[pair[which] for pair in others]], start, k) for k in shifts])
        for which in (0, 1)
    )
    return ShiftPlan(plain, shifted, control, shifts, start, context - start - max(shifts))


def _behind(plain_RT: np.ndarray, other_RT: np.ndarray, start: int, shift: int) -> np.ndarray:
    """Rows with ``shift`` tokens of the other row put in at ``start``, as long as before."""
    own = plain_RT[:, start : plain_RT.shape[1] - shift]
    return np.concatenate([plain_RT[:, :start], other_RT[:, start : start + shift], own], axis=1)


@metric("prefix_shift", over="model", definitions=DEFINITIONS)
def prefix_shift(context: ShiftContext) -> Findings:
    """Run the shifted passages and compare."""
    plan = plan_shifts(context.rows[0], context.seed) if context.rows else None
    if plan is None:
        return Findings(notes=["prefix shift not measured: the rows evaluated hold fewer than two documents"])
    skip = min(BURN_IN, plan.length // 4)
    plain = _passages(context, plan.plain_RT, plan.start + skip, plan.length - skip)
    mean_D = plain[0].mean((0, 1))
    found = {key: [] for key in DEFINITIONS}
    for at, shift in enumerate(plan.shifts):
        where = (plan.start + shift + skip, plan.length - skip)
        shifted = _passages(context, plan.shifted_KRT[at], *where)
        control = _passages(context, plan.control_KRT[at], *where)
        for name, one, other in (("prefix_shift", plain, shifted), ("prefix_shift_control", shifted, control)):
            found[name].append(_mean_cosine(one[1], other[1], name))
            raw = name.replace("prefix_shift", "prefix_shift_activation")
            found[raw].append(_mean_cosine(one[0] - mean_D, other[0] - mean_D, raw))
    shifts = [float(shift) for shift in plan.shifts]
    return Findings(
        metrics={key: metrics[-1] for key, metrics in found.items()},
        curves={key: _curve(key, shifts, metrics) for key, metrics in found.items()},
    )


@torch.no_grad()
def _passages(context: ShiftContext, tokens_RT: np.ndarray, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Activations [R, M, D] and features [R, M, F] of the passages; no code looks before its passage."""
    x_RTD = context.run_rows(torch.from_numpy(tokens_RT.astype(np.int64)))
    x_RMD = x_RTD[:, start : start + length].float()
    return x_RMD, context.sae.on_rows(x_RMD, RowTokens.whole(x_RMD)).features


def _mean_cosine(one_RMX: Tensor, other_RMX: Tensor, key: str) -> Metric:
    """Mean over tokens with its interval over passages; tokens where either is zero are left out."""
    dot = (one_RMX * other_RMX).sum(2).double()
    cosine_RM = dot / (one_RMX.norm(dim=2).double() * other_RMX.norm(dim=2).double())
    defined = torch.isfinite(cosine_RM)
    group_R = torch.arange(len(dot), device=dot.device) % GROUPS
    total_G, count_G = (torch.zeros(GROUPS, dtype=torch.float64, device=dot.device) for _ in range(2))
    total_G.index_add_(0, group_R, torch.where(defined, cosine_RM, 0.0).sum(1))
    count_G.index_add_(0, group_R, defined.double().sum(1))
    return jackknife(lambda count, total: float(total / count), count_G, total_G, unit="1", definition=key)


def _curve(key: str, shifts: list[float], metrics: list[Metric]) -> Curve:
    return Curve(
        x=list(shifts),
        y=[m.value for m in metrics],
        low=[m.low for m in metrics],
        high=[m.high for m in metrics],
        x_label="unrelated tokens before the passage",
        y_label="mean cosine",
        x_scale="log",
        definition=key,
    )
