"""From the members of a study to its findings, of their reports and run folders alone: the same study always gives the
same document.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import RunError, TcsaeError
from ..evaluate.report.wording import listed
from ..evaluate.results import Definition, EvaluationReport
from ..train.run_folder.metrics_log import read_metrics
from ..train.run_folder.record import load_run
from .alone import AloneCost
from .claims import ClaimRow, check_claims
from .file import StudyFile
from .findings import (
    Analysis,
    CostRow,
    FailedMember,
    ReferenceRow,
    StudyCurve,
    StudyText,
    VariantFacts,
    VariantRow,
)
from .members import StudyMember
from .published import published_table
from .statistics.between_seeds import DEFINITIONS as BETWEEN_SEEDS
from .statistics.between_seeds import add_between_seeds
from .statistics.decision import Decision, decide
from .statistics.effects import At, ComparisonEffects, Measured, comparison_effects
from .statistics.observations import Key, MemberFailure, Observations
from .statistics.resampling import Sampling

CURVE_POINTS = 80
SERIES = ("loss", "reconstruction", "temporal_share", "l0", "explained_variance", "dead_share", "grad_norm")
"""What is drawn over the steps of the training, of all that was logged."""


def analyse(
    study: StudyFile,
    members: Sequence[StudyMember],
    seconds: Mapping[str, float] = MappingProxyType({}),
    alone: Sequence[AloneCost] = (),
) -> Analysis:
    """Everything that can be said of these members.

    Args:
        study: as it was fixed before the run.
        members: all of the study's, failed ones too.
        seconds: how long each stage took, over all its sittings; where it is empty, what reports and runs say.
        alone: what training in processes of their own took.

    Raises:
        RunError: no member has numbers.

    """
    observations = Observations(replace(member, model=_public_name(member.model)) for member in members)
    if not observations.rows:
        why = observations.failures[0].message if observations.failures else "the study has no members"
        raise RunError(f"study '{study.name}' has no member with numbers: {why}")
    left_out = add_between_seeds(observations, [outcome.metric for outcome in study.outcomes])
    rule = study.rule
    measured = Measured(observations, Sampling(rule.resamples, rule.seed, rule.alpha))
    labels = {one.name: one.label or one.name for one in study.active}
    comparisons, notes = _comparisons(study, measured)
    decisions = [decide(one, rule, labels) for one in comparisons]
    settings = _settings(observations)
    trained = {key: _trained(member) for key, member in observations.members.items()}
    alone = [one.model_copy(update={"model": _public_name(one.model)}) for one in alone]
    claims = check_claims(study, measured, settings, trained, alone) if _is_about_the_paper(study) else []
    reports, texts = observations.reader.reports, _texts(measured)
    definitions: dict[str, Definition] = {}
    for report in reports:
        definitions |= report.definitions
    asked = {outcome.metric for outcome in study.outcomes}
    definitions |= {name: one for name, one in BETWEEN_SEEDS.items() if name in asked}
    curves = [curve for key, member in observations.members.items() for curve in _curves(key, member)]
    return Analysis(
        study=study.name,
        question=study.question,
        scale=study.scale,
        scales={name: one.estimate for name, one in study.scales.items()},
        fingerprint=study.fingerprint(),
        headline=headline(decisions, claims),
        decisions=decisions,
        comparisons=comparisons,
        claims=claims,
        published=published_table(study, measured, settings) if claims else None,
        labels=labels,
        settings={name: dict(one) for name, one in settings.items()},
        about=[
            VariantFacts(
                name=one.name,
                label=labels[one.name],
                preset=one.preset,
                train=dict(one.train),
                members=sum(key[0] == one.name for key in observations.rows),
            )
            for one in study.active
        ],
        variants=_variant_rows(study, measured, definitions, labels),
        references=_reference_rows(observations),
        curves=curves,
        costs=_costs(study, observations, labels, alone),
        alone=alone,
        definitions=definitions,
        alpha=rule.alpha,
        resamples=rule.resamples,
        estimates=sum(one.estimates for one in comparisons) + sum(claim.estimate is not None for claim in claims),
        tests=sum(len(one.outcomes) for one in comparisons),
        seeds=sorted({seed for _, seed, *_ in observations.rows}),
        tokens=study.sizes.tokens,
        steps=study.sizes.steps,
        texts=texts,
        machines=list(dict.fromkeys(_machine(report) for report in reports)),
        versions=reports[-1].versions,
        hours={name: each / 3600 for name, each in (seconds or _seconds(observations)).items()},
        created=max(report.created for report in reports),
        finished=len(observations.rows),
        failures=[_failed(one) for one in observations.failures],
        notes=[*notes, *left_out],
        limits=_limits(study, observations, comparisons, texts),
    )


def _public_name(name: str) -> str:
    """A hub id as it is; of a path on somebody's disk the last part."""
    return Path(name).name if name.startswith(("/", ".", "~")) else name


