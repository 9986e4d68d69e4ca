"""Thresholds from fresh batches and the final weights, so that L0 is what was asked for.

Of batchtopk the one threshold outside training: what was kept while training follows weights that have moved on since
(arXiv 2412.06410, eq 5). Of jumprelu with a target for L0 all thresholds, by one factor: a short training ends before
the controller of λ1 has brought L0 there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...cache.views import View, Windows
from ..plan import view_of
from ..sae.temporal_sae import TemporalSAE
from .batches import BatchReader
from .inputs import Inputs
from .member import Member

_BATCHES = 16


@torch.no_grad()
def calibrate_thresholds(members: Sequence[Member], batches: BatchReader, inputs: Inputs, device: torch.device) -> None:
    """Set the thresholds of every member that asks for it.

    Of batchtopk: to the mean, over batches, of the smallest active code. Of jumprelu with a target for L0: multiplied
    by the factor with which as many features are active per token, so that they keep their proportions.

    Members that train on pairs are shown single tokens: a row's first token is never the current one of a pair, but
    outside training it is encoded like all others.

    Args:
        members: those with another rule, without such a threshold or without a target are left alone.
        batches: those of the training, which go on; this is their last use.
        inputs: scale and limits.
        device: of the members.

    """
    asking = [
        member
        for member in members
        if (member.sae.running_threshold is not None and member.config.sae.threshold_rule == "calibrated")
        or _steered(member) is not None
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
    over = [_TimesThreshold(*found) if (found := _steered(member)) else None for member in members]
    for _ in range(_BATCHES if members else 0):
        found = batches.next_batches()
        for member, codes, times in zip(members, smallest, over, strict=True):
            x_NWD = inputs.prepare(found[view or view_of(member.config.data)].x_NWD, device)
            if times is not None:
                times.add(x_NWD)
                continue
            z = member.sae.encode(x_NWD)
            kept = z[z > 0]
            codes += [float(kept.min())] if kept.numel() else []
    for member, codes, times in zip(members, smallest, over, strict=True):
        if times is not None and member.target is not None:
            member.target.l0 = times.scale_to(member.target.target)
        if codes and member.sae.running_threshold is not None:
            member.sae.running_threshold.fill_(sum(codes) / len(codes))


def _steered(member: Member) -> tuple[TemporalSAE, nn.Parameter] | None:
    """An SAE with a target for L0 and thresholds of its own, and these."""
    sae = member.sae
    if member.target is None or not isinstance(sae, TemporalSAE) or not isinstance(sae.threshold, nn.Parameter):
        return None
    return sae, sae.threshold


class _TimesThreshold:
    """How many features exceed their threshold, or any multiple of it from a quarter to the fourfold."""

    def __init__(self, sae: TemporalSAE, threshold_F: nn.Parameter):
        self._sae, self._threshold_F = sae, threshold_F
        self._edges = torch.logspace(-2, 2, 2001, base=2.0, device=sae.W_enc.device)
        self._above = torch.zeros(len(self._edges) + 1, dtype=torch.float64, device=sae.W_enc.device)
        self._tokens = 0

    def add(self, x_NWD: Tensor) -> None:
        """Count the features of a batch."""
        pre = self._sae.pre_activations(x_NWD)
        times = pre[pre > 0] / self._threshold_F.expand_as(pre)[pre > 0]  # infinite where a threshold is zero
        place = torch.bucketize(times, self._edges)
        self._above += torch.bincount(place, minlength=len(self._above))
        self._tokens += pre[..., 0].numel()

    def scale_to(self, l0: float) -> float:
        """Multiply the thresholds with the factor that gives this L0, or comes nearest to it; returns what it gives."""
        above_E = self._above.flip(0).cumsum(0).flip(0)[1:] / self._tokens  # features per token above each edge
        # Where several factors do as well (no feature fires with any), the one nearest to 1.
        nearest = int(((above_E - l0).abs() + 1e-9 * self._edges.log2().abs()).argmin())
        self._threshold_F.mul_(float(self._edges[nearest]))
        return float(above_E[nearest])
