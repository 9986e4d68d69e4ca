"""What adding a direction to the residual stream does to the logits, through whatever the model does after its blocks.

What stands between the last block and the head is found by following the tensor: the modules that read it one after
another until the final state is there, whatever they are called (a norm as a rule; in OPT-350m a projection). It is
compared with a finite difference; a model where that fails has no logit effects, and :attr:`LogitEffects.note` says so.

Shapes: N directions, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...extract.model.module_hook import ModuleHook, first_tensor
from .splice import Head

if TYPE_CHECKING:
    from ...extract.model.load import LanguageModel

_FAR = 1e3  # far above any norm's epsilon
_STEP, _AGREES = 1e-3, 0.999  # of the finite difference; cosine with it


class LogitEffects:
    """Directions [N, D] of the residual stream after the last block → changes of the logits [N, V].

    They are those at a state orthogonal to the direction, up to one factor (the norm's scale there) and the softcap:
    the final norm's gain is applied and a LayerNorm's mean removed.
    """

    def __init__(self, lm: LanguageModel, head: Head):
        self.note: str | None = None
        self._head = head
        self._steps: list[nn.Module] = []
        x_D, steps = _after_blocks(lm)
        if not head.is_product:
            self._leave_out(lm, "its head is no plain product")
            return
        if steps is None:
            self._leave_out(lm, "nothing that reads the last block's output leads to its final state")
            return
        self._steps = [copy.deepcopy(step).float() for step in steps]
        if not self._follows_a_difference(x_D.float()):
            self._leave_out(lm, "what its final modules do to a direction is not what they do to a small step along it")

    def _leave_out(self, lm: LanguageModel, why: str) -> None:
        self.note = f"logit effects are left out for {lm.identity.architecture}: {why}"

    @torch.no_grad()
    def __call__(self, directions_ND: Tensor) -> Tensor | None:
        """The effects [N, V]; None where they are left out."""
        if self.note is not None:
            return None
        return self._head.product(self._through(directions_ND.float()))

    def _through(self, directions_ND: Tensor) -> Tensor:
        length_N1 = directions_ND.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        unit_ND = directions_ND / length_N1
        origin = self._run(torch.zeros_like(unit_ND[:1]))
        once, twice = (self._run(unit_ND * far) - origin for far in (_FAR, 2 * _FAR))
        # A norm gives the same for any length, √D at a gain of 1; a projection alone twice as much for twice as much.
        normed = bool((twice - once).norm() < 0.5 * once.norm())
        return once * length_N1 / (unit_ND.shape[-1] ** 0.5 if normed else _FAR)

    def _run(self, x: Tensor) -> Tensor:
        for step in self._steps:
            x = first_tensor(step(x))
        return x

    @torch.no_grad()
    def _follows_a_difference(self, x_D: Tensor) -> bool:
        draw = torch.Generator().manual_seed(0)
        direction_D = torch.randn(len(x_D), generator=draw).to(x_D.device)
        basis_D2, _ = torch.linalg.qr(torch.stack([x_D, torch.ones_like(x_D)], dim=1))
        direction_D -= basis_D2 @ (basis_D2.T @ direction_D)
        step_D = direction_D / direction_D.norm() * x_D.norm() * _STEP
        difference = self._run((x_D + step_D)[None]) - self._run(x_D[None])
        cosine = torch.cosine_similarity(difference, self._through(step_D[None]), dim=-1)
        return bool(cosine >= _AGREES)


@torch.no_grad()
def _after_blocks(lm: LanguageModel) -> tuple[Tensor, list[nn.Module] | None]:
    """An output [D] of the last block, and the modules that make the final state of it; None where they do not."""
    kept: dict[str, Tensor] = {}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    inside = {id(module) for block in lm.blocks for module in block.modules()}
    tokens_BT = (lm.vocab_size // 2 + torch.arange(8, device=lm.device))[None] % lm.vocab_size

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next((one for one in (*args, *kwargs.values()) if torch.is_tensor(one)), None)
        made = first_tensor(output) if torch.is_tensor(output) or isinstance(output, tuple | list) else None
        if "last" in kept and torch.is_tensor(given) and torch.is_tensor(made):
            calls.append((module, given.clone(), made.clone()))

    with ExitStack() as hooks:
        hooks.enter_context(ModuleHook(lm.blocks[-1]).keep(kept, "last"))
        for module in lm.decoder.modules():
            if id(module) not in inside and module is not lm.decoder:
                hooks.callback(module.register_forward_hook(watch, with_kwargs=True).remove)
        final = lm.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return kept["last"][0, -1], _path(kept["last"], final, calls)


def _path(x: Tensor, final: Tensor, calls: Sequence[tuple[nn.Module, Tensor, Tensor]]) -> list[nn.Module] | None:
    steps: list[nn.Module] = []
    for module, given, made in calls:  # in the order in which they end: what a module is made of before itself
        if _equal(x, final):
            break
        if _equal(given, x):
            steps.append(module)
            x = made
    return steps if _equal(x, final) else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
