"""The residual stream after chosen blocks, caught by forward hooks in one pass that ends below the head.

Shapes: B rows, T positions, D model width. What is caught at block L equals ``hidden_states[L + 1]`` of transformers,
except at the last block, where transformers reports the state after the final norm and this the state before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ModelError
from .load import LanguageModel


class ResidualTap:
    """Keeps the output of each of ``layers`` in ``caught`` while entered."""

    def __init__(self, blocks: nn.ModuleList, layers: Sequence[int]):
        self._blocks, self._layers = blocks, layers
        self._handles: list[Any] = []
        self.caught: dict[int, Tensor] = {}

    def __enter__(self) -> ResidualTap:
        for layer in self._layers:
            self._handles.append(self._blocks[layer].register_forward_hook(self._keep(layer)))
        return self

    def _keep(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # A tensor from transformers 5 on, a tuple that begins with it before.
            self.caught[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@torch.no_grad()
def capture(lm: LanguageModel, tokens_BT: Tensor | np.ndarray, layers: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream [B, T, D] after each of ``layers``, on the model's device and in its dtype.

    Rows must be whole contexts without padding.

    Raises:
        ModelError: a layer that the (truncated) model does not have, or blocks that do not put out [B, T, D].

    """
    if missing := [layer for layer in layers if layer >= len(lm.blocks)]:
        raise ModelError(
            f"layer {missing[0]} cannot be tapped: {lm.identity.id} is loaded with {len(lm.blocks)} layers"
        )
    tokens = torch.as_tensor(tokens_BT, dtype=torch.long).to(lm.device, non_blocking=True)
    with ResidualTap(lm.blocks, layers) as tap:
        lm.decoder(input_ids=tokens, use_cache=False)
    shape = (*tokens.shape, lm.d_model)
    for layer, x_BTD in tap.caught.items():
        if x_BTD.shape != shape:
            raise ModelError(
                f"block {layer} of {lm.identity.architecture} puts out {tuple(x_BTD.shape)}, not "
                f"{shape}: it cannot be tapped"
            )
    return tap.caught
