"""Which charts a report has, section by section and layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .chart import Panel
from .loss_panels import training_panels
from .panels import (
    ce_rows,
    density_histogram,
    eta_histogram,
    kl_rows,
    lag_curves,
    norm_by_position,
    plane,
    plane_zoomed,
    specific_rows,
    time_plane,
    variance_plane,
    variation_rows,
)
from .results import EvaluationReport
from .weight_panels import weight_fidelity, weight_variation


def sections(report: EvaluationReport) -> dict[str, list[Panel]]:
    """Section → its panels, in reading order; a section without panels is an empty list."""
    return {
        "fidelity": _each_layer(report, plane, plane_zoomed, variance_plane, ce_rows, kl_rows),
        "time": _each_layer(report, time_plane, weight_fidelity, weight_variation, lag_curves, variation_rows),
        "position": _each_layer(report, eta_histogram, norm_by_position, specific_rows),
        "features": _each_layer(report, density_histogram),
        "training": training_panels(report),
    }


Builder = Callable[[EvaluationReport, int], Panel | None]


def _each_layer(report: EvaluationReport, *builders: Builder) -> list[Panel]:
    built = [(layer, builder(report, layer)) for layer in report.layers for builder in builders]
    return [replace(panel, layer=layer) for layer, panel in built if panel is not None]
