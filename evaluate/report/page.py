"""The report: one self-contained page and its static figures, from an :class:`EvaluationReport` and nothing else.

The page loads nothing: style, script, charts and the feature browser's data are inside it, and it says so to the
browser in a content security policy. The same evaluation always gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...system.atomic_files import remove_partials, write_file
from ..config import CODES_FOLDER
from ..features.page_data import embedded, payload
from ..results import EvaluationReport, Metric
from .chart import DARK, LIGHT, STYLES, TERMS, Panel
from .figures import write_figures
from .panels.registry import sections
from .svg import render, swatch
from .sweep import in_reading_order
from .tables import Cell, Column, cell, comparisons, difference_tables, full_tables, main_tables, published, reasons_of
from .verdict import by_series, first_sentences, verdicts
from .wording import PAIRS, evaluated, named, outcomes_of_changes, provenance

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "index.html"
ALL_FEATURES = "features/index.html"
"""Every feature, where `pipeline features --html` has written it beside the page."""
_ABANDONED = 3600.0  # seconds after which a file in the making is nobody's any more
_GROUNDS = {  # background, text, muted text, thin lines, shaded areas
    "light": (LIGHT, "#1b1d21", "#5c5f66", "#dedbd3", "#f1efe9"),
    "dark": (DARK, "#e8e6e1", "#a4a8b0", "#34373d", "#22252a"),
}


def write_report(report: EvaluationReport, folder: Path) -> Path:
    """Write ``index.html`` and ``figures/*.png|svg`` into the folder; returns the page's path.

    Raises:
        RunError, ResourceError: the folder cannot be written.

    """
    folder = Path(folder)
    report = in_reading_order(report)
    panels = sections(report)
    write_figures([panel for group in panels.values() for panel in group], folder / "figures")
    features = ALL_FEATURES if (folder / ALL_FEATURES).is_file() else None
    page = write_file(folder / PAGE, render_page(report, panels, features=features))
    for each in (folder, folder / "figures", *folder.glob("rows/*")):
        remove_partials(each, older_than=_ABANDONED)
    return page


def render_page(
    report: EvaluationReport, panels: dict[str, list[Panel]] | None = None, *, features: str | None = None
) -> str:
    """The page as text; ``features``: where every feature is shown, as a relative address."""
    report = in_reading_order(report)
    panels = sections(report) if panels is None else panels
    browser, found = payload(report), verdicts(report)
    environment = page_environment()
    environment.filters["groupby_run"] = _runs
    published_table = published(report)
    return environment.get_template("report.html.j2").render(
        report=report,
        css=asset("report.css"),
        js=asset("dom.js") + asset("report.js"),
        colours=colours(),
        swatches={role: swatch(role) for role in STYLES},
        evaluated=evaluated(report),
        outcomes=first_sentences(found) + outcomes_of_changes(report),
        verdicts=found,
        verdicts_by_series=by_series(found, report),
        comparisons={kind: comparisons(report, kind) for kind in PAIRS},
        differences=difference_tables(report),
        main_tables=main_tables(report),
        full_tables=full_tables(report),
        panels={key: _drawn(group) for key, group in panels.items()},
        keys={key: _legend(group) for key, group in panels.items()},
        own_keys={panel.key: _own_legend(panel) for group in panels.values() for panel in group},
        model_name=named(report.model.id, "model"),
        published=published_table,
        published_reasons=reasons_of(cell for row in published_table[1] for cell in row.here)
        if published_table
        else {},
        ln_vocabulary=math.log(report.model.vocab_size),
        compat=_compat(report),
        sae_facts=[record for record in report.records if record.sae],
        provenance=provenance(report),
        browser=browser,
        browser_json=embedded(browser),
        browser_note=_browser_note(browser),
        all_features=features,
        kept_codes=CODES_FOLDER if any(record.codes for record in report.records) else None,
        contents=_contents(report, panels, browser, published_table is not None),
    )


def _drawn(panels: Sequence[Panel]) -> list[list[dict[str, Any]]]:
    """Panels with their drawings, in rows by layer and site; one row where each has but one panel. Charts of the parts
    of a sweep are one item.
    """
    rows = [list(group) for _, group in groupby(panels, key=lambda panel: (panel.layer, panel.site))]
    if all(len(row) == 1 for row in rows):
        rows = [list(panels)] if panels else []
    return [
        [
            {"title": first.title, "charts": [{"panel": panel, "svg": render(panel)} for panel in (first, *rest)]}
            for _, (first, *rest) in groupby(row, key=lambda panel: panel.title if panel.part else panel.key)
        ]
        for row in rows
    ]


def _legend(panels: Sequence[Panel]) -> list[tuple[str, str]]:
    """(style, name) of what a section's panels show in common."""
    found = [entry for panel in panels if not panel.own_legend for entry in panel.legend() if entry[0] not in TERMS]
    return sorted(dict.fromkeys(found), key=lambda entry: list(STYLES).index(entry[0]))


def _own_legend(panel: Panel) -> list[tuple[str, str]]:
    """What a panel shows that only it shows: the terms of a loss, or styles with another meaning."""
    found = [entry for entry in panel.legend() if panel.own_legend or entry[0] in TERMS]
    return found if len(found) > 1 else []


def _contents(
    report: EvaluationReport, panels: dict[str, list[Panel]], browser: dict[str, Any], has_published: bool
) -> dict[str, str]:
    """The sections that this page has."""
    present = {
        "twins": ("TC-SAE against its twin", any(pair.kind == "twin" for pair in report.paired)),
        "pruned": ("Pruned against the original", any(pair.kind == "pruned" for pair in report.paired)),
        "finetuned": ("Fine-tuned against the original", any(pair.kind == "finetuned" for pair in report.paired)),
        "table": ("Every row, the main numbers", True),
        "fidelity": ("Fidelity and sparsity", panels["fidelity"]),
        "time": ("Time", panels["time"]),
        "position": ("Position", panels["position"]),
        "features": ("Feature density", panels["features"]),
        "browse": ("Features along the text", browser["saes"]),
        "training": ("Training", panels["training"]),
        "published": ("Where published numbers come from", has_published),
        "everything": ("Everything else", True),
    }
    return {key: title for key, (title, there) in present.items() if there}


def _browser_note(browser: dict[str, Any]) -> str:
    """Which features are in the browser, and why those."""
    shown = [len(sae["features"]) for sae in browser["saes"]]
    if not shown:
        return ""
    least, most = min(shown), max(shown)
    count = f"{most}" if least == most else f"{least} to {most}"
    cut = any(sae["total"] > len(sae["features"]) for sae in browser["saes"])
    bound = " Fewer than were described, to bound this page's size; results.json has the rest." if cut else ""
    return (
        f"{count} features of each autoencoder: some at random among those that fire, the rest because they are "
        f"extreme in something; each says which.{bound} The bars over the words are the activation, token by token; "
        "the area above them is the same over positions."
    )


def _compat(report: EvaluationReport) -> dict[str, Any] | None:
    """The SAEBench block as a table."""
    keys = list(dict.fromkeys(key for record in report.records for key in record.saebench_compat))
    rows = [(f"{r.name}, layer {r.location}", r.saebench_compat) for r in report.records if r.saebench_compat]
    return (
        {"columns": keys, "rows": [(name, [_plain(found, key) for key in keys]) for name, found in rows]}
        if rows
        else None
    )


def _plain(found: dict[str, float | None], key: str) -> Cell:
    return cell(Metric(value=found[key], unit="1", n=0, definition=key) if key in found else None, 4)


def _runs(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """Neighbouring columns of one group, and how many they are."""
    return [(name, len(list(group))) for name, group in groupby(columns, key=lambda column: column.group)]


def page_environment(*folders: Path) -> Environment:
    """Templates of ``folders`` and of the report, everything escaped that is no markup of ours."""
    return Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(name: str) -> Markup:
    """A file of the templates, put into the page as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704 - our own file


def colours() -> Markup:
    """The page's colours as custom properties, in the light and in the dark scheme, from the one table of roles."""

    def block(ground: str) -> str:
        names = ("ground", "ink", "muted", "hair", "wash")
        pairs = [
            *zip(names, _GROUNDS[ground], strict=True),
            *((role, getattr(s, ground)) for role, s in STYLES.items()),
        ]
        return "".join(f"--{name}:{value};" for name, value in pairs)

    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{block('dark')}}}}}"
    inks = "".join(f".ink-{role}{{color:var(--{role})}}" for role in STYLES)
    return Markup(f":root{{color-scheme:light dark;{block('light')}}}{dark}{inks}")  # noqa: S704 - constants
