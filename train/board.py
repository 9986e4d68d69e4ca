"""What a terminal shows of members in training: a row of numbers for each, and what the stream they share has cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..bars import Table
from ..console import format_count, format_duration
from .diagnostics import Metrics

_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", "{:.4g}".format),
    "explained_variance": ("explained\nvariance", "{:.3f}".format),
    "l0": ("L0", "{:.4g}".format),
    "dead_share": ("dead\nshare", "{:.1%}".format),
    "temporal_share": ("temporal\nshare", "{:.1%}".format),
    "temporal_variation": ("temporal\nvariation", "{:.3f}".format),
}


def board(members: Mapping[str, Metrics], rate: Metrics, step: int) -> Table:
    """The table under the progress bar.

    Args:
        members: their last metrics by name, as in ``metrics.jsonl``; what is None or missing is shown as a dash.
        rate: tokens per second and seconds of waiting since the step logged before.
        step: of these metrics.

    """
    rows = [(name, [_cell(metrics.get(key), form) for key, (_, form) in _COLUMNS.items()]) for name, metrics in members.items()]
    speed, waited = rate.get("tokens_per_second"), rate.get("seconds_waiting")
    said = [f"step {step}"]
    said += [f"{format_count(speed)} tokens/s"] if speed is not None else []
    said += [f"{format_duration(waited)} waiting for the disk"] if waited is not None else []
    return Table([head for head, _ in _COLUMNS.values()], rows, foot=", ".join(said))


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "—" if value is None else form(value)
