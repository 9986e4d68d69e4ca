"""Made-up studies on disk: reports with kept rows whose effects and spreads over seeds and documents are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tcsae.evaluate.intervals.jackknife import GROUPS, Jackknifed
from tcsae.evaluate.protocol import UnitSums
from tcsae.evaluate.results import (
    Definition,
    EvaluationReport,
    Metric,
    ModelFacts,
    Record,
    SAEFacts,
    TextFacts,
    write_results,
)
from tcsae.evaluate.table_row import MeasuredRow
from tcsae.sites import Location
from tcsae.study.file import StudyFile
from tcsae.study.members import StudyMember

OUTLIERS = "_without_outliers"
LEVELS = {"ce": 3.5, "ce_clean": 3.4, "kl": 0.2, "topic": 0.6, "boundary": 0.5, "l0": 32.0, "cosine": 0.9}
LEVELS |= {"mse_per_token": 50.0, "l1": 100.0, "explained_variance": 0.8}
UNITS = {"ce": "nats", "ce_clean": "nats", "kl": "nats", "l0": "features"}


@dataclass
class World:
    """What is true in it. Effects are by variant and metric, added to the metric's level."""

    effects: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    untrained: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of untrained twins; a variant that is not in it shares the twin ``untrained:sae``."""
    variants: Sequence[str] = ("next", "none", "shuffled")
    seeds: Sequence[int] = (0, 1, 2)
    places: Sequence[str] = ("l5",)
    models: Sequence[str] = ("toy",)
    documents: int = 60
    units_per_document: int = 2
    by_seed: float = 0.0005
    """Spread of an effect over seeds."""
    by_document: float = 0.02
    """Spread of a variant's own effect over documents."""
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    metrics: Sequence[str] = tuple(LEVELS)
    seed: int = 0


def study_file(world: World, **changes) -> StudyFile:
    facts = {
        "name": "made_up",
        "question": "Does comparing neighbours help?",
        "scale": "small",
        "scales": {
            "small": {
                "tokens": 1_000_000, "steps": 500, "rows": 100, "seeds": list(world.seeds),
                "texts": [
                    {"model": model, "dataset": "words", "layers": [Location(int(p[1:])).layer for p in world.places]}
                    for model in world.models
                ],
            },
            "gemma": {
                "tokens": 100_000_000, "steps": 50_000, "rows": 1000, "seeds": [0, 1, 2],
                "estimate": "30 hours, 500 GB",
                "texts": [{"model": "google/gemma-2-2b", "dataset": "words", "layers": [5, 12, 19]}],
            },
        },
        "variants": [{"name": name, "label": name.title()} for name in world.variants],
        "comparisons": [{"name": "the term", "treatment": "next", "baseline": "none", "controls": ["shuffled"]}],
        "outcomes": [
            {"metric": "kl", "better": "lower", "kind": "fidelity", "margin": 0.02, "label": "KL"},
            {"metric": "topic", "better": "higher", "kind": "utility", "label": "document topic", "negligible": 0.02},
            {"metric": "boundary", "better": "higher", "kind": "utility", "label": "boundaries", "negligible": 0.02},
        ],
        "rule": {"resamples": 400},
    }  # fmt: skip
    return StudyFile.model_validate(facts | changes)


def make_members(folder: Path, world: World) -> list[StudyMember]:
    """Write one report per model, with a kept row for every variant, seed and place, and run folders."""
    members: list[StudyMember] = []
    for number, model in enumerate(world.models):
        members += _Maker(folder / f"report-{number}", model, number, world).members()
    return members


