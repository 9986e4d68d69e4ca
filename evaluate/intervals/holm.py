"""Many outcomes at once: p-values adjusted so that the family as a whole errs no more often than one test would."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values of a family (Holm 1979): compared with alpha, they bound the error of the whole family.

    None, of an effect without an interval, stays None and counts as a member of the family.
    """
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i] or 0.0)
    adjusted: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * (p_values[i] or 0.0)))
        adjusted[i] = worst
    return adjusted
