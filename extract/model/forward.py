"""One forward pass after another: launched ahead of the copy to the CPU, padded to one shape, checked for NaN and Inf.

Every pass has exactly ``batch_size`` rows, the last one repeated where a shard ends early: a row's bits then depend on
its text and its place in the batch, not on how many rows came with it, and a shard that is extracted again is the same
to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from ...cache.format.layout import RowBlock, StoreLayout, to_bits
from ...cache.format.manifest import Execution
from ...console import warn
from ...errors import ModelError, ResourceError
from ...sites import Location
from .hooks import capture
from .load import LanguageModel

_CPU_TOKENS, _GPU_TOKENS = 1024, 32_768  # per pass: more is slower on a CPU, no faster on a GPU
_GPU_SHARE = 0.5  # of the free memory that a pass may fill


@dataclass
class PendingBatch:
    """A forward pass on its way: activations of ``rows`` rows that become readable with :meth:`result`."""

    rows: int
    tensors: dict[Location, torch.Tensor]
    event: Any = None

    def result(self) -> dict[Location, np.ndarray]:
        """Location → bfloat16 bits [rows, T, D], when they are there."""
        if self.event is not None:
            self.event.synchronize()
        return {at: to_bits(x_BTD[: self.rows]) for at, x_BTD in self.tensors.items()}


class ForwardPass:
    """Runs blocks of at most ``batch_size`` rows through a model and copies the tapped tensors out."""

    def __init__(self, lm: LanguageModel, locations: Sequence[Location], batch_size: int):
        self.lm, self.locations, self.batch_size = lm, tuple(locations), batch_size
        self._copies = torch.cuda.Stream(lm.device) if lm.device.type == "cuda" else None

    def launch(self, block: RowBlock) -> PendingBatch:
        """Begin the pass. On a GPU this returns while it runs; on a CPU when it is done.

        Raises:
            torch.OutOfMemoryError: the batch is too large for the device.
            ModelError: a token that the model has no embedding for.

        """
        tokens_BT = block.tokens_BT
        if tokens_BT.max() >= self.lm.vocab_size:
            raise ModelError(
                f"the tokenizer of {self.lm.identity.id} makes token {tokens_BT.max()}, its model "
                f"knows {self.lm.vocab_size}: "
                "they do not belong together"
            )
        if (missing := self.batch_size - len(tokens_BT)) > 0:
            tokens_BT = np.concatenate([tokens_BT, np.repeat(tokens_BT[-1:], missing, axis=0)])
        caught = capture(self.lm, tokens_BT, self.locations)
        rounded = {at: x_BTD.to(torch.bfloat16) for at, x_BTD in caught.items()}
        if self._copies is None:
            return PendingBatch(len(block), {at: x_BTD.cpu() for at, x_BTD in rounded.items()})
        return PendingBatch(len(block), *_copy_out(rounded, self._copies))


def _copy_out(
    tensors: dict[Location, torch.Tensor], copies: torch.cuda.Stream
) -> tuple[dict[Location, torch.Tensor], Any]:
    """Begin copying to pinned memory on a stream of its own, behind what the current stream computes."""
    copies.wait_stream(torch.cuda.current_stream(copies.device))
    landed = {}
    with torch.cuda.stream(copies):
        for at, x_BTD in tensors.items():
            landed[at] = torch.empty_like(x_BTD, device="cpu", pin_memory=True)
            landed[at].copy_(x_BTD, non_blocking=True)
            x_BTD.record_stream(copies)
    return landed, copies.record_event()


def check_finite(bits: dict[Location, np.ndarray], block: RowBlock, first_row: int, lm: LanguageModel) -> None:
    """Stop at the first activation that is NaN or Inf.

    Raises:
        ModelError: names layer, row, position and token.

    """
    for at, bits_BTD in sorted(bits.items()):
        exponent = bits_BTD & 0x7F80
        if exponent.max() < 0x7F80:
            continue
        row, position = np.argwhere((exponent == 0x7F80).any(axis=-1))[0]
        remedy = "" if lm.dtype == torch.float32 else ", or try --dtype float32"
        raise ModelError(
            f"{lm.identity.id} puts out NaN or Inf at layer {at}, row {first_row + row}, position {position} "
            f"(token {block.tokens_BT[row, position]}) in {lm.identity.dtype}: what was committed before is good; "
            f"check the weights{remedy}"
        )


Outcome = TypeVar("Outcome")


def until_it_fits(
    work: Callable[[Execution], Outcome], execution: Execution, model: str, restart: Callable[[Execution], object]
) -> Outcome:
    """What ``work`` returns; as often as it runs out of memory, ``restart`` and try again with half the batch.

    Raises:
        ResourceError: a single row does not fit.

    """
    while True:
        try:
            return work(execution)
        except torch.OutOfMemoryError:
            if execution.batch_size == 1:
                remedy = "use a smaller --context"
                raise ResourceError(
                    f"{model} runs out of memory on {execution.device} with a single row: {remedy}"
                ) from None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        execution = execution.model_copy(update={"batch_size": execution.batch_size // 2})
        warn(f"out of memory on {execution.device}: going on with {execution.batch_size} rows at a time")
        restart(execution)


def choose_batch_size(lm: LanguageModel, layout: StoreLayout, planned_rows: int) -> int:
    """Rows per pass: a power of two by the device's appetite, capped by its memory, the shard and the plan."""
    tokens = _CPU_TOKENS
    if lm.device.type == "cuda":
        tokens = min(
            _GPU_TOKENS, int(_GPU_SHARE * torch.cuda.mem_get_info(lm.device)[0] / _bytes_per_token(lm, layout.context))
        )
    rows = max(1, tokens // layout.context)
    return min(1 << (rows.bit_length() - 1), layout.shard_rows, 1 << (max(1, planned_rows) - 1).bit_length())


def _bytes_per_token(lm: LanguageModel, context: int) -> int:
    """Peak bytes that one token takes on its way through a block, generously: MLP, attention logits, scans of state
    spaces, tapped layers.
    """
    config: Any = lm.model.config.get_text_config()
    width = _largest(config, _WIDTHS) or 4 * lm.d_model
    logits = context * _largest(config, _HEADS) if lm.identity.attn_implementation == "eager" else 0
    # Without kernels of its own, transformers scans a state space over [inner width, state] of every token.
    scanned = 3 * max(width, 2 * lm.d_model) * _largest(config, _STATES)
    return lm.dtype.itemsize * (4 * width + 12 * lm.d_model) + 8 * logits + 4 * scanned


# What configurations call it; those of state spaces and linear attention have no heads that make logits.
_WIDTHS = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff", "dff", "ffn_hidden_size")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_STATES = ("state_size", "ssm_state_size", "mamba_d_state")


def _largest(config: Any, names: Sequence[str]) -> int:
    """The largest of these sizes, each a number or one per layer; 0 where the configuration has none of them."""
    # Transformers refuses to say of a whole model what differs between its layers; of each layer it says all.
    configs = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    found = [getattr(each, name, 0) for each in configs for name in names]
    flat = [size for each in found for size in (each if isinstance(each, list | tuple) else [each])]
    return max((size for size in flat if isinstance(size, int)), default=0)
