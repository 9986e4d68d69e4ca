"""The thresholds of batchtopk outside training, from fresh batches and the final weights, so that L0 is k there.

What was kept while training follows weights that have moved on since (arXiv 2412.06410, eq 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...cache.views import View, Windows
from ..plan import view_of
from .batches import BatchReader
from .inputs import Inputs
from .member import Member

_BATCHES = 16


@torch.no_grad()
def calibrate_thresholds(members: Sequence[Member], batches: BatchReader, inputs: Inputs, device: torch.device) -> None:
    """Set the threshold of every member that asks for it to the mean, over batches, of the smallest active code.

    Members that train on pairs are shown single tokens: a row's first token is never the current one of a pair, but
    outside training it is encoded like all others.

    Args:
        members: those with another rule, or without such a threshold, are left alone.
        batches: those of the training, which go on; this is their last use.
        inputs: scale and limits.
        device: of the members.

    """
    asking = [
        member
        for member in members
        if member.sae.running_threshold is not None and member.config.sae.threshold_rule == "calibrated"
    ]
    paired = [member for member in asking if member.objective.current_only]
    _calibrate([member for member in asking if member not in paired], batches, inputs, device)
    if paired:
        every_token = Windows(1, 1)
        batches.add_view(every_token)
        _calibrate(paired, batches, inputs, device, every_token)


def _calibrate(
    members: Sequence[Member], batches: BatchReader, inputs: Inputs, device: torch.device, view: View | None = None
) -> None:
    smallest: list[list[float]] = [[] for _ in members]
    for _ in range(_BATCHES if members else 0):
        found = batches.next_batches()
        for member, codes in zip(members, smallest, strict=True):
            x_NWD = inputs.prepare(found[view or view_of(member.config.data)].x_NWD, device)
            z = member.sae.encode(x_NWD)
            kept = z[z > 0]
            codes += [float(kept.min())] if kept.numel() else []
    for member, codes in zip(members, smallest, strict=True):
        if codes and member.sae.running_threshold is not None:
            member.sae.running_threshold.fill_(sum(codes) / len(codes))
