"""Which modules of a model are its blocks: found as a list beside the embedding, and verified in a small pass.

Shapes: B rows, T positions, D model width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...console import note
from ...errors import ModelError
from .module_hook import ModuleHook
from .placement import input_device

_ROWS, _POSITIONS = 2, 6


@dataclass
class Blocks:
    """A model's decoder (embedding, blocks, final norm) and the list in it whose modules put out the residual stream.

    ``outputs`` and ``tokens_BT`` are of the small pass that verified them.
    """

    decoder: nn.Module
    name: str
    tokens_BT: Tensor
    outputs: dict[int, Tensor]

    @property
    def blocks(self) -> nn.ModuleList:
        """The list."""
        return getattr(self.decoder, self.name)


def candidates(model: nn.Module, n_layers: int) -> Iterator[tuple[nn.Module, str]]:
    """Every list of ``n_layers`` modules beside the token embedding: (the module that holds it, its name there)."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    for decoder in model.modules():
        for name, child in decoder.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers and embedding in decoder.modules():
                yield decoder, name


@torch.no_grad()
def verified_blocks(model: nn.Module, n_layers: int, d_model: int) -> Blocks:
    """The blocks of a causal language model.

    They must put out what the model reports as its hidden states, or, where it reports other states, each must be
    called once and read what the one before it has put out.

    Raises:
        ModelError: no list does; the sentence says which there are.

    """
    found = list(candidates(model, n_layers))
    who = type(model).__name__
    if not found:
        raise ModelError(f"{who} keeps its {n_layers} blocks in no list beside its embedding: it cannot be tapped")
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    device = input_device(model)
    # From the middle of the vocabulary: the first tokens are padding and the like, which XLM sets to zero.
    tokens_BT = (vocabulary // 2 + torch.arange(_ROWS * _POSITIONS, device=device)).reshape(_ROWS, -1) % vocabulary
    for decoder, name in found:
        outputs, inputs, calls, states = _watch(decoder, getattr(decoder, name), tokens_BT)
        shape = (*tokens_BT.shape, d_model)
        # One tensor each, in one call: a block that runs several times in a pass has no output of its own.
        if any(getattr(outputs.get(at), "shape", None) != shape or calls[at] != 1 for at in range(n_layers)):
            continue
        upper = range(1, n_layers)
        reported = len(states) == n_layers + 1 and all(_equal(outputs[at - 1], states[at]) for at in upper)
        if reported or all(_equal(outputs[at - 1], inputs.get(at)) for at in upper):
            return Blocks(decoder, name, tokens_BT, outputs)
    names = ", ".join(name for _, name in found)
    raise ModelError(
        f"{who} has lists of {n_layers} modules ({names}), but none whose outputs are its hidden states: it cannot be "
        "tapped"
    )


def cut_above(found: Blocks, deepest: int) -> None:
    """Drop the blocks above ``deepest``, where the others then still give what they gave."""
    whole = found.blocks
    setattr(found.decoder, found.name, nn.ModuleList(list(whole)[: deepest + 1]))
    try:
        outputs, *_ = _watch(found.decoder, found.blocks, found.tokens_BT)
        reason = None if _equal(found.outputs[deepest], outputs.get(deepest)) else "the others then give other numbers"
    except Exception as failure:
        reason = f"{type(failure).__name__}: {failure}"
    if reason is not None:
        setattr(found.decoder, found.name, whole)
        note(f"{type(found.decoder).__name__} runs whole: its blocks above {deepest} cannot be dropped ({reason})")


@torch.no_grad()
def _watch(
    decoder: nn.Module, blocks: nn.ModuleList, tokens_BT: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor], Counter[int], tuple[Tensor, ...]]:
    """What each block puts out and reads, how often it is called, and the hidden states that the model reports."""
    outputs: dict[int, Any] = {}
    inputs: dict[int, Any] = {}
    calls: Counter[int] = Counter()
    with ExitStack() as hooks:
        for at, block in enumerate(blocks):
            hooks.enter_context(ModuleHook(block).keep(outputs, at))
            hooks.enter_context(ModuleHook(block, "input").keep(inputs, at))
            counting = block.register_forward_hook(lambda *_, at=at: calls.update([at]))
            hooks.callback(counting.remove)
        answer = decoder(input_ids=tokens_BT, use_cache=False, output_hidden_states=True)
    return outputs, inputs, calls, getattr(answer, "hidden_states", None) or ()


def _equal(a: Any, b: Any) -> bool:
    """Bit for bit; NaN of damaged weights is for later to find, and to name."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
    return both and torch.allclose(a, b.to(a.device), rtol=0, atol=0, equal_nan=True)
