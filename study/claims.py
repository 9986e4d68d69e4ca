"""What the TC-SAE paper claims, and what a study measured of it: a small record per claim, and one function for all.

A claim names the variants it needs by their settings, not by the names that a study file gives them, and one quantity.
Where the study has no such variant the claim is "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..evaluate.report.wording import decimals, show
from ..evaluate.results import Frozen
from .alone import AloneCost
from .file import StudyFile
from .statistics.decision import figures
from .statistics.effects import At, Measured
from .statistics.resampling import Estimate, Sampled

Settings = Mapping[str, Any]
Chooser = Callable[[Settings], bool]
Found = Literal["holds", "does not hold", "undecided", "not measured"]


def _has_term(one: Settings) -> bool:
    return one.get("temporal.form", "none") != "none" and (one.get("temporal.weight") or 0.0) > 0


def _paper(window: int = 5, weight: float = 0.1) -> Chooser:
    """The paper's own: λ2, pairwise, next token, window."""

    def chosen(one: Settings) -> bool:
        same = (one.get("temporal.form"), one.get("temporal.partner"), one.get("data.window"))
        return _has_term(one) and same == ("pairwise", "next", window) and abs(one["temporal.weight"] - weight) < 1e-9

    return chosen


def _no_term(one: Settings) -> bool:
    return not _has_term(one) and one.get("data.window", 5) == 5


def _heavier(one: Settings) -> bool:
    return _has_term(one) and one["temporal.weight"] > 0.1 + 1e-9 and _paper(weight=one["temporal.weight"])(one)


@dataclass(frozen=True)
class Claim:
    """One claim.

    ``kind``: metric (of the evaluation), training (last logged), cost (a setting of the run). ``form``: the quantity of
    the first variant itself, its difference from the second's, or its ratio to it less 1. It holds where the whole
    interval lies between ``low`` and ``high``, and does not where it lies outside.
    """

    key: str
    claimed: str
    kind: Literal["metric", "training", "cost"]
    quantity: str
    first: Chooser
    second: Chooser | None = None
    form: Literal["value", "difference", "ratio"] = "value"
    low: float = -np.inf
    high: float = np.inf
    needs: str = ""
    meaning: str = ""
    """What the measured number is, in words."""
    per_width: bool = False
    """Divided by the number of features."""


TC, BASELINE = "the paper's own variant (λ2 = 0.1, window 5)", "the same without the temporal term"
CLAIMS = (
    Claim(
        "kl", "KL 17.75 against the baseline's 10.06, called an improvement", "metric", "kl", _paper(), _no_term,
        "difference", high=0.0, needs=f"{TC} and {BASELINE}", meaning="KL, TC-SAE minus baseline (lower is better)",
    ),
    Claim(
        "ce", "CE 20.38 against 12.44, called an improvement", "metric", "ce", _paper(), _no_term, "difference",
        high=0.0, needs=f"{TC} and {BASELINE}", meaning="CE, TC-SAE minus baseline (lower is better)",
    ),
    Claim(
        "mse", "MSE 92.5 against 47.25: about twice the baseline's", "metric", "mse_per_token", _paper(), _no_term,
        "ratio", 0.5, 1.5, needs=f"{TC} and {BASELINE}", meaning="MSE, TC-SAE over baseline, less 1",
    ),
    Claim(
        "cosine", "cosine 0.012 against −1.0, called an improvement", "metric", "cosine", _paper(), _no_term,
        "difference", low=0.0, needs=f"{TC} and {BASELINE}", meaning="cosine, TC-SAE minus baseline",
    ),
    Claim(
        "l0", "L0 1138.52 of 2304 features, 0.494 of the width", "metric", "l0", _paper(), low=0.4, high=0.6,
        needs=TC, meaning="share of the features that are active", per_width=True,
    ),
    Claim(
        "l0_baseline", "L0 0 of the baseline", "metric", "l0", _no_term, high=0.5, needs=BASELINE,
        meaning="the baseline's active features",
    ),
    Claim(
        "l1", "L1 8256 against 0: the baseline's features are all zero", "metric", "l1", _no_term, high=1e-6,
        needs=BASELINE, meaning="the baseline's L1",
    ),
    Claim(
        "temporal_share", "the temporal term is about 15 % of the loss", "training", "temporal_share", _paper(),
        low=0.10, high=0.20, needs=TC, meaning="its share at the end of the training",
    ),
    Claim(
        "memory", "memory + 20 % with the temporal term", "cost", "cost.training_memory", _paper(), _no_term, "ratio",
        0.1, 0.3, needs=f"{TC} and {BASELINE}, each trained in a process of its own",
        meaning="most memory in training, TC-SAE over baseline, less 1",
    ),
    Claim(
        "kl_without", "without the temporal term KL is 42 % higher", "metric", "kl", _no_term, _paper(), "ratio",
        0.2, 0.64, needs=f"{BASELINE} and {TC}", meaning="KL without the term over KL with it, less 1",
    ),
    Claim(
        "window", "window 3 instead of 5: cosine 18 % lower", "metric", "cosine", _paper(window=3), _paper(), "ratio",
        -0.27, -0.09, needs=f"{TC} with window 3, and {TC}", meaning="cosine with window 3 over window 5, less 1",
    ),
    Claim(
        "collapse", "λ2 > 0.1 makes the features collapse", "metric", "alive", _heavier, _paper(), "ratio",
        high=-0.5, needs=f"the same as {TC} with a larger λ2", meaning="share of alive features, the largest λ2 over "
        "λ2 = 0.1, less 1; a collapse is the loss of half of them",
    ),
    Claim(
        "gradient", "the encoder's gradient norm is about 0.004", "training", "grad_norm", _paper(), low=0.002,
        high=0.008, needs=TC, meaning="the gradient's norm (all weights) at the end of the training",
    ),
)  # fmt: skip
"""Of the paper's sections 4 and 5, and its Table 1. "About" allows a third to a half more or less."""


