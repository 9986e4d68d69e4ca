"""The effects that a comparison rests on: treatment − baseline, against every control, and against untrained twins.

Seeds are paired: the treatment of seed s with the baseline of seed s, on the same documents. What is written about an
effect is in the metric's own unit and direction; only the decision turns "lower is better" round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ...evaluate.intervals.holm import holm
from ...evaluate.results import Frozen, Number
from ..file import Comparison, Outcome
from .observations import Observations
from .resampling import Estimate, Sampled, Sampling, mean_over_places

At = tuple[str, str]
"""Model and place."""


class PlaceEffect(Frozen):
    """Treatment − baseline at one place."""

    model: str
    place: str
    effect: Estimate


class ControlEffect(Frozen):
    """A control beside the treatment. (treatment − baseline) − (control − baseline) is treatment − control."""

    control: str
    effect: Estimate | None = Field(description="control − baseline")
    advantage: Estimate | None = Field(description="treatment − control: what the treatment does that it does not")


class OutcomeEffect(Frozen):
    """One outcome of one comparison, pooled over its places."""

    metric: str
    label: str
    unit: str
    kind: Literal["fidelity", "utility", "position", "features"]
    better: Literal["higher", "lower"]
    margin: float | None
    negligible: float | None
    effect: Estimate | None = Field(description="treatment − baseline; null where too little was measured for it")
    why_missing: str = ""
    treatment: Number = Field(default=None, description="mean over seeds and places")
    baseline: Number = None
    places: list[PlaceEffect] = Field(default_factory=list)
    controls: list[ControlEffect] = Field(default_factory=list)
    untrained: Estimate | None = Field(
        default=None, description="(treatment − its untrained twin) − (baseline − its untrained twin)"
    )
    over_untrained: Estimate | None = Field(default=None, description="treatment − its untrained twin")
    wants_untrained: bool = True
    p_worse: Number = Field(
        default=None, description="two-sided p that the effect is zero; of fidelity, that it is at the margin"
    )
    p_worse_holm: Number = Field(default=None, description="the same, adjusted over the comparison's outcomes (Holm)")
    p_better: Number = Field(
        default=None, description="the largest of the two-sided p of the effect, of every control's and the untrained's"
    )
    p_better_holm: Number = Field(default=None, description="the same, adjusted over the outcomes but fidelity (Holm)")

    @property
    def sign(self) -> int:
        """Times an effect it is a gain."""
        return 1 if self.better == "higher" else -1


class ComparisonEffects(Frozen):
    """All outcomes of a comparison, over some places."""

    name: str
    treatment: str
    baseline: str
    controls: list[str]
    model: str | None = Field(description="the only model whose places are in it; null: of all models")
    places: list[str]
    seeds: list[int]
    notes: list[str]
    outcomes: list[OutcomeEffect]
    estimates: int = Field(description="how many effects were estimated with an interval or p")


@dataclass(frozen=True)
class Measured:
    """Reads numbers of variants out of the observations, as samples."""

    observations: Observations
    sampling: Sampling

    def of(self, variant: str, at: At, metric: str, seeds: Sequence[int], *, untrained: bool = False) -> Sampled | None:
        """A metric of a variant at a place for these seeds; None where one of them lacks it."""
        found = [self.observations.observed(variant, seed, at, metric, untrained=untrained) for seed in seeds]
        whole = [one for one in found if one is not None]
        if not whole or len(whole) < len(found):
            return None
        return self.sampling.sampled(whole, seeds, self.observations.text(*at))

    def seeds(self, variants: Iterable[str], at: At, metric: str) -> list[int]:
        """Seeds at which all of these variants have the metric at a place."""
        variants = list(variants)
        first = self.observations.seeds(variants[0], at)
        return [
            seed
            for seed in first
            if all(self.observations.observed(name, seed, at, metric) is not None for name in variants)
        ]

    def pooled(
        self, variant: str, places: Sequence[At], metric: str, seeds: Sequence[int], **which: bool
    ) -> Sampled | None:
        """The mean over places, for seeds that have all of them."""
        parts = [self.of(variant, at, metric, seeds, **which) for at in places]
        whole = [part for part in parts if part is not None]
        return mean_over_places(whole) if whole and len(whole) == len(parts) else None


def comparison_effects(
    comparison: Comparison,
    outcomes: Sequence[Outcome],
    observations: Observations,
    sampling: Sampling,
    model: str | None = None,
) -> ComparisonEffects:
    """Estimate all outcomes of a comparison.

    Args:
        comparison: who is compared with whom.
        outcomes: of the study.
        observations: what was measured.
        sampling: the draws.
        model: only the places of this model; None: all.

    """
    places = [at for at in observations.places if model is None or at[0] == model]
    found = [_outcome(comparison, outcome, Measured(observations, sampling), places) for outcome in outcomes]
    effects = [effect for effect, _, _ in found]
    worse = holm([effect.p_worse for effect in effects])
    beneficial = [i for i, effect in enumerate(effects) if effect.kind != "fidelity"]
    better = dict(zip(beneficial, holm([effects[i].p_better for i in beneficial]), strict=True))
    effects = [
        effect.model_copy(update={"p_worse_holm": worse[i], "p_better_holm": better.get(i)})
        for i, effect in enumerate(effects)
    ]
    used = sorted({seed for _, seeds, _ in found for seed in seeds})
    notes = list(dict.fromkeys(note for *_, more in found for note in more))
    shown = list(dict.fromkeys(place for _, place in places))
    return ComparisonEffects(
        name=comparison.name,
        treatment=comparison.treatment,
        baseline=comparison.baseline,
        controls=list(comparison.controls),
        model=model,
        places=shown,
        seeds=used,
        notes=notes,
        outcomes=effects,
        estimates=sum(map(_estimates, effects)),
    )


def _outcome(
    comparison: Comparison, outcome: Outcome, measured: Measured, places: Sequence[At]
) -> tuple[OutcomeEffect, list[int], list[str]]:
    """One outcome; the seeds it rests on, and what must be said of places and seeds that were left out."""
    pair, metric = (comparison.treatment, comparison.baseline), outcome.metric
    about = {
        "metric": metric,
        "label": outcome.label or measured.observations.label(metric),
        "kind": outcome.kind,
        "better": outcome.better,
        "margin": outcome.margin,
        "negligible": outcome.negligible,
        "wants_untrained": comparison.untrained and outcome.kind != "fidelity",
    }
    by_place = {at: seeds for at in places if (seeds := measured.seeds(pair, at, metric))}
    if not by_place:
        why = f"{metric} was not measured of both {pair[0]} and {pair[1]} with any seed in common"
        return OutcomeEffect(effect=None, why_missing=why, unit="", **about), [], [why]
    notes = [
        f"{metric}: nothing to compare at {' '.join(at)}, which is left out" for at in places if at not in by_place
    ]
    used = list(by_place)
    seeds = sorted(set.intersection(*map(set, by_place.values())))
    if left_out := sorted(set.union(*map(set, by_place.values())) - set(seeds)):
        notes.append(f"{metric}: seeds {', '.join(map(str, left_out))} lack a place and are left out of the mean")
    if not seeds:
        why = f"{metric}: no seed has both {pair[0]} and {pair[1]} at every place"
        return OutcomeEffect(effect=None, why_missing=why, unit="", **about), [], [*notes, why]
    treatment, baseline = (measured.pooled(name, used, metric, seeds) for name in pair)
    assert treatment is not None  # noqa: S101 - the seeds were chosen for it
    assert baseline is not None  # noqa: S101
    difference, sampling = treatment - baseline, measured.sampling
    controls = [_control(name, treatment, baseline, measured, used, metric) for name in comparison.controls]
    untrained, over = _untrained(pair, treatment, baseline, measured, used, metric, seeds)
    effect = sampling.estimate(difference)
    reference = -outcome.margin if outcome.margin is not None else 0.0
    sign = 1 if outcome.better == "higher" else -1
    first = measured.observations.observed(pair[0], seeds[0], used[0], metric)
    found = OutcomeEffect(
        effect=effect,
        unit=first.unit if first else "",
        treatment=float(treatment.values_S.mean()),
        baseline=float(baseline.values_S.mean()),
        places=_places(pair, by_place, measured, metric) if len(by_place) > 1 else [],
        controls=controls,
        untrained=untrained,
        over_untrained=over,
        p_worse=sampling.p_against(difference, sign * reference),
        **about,
    )
    return found.model_copy(update={"p_better": _p_better(found)}), seeds, notes


def _places(pair: tuple[str, str], by_place: dict[At, list[int]], measured: Measured, metric: str) -> list[PlaceEffect]:
    found = []
    for at, seeds in by_place.items():
        treatment, baseline = (measured.of(name, at, metric, seeds) for name in pair)
        if treatment is not None and baseline is not None:
            effect = measured.sampling.estimate(treatment - baseline)
            found.append(PlaceEffect(model=at[0], place=at[1], effect=effect))
    return found


def _control(
    name: str, treatment: Sampled, baseline: Sampled, measured: Measured, places: Sequence[At], metric: str
) -> ControlEffect:
    """Of the seeds that the control has at every place."""
    have = [set(measured.seeds([name], at, metric)) for at in places]
    seeds = [seed for seed in treatment.seeds if all(seed in each for each in have)]
    control = measured.pooled(name, places, metric, seeds) if seeds else None
    if control is None:
        return ControlEffect(control=name, effect=None, advantage=None)
    estimate = measured.sampling.estimate
    return ControlEffect(
        control=name, effect=estimate(control - baseline.of(seeds)), advantage=estimate(treatment.of(seeds) - control)
    )


def _untrained(
    pair: tuple[str, str],
    treatment: Sampled,
    baseline: Sampled,
    measured: Measured,
    places: Sequence[At],
    metric: str,
    seeds: Sequence[int],
) -> tuple[Estimate | None, Estimate | None]:
    """Difference of differences, and the treatment over its own twin; None where a twin was not measured."""
    estimate, observations = measured.sampling.estimate, measured.observations
    own, other = (measured.pooled(name, places, metric, seeds, untrained=True) for name in pair)
    over = None if own is None else treatment - own
    if all(observations.share_a_twin(*pair, seed, at) for seed in seeds for at in places):
        gain = treatment - baseline  # one twin for both: it cancels, whatever it measured
    else:
        gain = None if over is None or other is None else over - (baseline - other)
    return None if gain is None else estimate(gain), None if over is None else estimate(over)


def _p_better(found: OutcomeEffect) -> float | None:
    """Of an intersection–union test: it is better than baseline, every control, and what was there untrained."""
    parts = [found.effect, *(one.advantage for one in found.controls)]
    if found.wants_untrained:
        parts.append(found.untrained)
    p_values = [None if part is None else part.p for part in parts]
    return None if None in p_values else max(p for p in p_values if p is not None)


def _estimates(found: OutcomeEffect) -> int:
    parts = [found.effect, found.untrained, found.over_untrained, *(one.effect for one in found.places)]
    parts += [part for one in found.controls for part in (one.effect, one.advantage)]
    return sum(part is not None for part in parts)
