"""What an SAE costs beside what it gives: parameters, arithmetic, and what its training took.

Nothing is measured here: the numbers are those of the weights' shapes and of the training's record, and stand in an
SAE's settings as ``cost.…``.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..train.run_folder.record import RunRecord
from ..train.sae.protocol import SparseAutoencoder
from .results import Definition, Metric

_NONE = "none: a count, or one measurement"
DEFINITIONS = {
    "parameters": Definition(
        text="numbers that were trained", unit="parameters", better="lower", label="parameters", interval=_NONE
    ),
    "forward_flops": Definition(
        text="floating-point operations that a token's code and reconstruction take, all features counted, in rows of "
        "the text's length",
        unit="FLOP/token",
        better="lower",
        label="FLOPs per token",
        group="cost",
        interval=_NONE,
    ),
    "training_time": Definition(
        text="time of this SAE's training steps over the tokens it saw, without reading and checkpoints; of members "
        "that step as one, an equal share",
        unit="µs/token",
        better="lower",
        label="training µs per token",
        group="cost",
        interval=_NONE,
    ),
    "training_memory": Definition(
        text="the most memory that the process (or its GPU) held while this SAE and those beside it trained",
        unit="bytes",
        better="lower",
        label="training memory",
        interval=_NONE,
    ),
}
_SETTINGS = {key: f"cost.{key}" for key in DEFINITIONS}


def cost_settings(
    sae: SparseAutoencoder, context: int, record: RunRecord | None = None
) -> dict[str, str | int | float | bool | None]:
    """What is known of an SAE's cost in rows of ``context`` positions, for its settings."""
    found: dict[str, str | int | float | bool | None] = {
        _SETTINGS["parameters"]: sum(parameter.numel() for parameter in sae.parameters()),
        _SETTINGS["forward_flops"]: round(sae.forward_flops(context)),
    }
    if record is not None and record.cost:
        seconds, tokens = record.cost.get("seconds"), record.tokens
        found[_SETTINGS["training_time"]] = 1e6 * seconds / tokens if seconds is not None and tokens else None
        found[_SETTINGS["training_memory"]] = record.cost.get("peak_memory_bytes")
        found["cost.trained_together"] = record.cost.get("members")
    return found


def cost_metrics(settings: Mapping[str, object]) -> dict[str, Metric]:
    """The same as metrics without intervals; what is not known is left out."""
    values = {key: settings.get(name) for key, name in _SETTINGS.items()}
    return {
        key: Metric(value=float(value), unit=DEFINITIONS[key].unit, n=1, definition=key)
        for key, value in values.items()
        if isinstance(value, int | float)
    }
