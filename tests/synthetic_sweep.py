"""Made-up evaluations of a sweep, with the names and settings that the real plan of such a sweep gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from synthetic import DEFINITIONS, curves, definition, metric, references, synthetic_report, training
from tcsae.evaluate.results import EvaluationReport, Metric, Paired, Record, SAEFacts
from tcsae.train.config import TrainConfig
from tcsae.train.plan import MemberPlan, plan_together
from tcsae.train.presets import build_config, rivals_of

FIVE = {"temporal.weight": ("0.01", "0.03", "0.1", "0.3")}
FIFTY = {
    "temporal.weight": ("0.03", "0.1", "0.3"),
    "temporal.partner": ("next", "shuffled", "l2"),
    "run.seed": ("0", "1", "2", "3", "4"),
}
_SPREADS = {"ce": 0.03, "kl": 0.012, "ce_score_mean": 0.004, "explained_variance": 0.006, "temporal_variation": 0.01}


def sweep_report(grid: Mapping[str, Sequence[str]], *, rivals: bool = False, **changes: Any) -> EvaluationReport:
    """All members of a grid with their twins at layer 12, as an evaluation would have them: in no good order."""
    base = build_config(None, None, {"data.store": "cache/l12.zarr", "sae.k": 64})
    configs: list[TrainConfig] = rivals_of(base) if rivals else [base]
    plans = plan_together(configs, grid, layer=12, d_model=576, n_tokens=2_000_000)
    rng = np.random.default_rng(1)
    records = [_record(plan, rng) for plan in sorted(plans, key=lambda plan: plan.name)]
    by_name = {record.name: record for record in records}
    pairs = [_paired(by_name[plan.name], by_name[plan.twin]) for plan in plans if plan.role == "tc" and plan.twin]
    made = synthetic_report(layers=(12,), features=0)
    facts: dict[str, Any] = {
        "records": [*records, *references(12)],
        "paired": pairs,
        "training": {plan.name: training(rng, plan.config.temporal.form != "none") for plan in plans},
        "features": {},
        "failures": [],
        "notes": [],
        "layers": [12],
        "definitions": {key: definition(key) for key in DEFINITIONS},
        "n_documents": 64,
        "resampling": "64 documents",
    }
    return made.model_copy(update=facts | changes)


def _record(plan: MemberPlan, rng: np.random.Generator) -> Record:
    config = plan.config
    weight = 0.0 if config.temporal.form == "none" else config.temporal.weight
    smooth = {"next": 1.0, "l2": 0.4}.get(config.temporal.partner, 0.1) * math.tanh(6 * weight)
    loss = 0.12 + 0.06 * weight**0.5 + rng.normal(0, 0.003)
    values = {
        "ce": 3.431 + loss,
        "ce_clean": 3.431,
        "kl": 0.9 * loss,
        "kl_noise_floor": 0.0004,
        "ce_score_mean": 1 - loss / 5.4,
        "explained_variance": 0.88 - 0.2 * loss,
        "mse_per_token": 810 + 90 * loss,
        "cosine": 0.93,
        "l0": float(config.sae.k),
        "l1": 410 - 200 * weight,
        "alive": 0.91 + rng.normal(0, 0.004),
        "near_duplicate_share": 0.013,
        "temporal_variation": 0.65 - 0.3 * smooth + rng.normal(0, 0.004),
        "temporal_variation_refit": 0.57 - 0.2 * smooth + rng.normal(0, 0.004),
        "lag1_autocorrelation": 0.2 + 0.2 * smooth,
        "adjacent_jaccard": 0.18 + 0.1 * smooth,
        "eta_squared": 0.0112,
        "position_specific_share": 0.083 + rng.normal(0, 0.004),
    }
    settings: dict[str, Any] = {}
    for group, fields in config.model_dump(mode="json").items():
        for key, value in fields.items() if isinstance(fields, dict) else ():
            settings[f"{group}.{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    settings |= {"seed": config.run.seed, "steps": config.run.steps}
    settings.pop("temporal.weight_by_layer")
    return Record(
        name=plan.name,
        kind="sae",
        layer=12,
        role=plan.role,  # pyright: ignore[reportArgumentType]
        pair=plan.twin,
        sae=SAEFacts(
            path=f"runs/{plan.name}",
            source="run",
            architecture=config.sae.activation if config.sae.architecture == "sae" else config.sae.architecture,
            d_model=576,
            n_features=4096,
            settings=settings,
        ),
        metrics={key: metric(key, value, _SPREADS.get(key, 0.0)) for key, value in values.items()},
        curves=curves(rng, 0.6 + 0.2 * smooth),
    )


def _paired(first: Record, second: Record) -> Paired:
    spreads = {"ce_score_mean": 0.001, "kl": 0.002, "l0": 0.0, "explained_variance": 0.001, "temporal_variation": 0.01}
    spreads |= {"temporal_variation_refit": 0.01, "eta_squared": 0.001}
    found: dict[str, Metric] = {}
    for key, spread in spreads.items():
        a, b = first.metrics[key].value, second.metrics[key].value
        found[key] = metric(key, (a or 0.0) - (b or 0.0), spread)
    return Paired(first=first.name, second=second.name, layer=12, metrics=found)