class ClaimRow(Frozen):
    """A claim beside its measurement."""

    key: str
    claimed: str
    measured: str
    verdict: Found
    meaning: str
    variants: list[str]
    estimate: Estimate | None = None


def check_claims(
    study: StudyFile,
    measured: Measured,
    settings: Mapping[str, Settings],
    trained: Mapping[tuple[str, int, str, str], Mapping[str, float | None]],
    alone: Sequence[AloneCost] = (),
) -> list[ClaimRow]:
    """Every claim with what the study says of it.

    Args:
        study: for the variants of the preset ``paper``.
        measured: the numbers.
        settings: of a trained SAE of every variant, by dotted name.
        trained: the last logged metrics of every run: (variant, seed, model, place) → name → number.
        alone: what trainings in processes of their own took.

    """
    of_paper = _of_paper(study, settings)
    return [_checked(claim, of_paper, measured, settings, trained, alone) for claim in CLAIMS]


def _checked(
    claim: Claim,
    names: Sequence[str],
    measured: Measured,
    settings: Mapping[str, Settings],
    trained: Mapping[tuple[str, int, str, str], Mapping[str, float | None]],
    alone: Sequence[AloneCost],
) -> ClaimRow:
    about: dict[str, Any] = {"key": claim.key, "claimed": claim.claimed, "meaning": claim.meaning}
    chosen = [_choose(names, settings, which) for which in (claim.first, claim.second) if which is not None]
    variants = [name for name in chosen if name is not None]
    if len(variants) < len(chosen):
        return ClaimRow(measured=f"needs {claim.needs}", verdict="not measured", variants=variants, **about)
    unit = ""
    samples = _trained_alone(variants, alone) if claim.quantity == "cost.training_memory" else None
    if samples is not None:
        unit, about["meaning"] = " MB", _ALONE.format(what=claim.meaning, steps=alone[0].steps)
    elif claim.kind == "cost" and any((settings[name].get("cost.trained_together") or 1) > 1 for name in variants):
        why = "trained together with others in one process, whose memory cannot be told apart"
        return ClaimRow(measured=why, verdict="not measured", variants=variants, **about)
    else:
        samples = _samples(claim, variants, measured, settings, trained)
    if samples is None:
        why = f"{claim.quantity} was not measured of {' and '.join(variants)} with any seed in common"
        return ClaimRow(measured=why, verdict="not measured", variants=variants, **about)
    first, *rest = samples
    combined = first if not rest else first - rest[0] if claim.form == "difference" else first.relative_to(rest[0])
    estimate = measured.sampling.estimate(combined)
    means = " against ".join(_level(one) + unit for one in samples)
    said = f"{means}: {figures(estimate)}" if rest else figures(estimate, signed=False)
    if estimate.low is None:
        said += f" ({estimate.levels})"
    return ClaimRow(measured=said, verdict=_found(estimate, claim), variants=variants, estimate=estimate, **about)