class _Maker:
    def __init__(self, folder: Path, model: str, number: int, world: World):
        self.folder, self.model, self.world = folder, model, world
        self.rng = np.random.default_rng([world.seed, number])
        self.inside = f"rows/{number:012x}"
        self.documents_U = np.repeat(np.arange(world.documents), world.units_per_document)
        self.shared_D = {name: self.rng.normal(0, 0.1, world.documents) for name in world.metrics}
        self.records: list[Record] = []

    def members(self) -> list[StudyMember]:
        world, members = self.world, []
        for place in world.places:
            for name in ("mean", "zero_all", "untrained"):
                self.put(name, "reference", place, {"ce": 2.0, "kl": 3.0}, {})
            twins = {"untrained:sae": {}} | {f"untrained:{name}": effects for name, effects in world.untrained.items()}
            for name, effects in twins.items():
                self.put(name, "reference", place, effects, {})
            for variant in world.variants:
                own_D = {name: self.rng.normal(0, world.by_document, world.documents) for name in world.metrics}
                for seed in world.seeds:
                    effects = {
                        name: world.effects.get(variant, {}).get(name, 0.0) + self.rng.normal(0, world.by_seed)
                        for name in world.metrics
                    }
                    effects["ce_clean"] = 0.0
                    row = f"{place}-{variant}-s{seed}"
                    self.put(row, "sae", place, effects, own_D, variant, seed)
                    twin = f"untrained:{variant}" if variant in world.untrained else "untrained:sae"
                    run = self.make_run(row, variant)
                    members.append(StudyMember(self.model, place, variant, seed, row, twin, self.folder, run))
        write_results(self.report(), self.folder)
        return members

    def put(self, name, kind, place, effects, own_D, variant="", seed=0):
        world, units = self.world, len(self.documents_U)
        tokens_U = np.full(units, 50.0)
        sums = {}
        for metric in world.metrics:
            own = own_D.get(metric, np.zeros(world.documents))
            noise_U = self.rng.normal(0, 0.2 * world.by_document, units)
            level_U = (
                LEVELS[metric] + effects.get(metric, 0.0) + (self.shared_D[metric] + own)[self.documents_U] + noise_U
            )
            one = UnitSums(level_U * tokens_U, tokens_U, UNITS.get(metric, "1"), metric)
            sums[metric] = sums[metric + OUTLIERS] = one
        eta = 0.1 + effects.get("eta", 0.0)
        left_out = tuple(eta + self.rng.normal(0, 0.001, GROUPS))
        jackknifed = Jackknifed(
            value=eta, unit="share", n=32, definition="eta", groups=tuple(range(GROUPS)), left_out=left_out
        )
        plain = Metric(value=0.3 + effects.get("share", 0.0), unit="share", n=32, definition="share")
        settings = {
            "temporal.form": "pairwise" if variant == "next" else "none", "temporal.weight": 0.03,
            "seed": seed, "tokens": 1000,
            "cost.training_time": 12.0, "cost.training_memory": 1e9, "cost.trained_together": 3,
            "cost.forward_flops": 1e6, "cost.parameters": 2048,
        } | dict(world.settings.get(variant, {}))  # fmt: skip
        facts = SAEFacts(path="", source="run", architecture="topk", d_model=8, n_features=64, settings=settings)
        at = _location(place)
        row = MeasuredRow(
            name, kind, at.layer, site=at.site, facts=facts if kind == "sae" else None, sums=sums,
            metrics={"eta": jackknifed, "share": plain}, documents_U=self.documents_U,
            file=f"{self.inside}/{place}-{name.replace(':', '-')}.npz",
        )  # fmt: skip
        row.save(self.folder / row.file)
        levels = {
            key: Metric(value=float(s.numerator_U.sum() / s.denominator_U.sum()), unit=s.unit, n=1, definition=key)
            for key, s in sums.items()
        }
        plain_metrics = {"eta": jackknifed.plain(), "share": plain}
        self.records.append(
            Record(
                name=name, kind=kind, layer=at.layer, site=at.site, sae=row.facts, metrics=levels | plain_metrics,
                kept=row.file,
            )
        )  # fmt: skip

    def make_run(self, name: str, variant: str) -> Path:
        run = self.folder.parent / "runs" / name
        run.mkdir(parents=True, exist_ok=True)
        share = 0.15 if variant == "next" else 0.0
        lines = [
            {"step": step, "loss": 10 / step**0.3, "l0": 32.0, "temporal_share": share, "grad_norm": 0.1}
            for step in range(10, 510, 10)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    def report(self) -> EvaluationReport:
        groups = {"kl": "fidelity", "ce": "fidelity", "l0": "sparsity", "ce_score_mean": "fidelity"}
        keys = [*self.world.metrics, "eta", "share", "ce_score_mean", "kl_score_mean"]
        return EvaluationReport(
            name="made up", created="2026-01-02T03:04:05Z", machine={"processor": "x86_64", "cores": 2, "threads": 2},
            versions={"tcsae": "0.1.0", "torch": "2.13.0"},
            model=ModelFacts(
                id=self.model, fingerprint="f", architecture="Toy", n_layers=12, d_model=8, vocab_size=300,
                attn_implementation="eager", dtype="float32",
            ),
            text=TextFacts(dataset="words", fingerprint="t", packing="document", context=16, held_out=0.01),
            n_documents=self.world.documents, n_rows=100, n_tokens=50 * len(self.documents_U), seed=0,
            layers=sorted({record.layer for record in self.records}),
            resampling=f"{self.world.documents} documents", records=self.records, seconds=60.0,
            definitions={
                key: Definition(text=f"{key} of a made-up study", unit=UNITS.get(key, "1"), group=groups.get(key, ""))
                for key in keys
            },
        )  # fmt: skip


def _location(place: str) -> Location:
    layer, _, site = place[1:].partition(".")
    return Location(int(layer), site) if site else Location(int(layer))
