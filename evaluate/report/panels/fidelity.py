"""Fidelity and sparsity: what the splice costs the model, against how many features are active."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...results import EvaluationReport
from ..chart import Axis, Mark, Panel, Rule
from ..sweep import Sweep
from .parts import charts, links, records_of, row_panel, saes_of, scatter, scattered
from .registry import panel


@panel("fidelity")
def plane(report: EvaluationReport, layer: int) -> Panel | None:
    """L0 against CE recovered, the reference rows included."""
    marks, rules = scatter(report, records_of(report, layer), "l0", "ce_score_mean")
    if not marks:
        return None
    return Panel(
        f"plane-{layer}",
        f"Fidelity against sparsity, layer {layer}",
        Axis("L0: active features per token", low=0),
        Axis("CE recovered (1: the model, 0: mean ablation)"),
        marks,
        rules=rules,
        links=links(report, layer, marks),
        caption="Every row. A reference without features has no L0 and is drawn as a level.",
        names=Sweep(report).names,
    )


@panel("fidelity")
def plane_zoomed(report: EvaluationReport, layer: int) -> list[Panel]:
    """The same without the reference rows, so that SAEs can be told apart."""
    drawn = scattered(report, saes_of(report, layer), "l0", "ce_score_mean")
    if not drawn.marks:
        return []
    marks = [mark for _, mark in drawn.marks]
    chart = Panel(
        f"plane-zoomed-{layer}",
        f"The SAEs alone, layer {layer}",
        _l0_axis(marks),
        Axis("share of CE recovered"),
        links=(joined := links(report, layer, marks)),
        caption="The same, enlarged."
        + (" A thin line joins a pair; where two coincide they are drawn apart." if joined else ""),
    )
    return charts(report, drawn, chart)


@panel("fidelity")
def variance_plane(report: EvaluationReport, layer: int) -> list[Panel]:
    """L0 against explained variance, SAEs alone: an untrained one lies far below."""
    drawn = scattered(report, saes_of(report, layer), "l0", "explained_variance")
    if not drawn.marks:
        return []
    marks = [mark for _, mark in drawn.marks]
    chart = Panel(
        f"variance-{layer}",
        f"Explained variance, layer {layer}",
        _l0_axis(marks),
        Axis("explained variance"),
        links=links(report, layer, marks),
        caption="What is explained of the activations need not be what the model uses: compare with CE recovered.",
    )
    return charts(report, drawn, chart)


@panel("fidelity")
def ce_rows(report: EvaluationReport, layer: int) -> Panel | None:
    """Cross-entropy of every row between the clean model and a uniform guess."""
    ln_vocabulary = math.log(report.model.vocab_size)
    uniform = Rule(f"uniform guess, ln V = {ln_vocabulary:.2f}", x=ln_vocabulary)
    clean = next(
        (m.value for r in records_of(report, layer) if (m := r.metrics.get("ce_clean")) and m.value is not None), None
    )
    rules = [uniform] if clean is None else [Rule(f"clean model {clean:.2f}", x=clean), uniform]
    caption = "Lower is better. Intervals are of the level: texts differ more among themselves than SAEs do."
    axis = Axis("cross-entropy, nats per token")
    return row_panel(report, records_of(report, layer), "ce", f"Cross-entropy, layer {layer}", axis, caption, rules)


@panel("fidelity")
def kl_rows(report: EvaluationReport, layer: int) -> Panel | None:
    """KL of every row, on a log scale, with the floor that rounding sets."""
    floors = [m.value for r in saes_of(report, layer) if (m := r.metrics.get("kl_noise_floor")) and m.value]
    rules = [Rule("bf16 rounding", x=floors[0])] if floors else []
    caption = "Lower is better. Zero, which no log scale has, is drawn at the left edge."
    axis = Axis("KL, nats per token (log scale)", log=True)
    return row_panel(report, records_of(report, layer), "kl", f"KL divergence, layer {layer}", axis, caption, rules)


def _l0_axis(marks: Sequence[Mark]) -> Axis:
    sizes = [mark.x for mark in marks]
    label = "L0: active features per token"
    if min(sizes) > 0 and max(sizes) > 4 * min(sizes):
        return Axis(label + " (log scale)", log=True)
    return Axis(label) if max(sizes) > 1.3 * min(sizes) else Axis(label, low=0, high=1.5 * max(sizes) or 1.0)
