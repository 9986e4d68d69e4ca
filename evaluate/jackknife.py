"""Intervals for what is no ratio of sums: a delete-a-group jackknife over groups of units of text.

Every sum such a statistic needs is kept once per group; leaving each group out in turn says how much the statistic hangs on the
text that happened to be there (Kott 2001, "The delete-a-group jackknife", J. Official Statistics 17).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .results import Metric

GROUPS = 8
# 97.5 % points of Student's t with 1 … 7 degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)


def group_of(units_BT: Tensor) -> Tensor:
    """The group [N] of every token. Neighbouring units, which resemble one another, share a group four at a time."""
    return (units_BT.reshape(-1) // 4) % GROUPS


def jackknife(
    statistic: Callable[..., float], tokens_G: Tensor, *sums_G: Tensor, unit: str, definition: str, n: int | None = None
) -> Metric:
    """The statistic of the sums over all groups, with its 95 % interval from leaving out one group at a time.

    ``statistic(tokens, *sums)`` gets each sum without its group axis. The interval is None where fewer than two groups hold
    tokens or the statistic is undefined without one of them.
    """
    sums = (tokens_G, *sums_G)
    totals = [s.sum(0) for s in sums]
    value = statistic(*totals)
    used = [g for g in range(len(tokens_G)) if float(tokens_G[g]) > 0]
    metric = Metric(value=value, unit=unit, n=round(float(totals[0])) if n is None else n, definition=definition)
    if len(used) < 2 or not math.isfinite(value):
        return metric
    left_out = torch.tensor([statistic(*(t - s[g] for t, s in zip(totals, sums, strict=True))) for g in used])
    if not bool(torch.isfinite(left_out).all()):
        return metric
    spread = (len(used) - 1) / len(used) * float(((left_out - left_out.mean()) ** 2).sum())
    half = _STUDENT[len(used) - 2] * math.sqrt(spread)
    return metric.model_copy(update={"low": value - half, "high": value + half})
