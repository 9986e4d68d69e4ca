"""Features: how often they fire."""

from __future__ import annotations

from ...results import EvaluationReport
from ..chart import Panel
from .parts import curve_panel
from .registry import panel


@panel("features")
def density_histogram(report: EvaluationReport, layer: int) -> list[Panel]:
    """How often features fire."""
    return curve_panel(
        report,
        layer,
        "density",
        f"Feature density, layer {layer}",
        "A lump at the far right are features that are nearly always on; dead features are not in it.",
    )
