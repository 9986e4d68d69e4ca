"""Windows of one row side by side: all members that see windows get the same ones, where one of them needs several."""

from __future__ import annotations

from dataclasses import replace

from ..console import note
from ..errors import UsageError
from .loop.trainer import siblings_wanted
from .plan import MemberPlan
from .presets import changed


def with_siblings(members: list[MemberPlan], context: int) -> list[MemberPlan]:
    """Give all members that see windows the same ones, where one of them needs several of a row side by side.

    Raises:
        UsageError: a row of ``context`` positions does not hold two of them.

    """
    wanted = max(map(siblings_wanted, members), default=0)
    if not wanted:
        return members
    found, said = [], set()
    for plan in members:
        data = plan.config.data
        if data.view != "windows" or data.siblings > 1:
            found.append(plan)
            continue
        held = max((context - 1) // data.window, min(2, context // data.window))  # one position may be a BOS
        held = min(held, data.batch_size // data.window)
        if held < 2:
            if siblings_wanted(plan):
                what = f"partner {plan.config.temporal.partner} takes tokens of several windows of a row"
                sizes = (
                    f"rows of {context} positions and batches of {data.batch_size} tokens hold {held} of {data.window}"
                )
                raise UsageError(f"{what}, and {sizes}: give a smaller --window")
            found.append(plan)
            continue
        said.add(min(wanted, held))
        found.append(replace(plan, config=changed(plan.config, {"data.siblings": min(wanted, held)})))
    for siblings in sorted(said):
        what = f"batches hold {siblings} windows of one row and document side by side (data.siblings)"
        note(f"{what}, for the partners that were asked for; what is left of a document is not used")
    return found