def _comparisons(study: StudyFile, measured: Measured) -> tuple[list[ComparisonEffects], list[str]]:
    """Every comparison over all models, then, where there are several, over each of them."""
    active = {variant.name for variant in study.active}
    models = list(dict.fromkeys(model for model, _ in measured.observations.places))
    found, notes = [], []
    for model in [None, *(models if len(models) > 1 else [])]:
        for comparison in study.comparisons:
            if missing := [n for n in (comparison.treatment, comparison.baseline) if n not in active]:
                if model is None:
                    notes.append(
                        f"'{comparison.name}' is not compared: scale {study.scale} does not run {listed(missing)}"
                    )
                continue
            mine = comparison.model_copy(
                update={"controls": tuple(name for name in comparison.controls if name in active)}
            )
            if model is None and len(mine.controls) < len(comparison.controls):
                left_out = [name for name in comparison.controls if name not in active]
                notes.append(f"'{comparison.name}': scale {study.scale} does not run control {listed(left_out)}")
            found.append(
                comparison_effects(mine, study.outcomes, measured.observations, measured.sampling, model=model)
            )
    return found, notes


def headline(decisions: Sequence[Decision], claims: Sequence[ClaimRow]) -> str:
    """The verdict of the study in one plain sentence, and one about the paper's claims."""
    pooled = [one for one in decisions if one.model is None]
    parts = []
    if len(pooled) == 1:
        parts.append(pooled[0].sentence.rstrip("."))
    elif pooled:
        helping = [one.comparison for one in pooled if one.verdict == "helps"]
        count = Counter(one.verdict for one in pooled if one.verdict != "helps")
        tally = [f"{n} {_VERDICTS[verdict][n > 1]}" for verdict, n in count.items()]
        first = (
            f"{len(helping)} {_VERDICTS['helps'][len(helping) > 1]} ({listed(helping)})" if helping else "none helps"
        )
        parts.append(f"Of {len(pooled)} comparisons {listed([first, *tally])}")
    if claims:
        count = Counter(claim.verdict for claim in claims)
        tally = [f"{n} {_CLAIMS[verdict][n > 1]}" for verdict in _CLAIMS if (n := count[verdict])]
        parts.append(f"Of the paper's {len(claims)} claims {listed(tally)}")
    return ". ".join(parts) + "." if parts else "The study compares nothing."


_VERDICTS = {
    "helps": ("helps", "help"),
    "harms": ("harms", "harm"),
    "no difference": ("makes no difference", "make no difference"),
    "undecided": ("is undecided", "are undecided"),
}
_CLAIMS = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "undecided": ("is undecided", "are undecided"),
    "not measured": ("was not measured", "were not measured"),
}
"""Of one, and of several."""


def _is_about_the_paper(study: StudyFile) -> bool:
    return any(variant.preset == "paper" for variant in study.active)


def _settings(observations: Observations) -> dict[str, Mapping[str, Any]]:
    """The configuration of each variant, by dotted name; of its first member."""
    found: dict[str, Mapping[str, Any]] = {}
    for (variant, *_), row in observations.rows.items():
        if row.record.sae is not None and variant not in found:
            found[variant] = row.record.sae.settings | {"n_features": row.record.sae.n_features}
    return found


