"""One process or several, of one machine or several: data parallelism over the windows of a batch, started by
``torchrun``.

Every process draws the same batches from the same stream and takes its share of the windows; gradients are summed with
weights, so that a step equals the one-process step on the whole batch up to rounding. What is no mean over windows sees
one share at a time, which :func:`seen_by_share` names and a run says at its start. Only process 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor

from ...console import set_quiet
from ..config import TrainConfig
from ..loss.objective import StepResult
from ..loss.registry import PARTNERS, TERMS
from ..sae.protocol import SparseAutoencoder


@dataclass(frozen=True)
class World:
    """Which process this is of how many."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def share(self, n_items: int, *, together: int = 1) -> slice:
        """The process's windows, pairs or rows of a batch of ``n_items``; every ``together`` of them stay together."""
        cuts = [n_items // together * at // self.size * together for at in range(self.size)] + [n_items]
        return slice(cuts[self.rank], cuts[self.rank + 1])

    @torch.no_grad()
    def combine(self, sae: SparseAutoencoder, result: StepResult, weight: float) -> StepResult:
        """Gradients and terms of the whole batch from those of the shares; ``weight`` is this share's part of the
        windows.
        """
        if self.size == 1:
            return result
        gradients = [p.grad for p in sae.parameters() if p.grad is not None]
        names = ("total", "reconstruction", "sparsity", "temporal", "auxiliary", "error")
        terms = torch.stack([getattr(result, name) for name in names])
        self._sum([*gradients, terms], weight)
        fired_F = result.fired_F.clone()
        self._sum([fired_F], 1)
        self._sum([buffer for buffer in sae.buffers() if buffer.is_floating_point()], 1 / self.size)
        return replace(result, fired_F=fired_F, **dict(zip(names, terms.unbind(), strict=True)))

    def mean(self, value: Tensor, weight: float) -> Tensor:
        """Mean over the whole batch from the means over the shares."""
        if self.size == 1:
            return value
        value = value.clone()
        self._sum([value], weight)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        seen = torch.tensor(int(flag))
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen)

    def agrees(self, facts: object) -> bool:
        """Whether every process was given the same facts (compared by their representation)."""
        if self.size == 1:
            return True
        number = int.from_bytes(sha256(repr(facts).encode()).digest()[:7], "big")
        ends = torch.tensor([number, -number])
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        return int(ends[0]) == -int(ends[1])

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def _sum(self, tensors: Iterable[Tensor], weight: float) -> None:
        for tensor in tensors:
            if weight != 1:
                tensor.mul_(weight)
            dense = tensor.contiguous()  # W_enc is feature-major
            dist.all_reduce(dense)
            if dense is not tensor:
                tensor.copy_(dense)


def seen_by_share(configs: Iterable[TrainConfig]) -> list[str]:
    """What of these runs is no mean over windows, and so is not the same for several processes as for one."""
    found: set[str] = set()
    for config in configs:
        term = config.temporal
        if config.sae.activation == "batchtopk":
            found.add("batchtopk's choice of the largest codes")
        if config.loss.aux_normalised and config.loss.aux_weight:
            found.add("the variance that AuxK is divided by")
        if term.form != "none" and not TERMS.get(term.form).mean_over_windows:
            found.add(f"the {term.form} form")
        if term.form != "none" and PARTNERS.get(term.partner).drawn:
            found.add(f"the draw of {term.partner} partners")
    return sorted(found)


def speaks() -> bool:
    """Whether this process is the one that prints, before and after it joins the others."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world that ``torchrun`` describes in the environment, joined for the block; a world of one without it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels of our own are started on the current device
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if not speaks():
        set_quiet(True)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
