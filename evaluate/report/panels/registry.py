"""The panels there are, by name: this program's own and those of plug-ins, all registered with :func:`panel`.

A panel is a pure function from an evaluation to one chart of one layer; layers and sites get panels of their own, since
neither reference rows nor losses are comparable across them. Where its numbers are missing it is left out; nothing is
drawn from a null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

from ....errors import UsageError
from ....plugins import plugin_at_work
from ....registry import Registry
from ....sites import RESIDUAL, Location
from ...results import EvaluationReport
from ..chart import Panel

T = TypeVar("T", bound=Callable[..., Any])
Draw = Callable[[EvaluationReport, int], Panel | Iterable[Panel] | None]

SECTIONS = ("fidelity", "time", "position", "features", "training")
"""The page's sections with panels, in reading order."""
_BUILT_IN = {
    "fidelity": ("plane", "plane_zoomed", "variance_plane", "ce_rows", "kl_rows"),
    "time": ("time_plane", "weight_fidelity", "weight_variation", "lag_curves", "variation_rows"),
    "position": ("eta_histogram", "norm_by_position", "specific_rows"),
    "features": ("density_histogram",),
    "training": ("total_loss", "loss_shares", "sparsity_weights", "feature_weights", "temporal_weights"),
}


@dataclass(frozen=True)
class PanelEntry:
    """A registered panel and the section it stands in."""

    section: str
    draw: Draw


PANELS: Registry[PanelEntry] = Registry(
    "report panel", {name: f"evaluate.report.panels.{module}" for module, names in _BUILT_IN.items() for name in names}
)


def _placed(drawn: Panel, at: Location) -> Panel:
    """A panel among those of its layer and site, which its title names where it is not the residual stream."""
    drawn = replace(drawn, layer=at.layer, site=at.site)
    if at.site == RESIDUAL:
        return drawn
    return replace(drawn, key=f"{drawn.key}-{at.site}", title=f"{drawn.title}, {at.site}")


def panel(section: str, *, name: str | None = None) -> Callable[[T], T]:
    """Register the decorated function ``(report, layer)`` → panel, panels or None, for the page and for figures/.

    Within a section panels stand in the order in which they were registered, this program's own first.

    Args:
        section: fidelity, time, position, features or training.
        name: of the panel; None: the function's.

    Raises:
        UsageError: no such section, or the name is taken.

    """
    if section not in SECTIONS:
        raise UsageError(f"the report has no section '{section}': choose one of {', '.join(SECTIONS)}")

    def register(draw: T) -> T:
        PANELS.add(name or draw.__name__, PanelEntry(section, draw))
        return draw

    return register


def sections(report: EvaluationReport) -> dict[str, list[Panel]]:
    """Section → its panels, in reading order; a section without panels is an empty list.

    Raises:
        UsageError: a plug-in's panel fails, or two panels have one key.

    """
    found: dict[str, list[Panel]] = {section: [] for section in SECTIONS}
    names = PANELS.among(report.plugins)
    for site in report.sites:
        part = report.of_site(site)
        for layer, name in product(part.layers, names):
            entry = PANELS.get(name)
            with plugin_at_work(PANELS, name):
                drawn = entry.draw(part, layer)
                panels = [drawn] if isinstance(drawn, Panel) else list(drawn or ())
                found[entry.section] += [_placed(one, Location(layer, site)) for one in panels]
    keys = [one.key for group in found.values() for one in group]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UsageError(f"two report panels have the key '{twice}', which names their files: give each its own")
    return found