def _choose(names: Sequence[str], settings: Mapping[str, Settings], which: Chooser) -> str | None:
    """The variant that fits; of several the one with the largest λ2."""
    found = [name for name in names if which(settings[name])]
    return max(found, key=lambda name: settings[name].get("temporal.weight") or 0.0, default=None)


def _samples(
    claim: Claim,
    variants: Sequence[str],
    measured: Measured,
    settings: Mapping[str, Settings],
    trained: Mapping[tuple[str, int, str, str], Mapping[str, float | None]],
) -> list[Sampled] | None:
    """The quantity of each variant for the seeds that all of them have at every place, averaged over places."""
    observations = measured.observations
    places = [at for at in observations.places if all(observations.seeds(name, at) for name in variants)]
    if not places:
        return None
    seeds = sorted(set.intersection(*(set(observations.seeds(name, at)) for name in variants for at in places)))
    if not seeds:
        return None
    found = []
    for name in variants:
        if claim.kind == "metric":
            one = measured.pooled(name, places, claim.quantity, seeds)
        else:
            one = _logged(claim, name, places, seeds, trained, measured)
        if one is None:
            return None
        if claim.per_width:
            width = settings[name]["n_features"]
            draws_RS = None if one.draws_RS is None else one.draws_RS / width
            one = Sampled(one.seeds, one.values_S / width, draws_RS, one.text, one.why)
        found.append(one)
    return found


def _logged(
    claim: Claim,
    name: str,
    places: Sequence[At],
    seeds: Sequence[int],
    trained: Mapping[tuple[str, int, str, str], Mapping[str, float | None]],
    measured: Measured,
) -> Sampled | None:
    """A number of the training: it varies by seed alone."""
    values_SP = []
    for seed in seeds:
        if claim.kind == "training":
            row = [trained.get((name, seed, *at), {}).get(claim.quantity) for at in places]
        else:
            rows = measured.observations.rows
            row = [_setting(rows[name, seed, *at].record.sae, claim.quantity) for at in places]
        if None in row:
            return None
        values_SP.append(row)
    values_S = np.array(values_SP, dtype=float).mean(1)
    return Sampled(tuple(seeds), values_S, None, why="a number of the training varies by seed alone")


_ALONE = "{what}; of what {steps} steps in a process of their own add to what Python and libraries hold"


def _trained_alone(variants: Sequence[str], alone: Sequence[AloneCost]) -> list[Sampled] | None:
    """MB that the training of each variant added to its own process, for the seeds that all of them have; None where
    one was not measured so.
    """
    found = {(one.variant, one.seed, one.model, one.place): one.memory_bytes / 1e6 for one in alone}
    places = list(dict.fromkeys((one.model, one.place) for one in alone))
    seeds = [
        seed
        for seed in sorted({one.seed for one in alone})
        if all((name, seed, *at) in found for name in variants for at in places)
    ]
    if not seeds:
        return None
    why = "measured once for every seed"
    return [
        Sampled(
            tuple(seeds), np.array([[found[name, seed, *at] for at in places] for seed in seeds]).mean(1), None, why=why
        )
        for name in variants
    ]


def _setting(sae: Any, name: str) -> float | None:
    value = None if sae is None else sae.settings.get(name)
    return float(value) if isinstance(value, int | float) else None


def _level(one: Sampled) -> str:
    value = float(one.values_S.mean())
    return show(value, decimals(value))


def _found(estimate: Estimate, claim: Claim) -> Found:
    if estimate.low is None or estimate.high is None:
        return "undecided"
    if claim.low <= estimate.low and estimate.high <= claim.high:
        return "holds"
    return "does not hold" if estimate.high < claim.low or estimate.low > claim.high else "undecided"


def paper_variant(study: StudyFile, settings: Mapping[str, Settings]) -> str | None:
    """The study's variant that is the paper's own TC-SAE."""
    return _choose(_of_paper(study, settings), settings, _paper())


def baseline_variant(study: StudyFile, settings: Mapping[str, Settings]) -> str | None:
    """The study's variant that is the same without the temporal term."""
    return _choose(_of_paper(study, settings), settings, _no_term)


def _of_paper(study: StudyFile, settings: Mapping[str, Settings]) -> list[str]:
    return [one.name for one in study.active if one.preset == "paper" and one.name in settings]
