"""Position: how much the features depend on where in the row a token stands."""

from __future__ import annotations

from ...results import EvaluationReport
from ..chart import Axis, Panel
from .parts import curve_panel, row_panel, saes_of
from .registry import panel


@panel("position")
def eta_histogram(report: EvaluationReport, layer: int) -> list[Panel]:
    """How much of each feature's variance its position explains."""
    return curve_panel(
        report,
        layer,
        "eta_squared",
        f"Dependence on position, layer {layer}",
        "Share of each feature's variance that position explains, corrected for bias. Counts on a log scale.",
        log_y=True,
    )


@panel("position")
def norm_by_position(report: EvaluationReport, layer: int) -> list[Panel]:
    """Size by position."""
    title = f"By position in the row, layer {layer}"
    caption = "A level line means that position does not matter; the first tokens after the start are usually special."
    return curve_panel(report, layer, "norm_by_position", title, caption) or curve_panel(
        report, layer, "position_profile", title, caption
    )


@panel("position")
def specific_rows(report: EvaluationReport, layer: int) -> Panel | None:
    """Share of features that are position-specific."""
    caption = (
        "Features whose firing depends on position more than rotated rows allow, at a false-discovery rate of 5 %."
    )
    axis = Axis("share of position-specific features", low=0)
    return row_panel(
        report,
        saes_of(report, layer),
        "position_specific_share",
        f"Position-specific features, layer {layer}",
        axis,
        caption,
    )
