"""Intervals for what is no ratio of sums: a delete-a-group jackknife over groups of units of text.

Every sum such a statistic needs is kept once per group; leaving each group out in turn says how much the statistic
depends on the text that was drawn (Kott 2001, "The delete-a-group jackknife", J. Official Statistics 17). What
is left when a group is left out is kept with the value, so that two SAEs measured on the same text can be compared
group by group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..results import Metric, Number

GROUPS = 8
_SUMS = 32_768  # numbers of a block of features; up to so many torch uses one thread
# 97.5 % points of Student's t with 1 … 9 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Jackknifed(Metric):
    """A metric that remembers what it would be without each group of the text."""

    groups: tuple[int, ...]
    left_out: tuple[float, ...]

    def plain(self) -> Metric:
        """What a report says of it."""
        return Metric(**{name: getattr(self, name) for name in Metric.model_fields})

    def minus(self, other: Jackknifed) -> Metric:
        """The difference with its paired interval: without one where the two were measured on different groups."""
        value = None if self.value is None or other.value is None else self.value - other.value
        found = self.plain().model_copy(update={"value": value, "low": None, "high": None})
        if value is None or self.groups != other.groups:
            return found
        half = _half_width([a - b for a, b in zip(self.left_out, other.left_out, strict=True)])
        return found if half is None else found.model_copy(update={"low": value - half, "high": value + half})

    def within(self, low: float, high: float) -> Jackknifed:
        """The same with an interval that ends where the quantity does."""
        ends = {end: min(max(at, low), high) for end in ("low", "high") if (at := getattr(self, end)) is not None}
        return self.model_copy(update=ends)


def group_of(units_BT: Tensor) -> Tensor:
    """The group [N] of every token. Neighbouring units, which resemble one another, share a group four at a time."""
    return (units_BT.reshape(-1) // 4) % GROUPS


def jackknife(
    statistic: Callable[..., float], tokens_G: Tensor, *sums_G: Tensor, unit: str, definition: str, n: int | None = None
) -> Jackknifed:
    """The statistic of the sums over all groups, with its 95 % interval from leaving out one group at a time.

    ``statistic(tokens, *sums)`` gets each sum without its group axis. The interval is None where fewer than two groups
    hold tokens or the statistic is undefined without one of them.
    """
    without, used = _without(tokens_G, *sums_G)
    count = round(float(tokens_G.sum(0))) if n is None else n
    return leave_out(lambda g: statistic(*without(g)), used, unit=unit, definition=definition, n=count)


def jackknife_over_features(
    statistic: Callable[..., Tensor],
    tokens_G: Tensor,
    by_feature_GF: Sequence[Tensor],
    common_G: Sequence[Tensor],
    *,
    unit: str,
    definition: str,
) -> tuple[Jackknifed, Tensor]:
    """The mean over features of a number that every feature has by itself, with its interval; and these numbers, [F].

    The same as :func:`jackknife` of the mean, some features at a time: what is computed on the way stays in the
    processor's cache, and no array of all features is copied for every group that is left out.

    Args:
        statistic: ``(*by_feature, *common)`` without their group axis → [features of a block]; NaN where a feature has
            no such number.
        tokens_G: says which groups hold tokens.
        by_feature_GF: sums [G, F, …].
        common_G: sums [G, …] that belong to all features.
        unit: of the numbers.
        definition: which definition the mean is of.

    Returns:
        The mean over the features that have a number, counted in n, and every feature's number over all of the text.

    """
    without, used = _without(tokens_G, *common_G)
    asked = (None, *used)
    total, count = torch.zeros(len(asked), dtype=torch.float64), torch.zeros(len(asked), dtype=torch.int64)
    found: list[Tensor] = []
    size = max(1, _SUMS // max(math.prod(part.shape[2:]) for part in by_feature_GF))
    for blocks in zip(*(part.split(size, dim=1) for part in by_feature_GF), strict=True):
        of_block, _ = _without(tokens_G, *blocks)
        for at, g in enumerate(asked):
            value_F = statistic(*of_block(g)[1:], *without(g)[1:])
            total[at] += value_F.nansum().cpu()
            count[at] += value_F.isfinite().sum().cpu()
            if g is None:
                found.append(value_F)
    means = (total / count).tolist()
    outcome = leave_out(lambda g: means[asked.index(g)], used, unit=unit, definition=definition, n=int(count[0]))
    return outcome, torch.cat(found)


def leave_out(
    statistic: Callable[[int | None], float], groups: Sequence[int], *, unit: str, definition: str, n: int
) -> Jackknifed:
    """The same of a statistic that leaves out a group by itself; of all the text when asked for None."""
    value = statistic(None)
    left_out = tuple(statistic(g) for g in groups) if math.isfinite(value) else ()
    half = _half_width(left_out)
    low, high = (None, None) if half is None else (value - half, value + half)
    names = {"unit": unit, "definition": definition}
    return Jackknifed(value=value, n=n, low=low, high=high, **names, groups=tuple(groups), left_out=left_out)


def jackknife_band(
    statistic: Callable[..., Tensor], tokens_G: Tensor, *sums_G: Tensor
) -> tuple[list[Number], list[Number], list[Number]]:
    """A curve [X] and the ends of its 95 % interval point by point, as :func:`jackknife` does for one number."""
    without, used = _without(tokens_G, *sums_G)
    values = statistic(*without(None)).tolist()
    points = zip(*(statistic(*without(g)).tolist() for g in used), strict=True)
    halves = [_half_width(point) for point in points] or [None] * len(values)
    low, high = (
        [None if half is None else v + sign * half for v, half in zip(values, halves, strict=True)] for sign in (-1, 1)
    )
    return values, low, high


def _without(tokens_G: Tensor, *sums_G: Tensor) -> tuple[Callable[[int | None], list[Tensor]], list[int]]:
    """A function that gives the sums without a group, and the groups that hold tokens."""
    sums = (tokens_G, *sums_G)
    totals = [s.sum(0) for s in sums]

    def without(g: int | None) -> list[Tensor]:
        return totals if g is None else [total - s[g] for total, s in zip(totals, sums, strict=True)]

    return without, [g for g in range(len(tokens_G)) if float(tokens_G[g]) > 0]


def _half_width(left_out: Sequence[float]) -> float | None:
    if len(left_out) < 2 or not all(map(math.isfinite, left_out)):
        return None
    found = torch.tensor(left_out, dtype=torch.float64)
    spread = (len(found) - 1) / len(found) * float(((found - found.mean()) ** 2).sum())
    return STUDENT[len(found) - 2] * math.sqrt(spread)
