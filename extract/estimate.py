"""How long an extraction would take: two forward passes over made-up tokens, nothing written."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..cache.layout import RowBlock
from ..console import format_bytes, format_count, format_duration
from .config import ExtractConfig
from .files import weights_in
from .forward import ForwardPass, choose_batch_size, until_it_fits
from .models import LanguageModel, identify_model, load_language_model
from .plan import Plan, make_plan, resolve_execution


@dataclass(frozen=True)
class Estimate:
    """The plan in numbers. Speeds are None where the weights are still on the hub."""

    rows: int
    tokens: int
    rows_stored: int
    bytes_per_layer: int
    bytes_together: int
    bytes_free: int | None
    batch_size: int | None
    tokens_per_second: float | None

    @property
    def seconds(self) -> float | None:
        """For the rows that are not stored yet."""
        left = max(0, self.rows - self.rows_stored) * (self.tokens // self.rows)
        return left / self.tokens_per_second if self.tokens_per_second else None

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the closing summary."""
        if as_json:
            return {**asdict(self), "seconds": self.seconds}
        seconds = self.seconds
        speed = f"about {format_duration(seconds)} at {self.tokens_per_second:,.0f} tokens/s" if seconds is not None else None
        return {
            "rows": f"{self.rows:,} ({format_count(self.tokens)} tokens), {self.rows_stored:,} stored already",
            "disk": f"{format_bytes(self.bytes_per_layer)} per layer, {format_bytes(self.bytes_together)} together",
            "free": format_bytes(self.bytes_free) if self.bytes_free is not None else "not known here",
            "time": speed or "unknown until the weights are downloaded",
        }


def estimate(config: ExtractConfig) -> Estimate:
    """Make the plan and time it on this machine.

    Raises:
        ModelError, TextError, StoreError, ResourceError: as ``make_plan``.

    """
    plan = make_plan(config)
    speed, batch_size = None, config.batch_size
    if plan.outline.files.gguf_file or weights_in(plan.outline.files.folder):
        speed, batch_size = _time_forward(plan)
    return Estimate(
        rows=plan.config.rows,
        tokens=plan.config.rows * plan.config.text.context,
        rows_stored=plan.stored.rows if plan.stored else 0,
        bytes_per_layer=plan.store_bytes,
        bytes_together=plan.store_bytes * len(config.paths),
        bytes_free=plan.bytes_free,
        batch_size=batch_size,
        tokens_per_second=speed,
    )


def _time_forward(plan: Plan) -> tuple[float, int]:
    lm = load_language_model(plan.outline, deepest_layer=max(plan.config.layers), identity=identify_model(plan.outline))
    batch_size = plan.config.batch_size or choose_batch_size(lm, plan.layout, plan.config.rows)
    execution = resolve_execution(plan, batch_size)
    torch.set_num_threads(execution.threads)
    return until_it_fits(lambda now: _time_batch(plan, lm, now.batch_size), execution, lm.identity.id, lambda _: None)


def _time_batch(plan: Plan, lm: LanguageModel, batch_size: int) -> tuple[float, int]:
    shape = (batch_size, plan.config.text.context)
    tokens_BT = np.random.default_rng(0).integers(0, lm.vocab_size, shape).astype(np.int32)
    block = RowBlock(tokens_BT, np.zeros(shape, np.int32), np.zeros(shape, np.uint8))
    forward = ForwardPass(lm, plan.config.layers, batch_size)
    forward.launch(block).land()
    began = time.perf_counter()
    forward.launch(block).land()
    return tokens_BT.size / (time.perf_counter() - began), batch_size