def _trained(member: StudyMember) -> Mapping[str, float | None]:
    """The last logged metrics of a run; none where its folder is gone."""
    try:
        return load_run(member.run).metrics
    except TcsaeError:
        return {}


def _curves(key: Key, member: StudyMember) -> list[StudyCurve]:
    variant, seed, model, place = key
    try:
        entries = read_metrics(Path(member.run))
    except (OSError, TcsaeError):
        return []
    entries = entries[:: max(1, math.ceil(len(entries) / CURVE_POINTS))]
    found = []
    for series in SERIES:
        values = [_number(entry.get(series)) for entry in entries]
        if any(value is not None for value in values):
            about = {"variant": variant, "seed": seed, "model": model, "place": place, "series": series}
            found.append(StudyCurve(steps=[int(entry["step"]) for entry in entries], values=values, **about))
    return found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _variant_rows(
    study: StudyFile, measured: Measured, definitions: Mapping[str, Definition], labels: Mapping[str, str]
) -> list[VariantRow]:
    outcomes = [outcome.metric for outcome in study.outcomes]
    main = dict.fromkeys([*outcomes, *(key for key, one in definitions.items() if one.group)])
    observations = measured.observations
    found = []
    for at in observations.places:
        for variant in labels:
            seeds = observations.seeds(variant, at)
            if not seeds:
                continue
            rows = [observations.rows[variant, seed, *at] for seed in seeds]
            keys = dict.fromkeys(key for row in rows for key in row.metrics)
            estimated = {}
            for key in main:
                have = measured.seeds([variant], at, key)
                if have and (sampled := measured.of(variant, at, key, have)) is not None:
                    estimated[key] = measured.sampling.estimate(sampled)
            others = {
                key: [row.metrics[key].value if key in row.metrics else None for row in rows]
                for key in keys
                if key not in main
            }
            about = {"variant": variant, "label": labels[variant], "model": at[0], "place": at[1], "seeds": seeds}
            found.append(VariantRow(metrics=estimated, others=others, **about))
    return found


def _reference_rows(observations: Observations) -> list[ReferenceRow]:
    found: dict[tuple[str, At], ReferenceRow] = {}
    for (_, _, model, place), member in observations.members.items():
        for record in observations.reader.report(member.report).records:
            if record.kind == "reference" and record.location.short == place:
                key = (record.name, (model, place))
                metrics = {name: metric.value for name, metric in record.metrics.items()}
                found.setdefault(key, ReferenceRow(name=record.name, model=model, place=place, metrics=metrics))
    return list(found.values())


def _costs(
    study: StudyFile, observations: Observations, labels: Mapping[str, str], alone: Sequence[AloneCost]
) -> list[CostRow]:
    found = []
    for variant in study.active:
        rows = [row.record.sae for key, row in observations.rows.items() if key[0] == variant.name]
        settings = [one.settings for one in rows if one is not None]
        if not settings:
            continue
        each = {
            name: [v for one in settings if (v := _number(one.get(f"cost.{name}"))) is not None]
            for name in ("training_time", "training_memory", "trained_together", "forward_flops", "parameters")
        }
        mine = [one for one in alone if one.variant == variant.name]
        found.append(
            CostRow(
                variant=variant.name,
                label=labels[variant.name],
                microseconds_per_token=_mean(each["training_time"]),
                memory_bytes=max(each["training_memory"], default=None),
                trained_together=int(max(each["trained_together"], default=1)),
                flops_per_token=_mean(each["forward_flops"]),
                parameters=_mean(each["parameters"]),
                alone_microseconds_per_token=_mean([one.microseconds_per_token for one in mine]),
                alone_memory_bytes=_mean([one.memory_bytes for one in mine]),
                alone_peak_bytes=max((one.peak_bytes for one in mine), default=None),
            )
        )
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _texts(measured: Measured) -> list[StudyText]:
    observations = measured.observations
    found: dict[str, StudyText] = {}
    for (_, _, model, place), member in observations.members.items():
        report = observations.reader.report(member.report)
        text = observations.text(model, place)
        found.setdefault(
            text.key,
            StudyText(
                model=model,
                dataset=_public_name(report.text.dataset),
                tokens=report.n_tokens,
                documents=report.n_documents,
                context=report.text.context,
                resampling=measured.sampling.resampler(text).what,
            ),
        )
    return list(found.values())


