"""Hook points: the tensors of a model that can be stored, and replaced by what an SAE makes of them.

A hook point is a function from a :class:`~tcsae.extract.model.block.Block` to a :class:`ModuleHook`. The built-in
ones are found in the block's structure and verified by its arithmetic, never by the names of its parts alone. What
lies inside a block (``mlp_out``, ``attn_out``) is what is *added* to the residual stream: after Gemma 2's post-norms
and Granite's multiplier, as in TransformerLens.

Shapes: B rows, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...errors import ModelError, UsageError
from ...sites import HOOK_POINTS, Location
from .block import Block
from .module_hook import ModuleHook

if TYPE_CHECKING:
    from .load import LanguageModel

__all__ = ["HOOK_POINTS", "HookPoint", "capture", "hook_of", "hook_point", "module_path"]


@dataclass(frozen=True)
class HookPoint:
    """A registered hook point."""

    find: Callable[[Block], ModuleHook]
    """Where the tensor of one block is."""
    hook_name: str
    """Its name in TransformerLens and SAELens, with ``{layer}`` where the layer's number stands."""
    deepest: Callable[[int], int]
    """Layer → the deepest block that must run for it."""


def hook_point(
    name: str, *, hook_name: str | None = None, deepest: Callable[[int], int] = lambda layer: layer
) -> Callable[[Callable[[Block], ModuleHook]], Callable[[Block], ModuleHook]]:
    """Register a function that finds a tensor [B, T, D] in a block, as a decorator.

    Args:
        name: what ``--site`` and the stores' names call it.
        hook_name: what SAELens calls it, such as ``blocks.{layer}.ln2.hook_normalized``; by default
            ``blocks.{layer}.hook_NAME``.
        deepest: the deepest block that must run, by layer.

    Raises:
        UsageError: the name is taken or unfit, or ``hook_name`` does not say where the layer stands.

    """
    hook_name = hook_name or f"blocks.{{layer}}.hook_{name}"
    if hook_name.count("{layer}") != 1:
        raise UsageError(f"the hook name '{hook_name}' of '{name}' must hold '{{layer}}' once, for the layer's number")

    def add(find: Callable[[Block], ModuleHook]) -> Callable[[Block], ModuleHook]:
        HOOK_POINTS.add(name, HookPoint(find, hook_name, deepest))
        return find

    return add


@hook_point("resid_post")
def resid_post(block: Block) -> ModuleHook:
    """The residual stream after the block."""
    return ModuleHook(block.module)


@hook_point("resid_pre", deepest=lambda layer: max(0, layer - 1))
def resid_pre(block: Block) -> ModuleHook:
    """The residual stream before the block: the output of the block before it, where there is one."""
    return ModuleHook(block.module, "input") if block.previous is None else ModuleHook(block.previous)


@hook_point("resid_mid")
def resid_mid(block: Block) -> ModuleHook:
    """The residual stream between attention and MLP."""
    return block.middle


@hook_point("mlp_out")
def mlp_out(block: Block) -> ModuleHook:
    """What the MLP adds to the residual stream."""
    return block.mlp


@hook_point("attn_out")
def attn_out(block: Block) -> ModuleHook:
    """What attention adds to the residual stream."""
    return block.attention


def deepest_block(locations: Sequence[Location]) -> int:
    """The deepest block that must run for all of them."""
    return max(HOOK_POINTS.get(at.site).deepest(at.layer) for at in locations)


def hook_of(lm: LanguageModel, at: Location) -> ModuleHook:
    """Where the tensor of that place is in a loaded model; looked for once per model.

    Raises:
        ModelError: the model has no such layer, or its block is not built so that the tensor can be told.
        UsageError: no such hook point.

    """
    if at not in lm.module_hooks:
        point: HookPoint = HOOK_POINTS.get(at.site)
        if point.deepest(at.layer) >= len(lm.blocks) or at.layer >= lm.n_layers:
            raise ModelError(f"layer {at} cannot be tapped: {lm.identity.id} is loaded with {len(lm.blocks)} layers")
        lm.module_hooks[at] = point.find(Block.of(lm, at.layer))
    return lm.module_hooks[at]


def module_path(lm: LanguageModel, at: Location) -> str:
    """The path of the tapped module in the model that ``AutoModelForCausalLM`` loads: ``model.layers.3.mlp``."""
    module = hook_of(lm, at).module
    return next(name for name, each in lm.model.named_modules() if each is module)


@torch.no_grad()
def capture(lm: LanguageModel, tokens_BT: Tensor | np.ndarray, locations: Sequence[Location]) -> dict[Location, Tensor]:
    """The tensors [B, T, D] at ``locations`` in one pass that ends below the head, on the model's device, in its dtype.

    At ``resid_post`` of layer L it equals ``hidden_states[L + 1]`` of transformers, except at the last block, where
    transformers reports the state after the final norm and this the state before it. Rows must be whole contexts
    without padding.

    Raises:
        ModelError: as :func:`hook_of`; or something that is not [B, T, D].

    """
    tokens = torch.as_tensor(tokens_BT, dtype=torch.long).to(lm.device, non_blocking=True)
    caught: dict[Location, Tensor] = {}
    with ExitStack() as hooks:
        for at in locations:
            hooks.enter_context(hook_of(lm, at).keep(caught, at))
        lm.decoder(input_ids=tokens, use_cache=False)
    shape = (*tokens.shape, lm.d_model)
    for at in locations:
        if at not in caught:
            raise ModelError(f"layer {at} of {lm.identity.architecture} was not run: it cannot be tapped")
        if caught[at].numel() == tokens.numel() * lm.d_model:  # OPT hands all tokens of a batch on in a row, [B·T, D]
            caught[at] = caught[at].reshape(shape)
        caught[at] = caught[at].to(lm.device)  # its block may lie on another
        if caught[at].shape != shape:
            raise ModelError(
                f"layer {at} of {lm.identity.architecture} gives {tuple(caught[at].shape)}, not {shape}: it cannot "
                "be tapped"
            )
    return caught