def _machine(report: EvaluationReport) -> str:
    facts = report.machine
    device = facts.get("gpu") or facts.get("processor") or facts.get("device") or "an unnamed machine"
    cores = f", {facts['cores']} cores" if facts.get("cores") else ""
    threads = f", {facts['threads']} threads" if facts.get("threads") else ""
    return f"{device}{cores}{threads}"


def _seconds(observations: Observations) -> dict[str, float]:
    """Time of the members' own steps, and of the last evaluation of each report."""
    seconds = []
    for key, member in observations.members.items():
        row = observations.rows[key].record.sae
        per_token = None if row is None else _number(row.settings.get("cost.training_time"))
        tokens = None if row is None else _number(row.settings.get("tokens"))
        if per_token is not None and tokens is not None:
            seconds.append((member.run, per_token * tokens / 1e6))
    found = {"training steps": sum(dict(seconds).values())} if seconds else {}
    return found | {"last evaluation": sum(report.seconds for report in observations.reader.reports)}


def _failed(one: MemberFailure) -> FailedMember:
    member = one.member
    about = {"variant": member.variant, "seed": member.seed, "model": member.model, "place": member.place}
    return FailedMember(message=one.message, **about)


def _limits(
    study: StudyFile,
    observations: Observations,
    comparisons: Sequence[ComparisonEffects],
    texts: Sequence[StudyText],
) -> list[str]:
    """What a reader must know before believing anything."""
    n = len({seed for _, seed, *_ in observations.rows})
    found = []
    family = max((len(one.outcomes) for one in comparisons), default=0)
    if family * 2 / (study.rule.resamples + 1) >= study.rule.alpha:
        least = math.ceil(2 * family / study.rule.alpha)
        found.append(
            f"{study.rule.resamples} resamples are too few for {family} outcomes: no adjusted p can be below "
            f"{study.rule.alpha:g}, so nothing can be decided; give rule.resamples more than {least}."
        )
    if n == 1:
        found.append("One seed: no interval over seeds exists, so nothing can be concluded; numbers are a first look.")
    elif n < 6:
        found.append(
            f"{n} seeds: what seeds add to an interval is Student's t with {n - 1} degrees of freedom, so an effect "
            "must be large against its spread over seeds; the values of every seed are shown beside it."
        )
    if alone := [one.name for one in study.comparisons if not one.controls]:
        found.append(
            f"No control stands beside {listed(alone)}: what is found there may have another reason than the name says."
        )
    if few := [text for text in texts if not re.fullmatch(r"\d+ documents", text.resampling)]:
        found.append(f"Few documents: the text is resampled over {few[0].resampling}.")
    models = list(dict.fromkeys(model for model, _ in observations.places))
    places = len(observations.places)
    found.append(
        f"{len(models)} model{'' if len(models) == 1 else 's'} ({listed(models)}) at {places} "
        f"place{'' if places == 1 else 's'}, trained on {study.sizes.tokens:,} tokens: larger models and longer "
        "trainings may behave otherwise. Places are fixed: intervals do not cover other layers."
    )
    seeds_alone = {
        one.label for each in comparisons for one in each.outcomes if one.effect and "alone" in one.effect.levels
    }
    if seeds_alone:
        found.append(f"No average over text, so their intervals cover seeds alone: {listed(sorted(seeds_alone))}.")
    found.append(
        "Effects on single places and models are shown but not adjusted for their number; only the decisions are "
        "(Holm, over the outcomes of a comparison, not over comparisons)."
    )
    return found
