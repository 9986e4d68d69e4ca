"""The decision rule as code: what a comparison's effects allow to say, and every reason.

``helps``: at least so many outcomes that are not fidelity are better (than the baseline, than every control, and than
untrained twins explain), none is worse, and fidelity is not inferior by more than its margin. ``harms``: an outcome is
worse, or fidelity is lost beyond its margin. ``no difference``: every interval lies within what the study file calls
negligible. ``undecided``: everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...evaluate.report.wording import capitalised, decimals, listed, show
from ...evaluate.results import Frozen
from ..file import Rule
from .effects import ComparisonEffects, OutcomeEffect
from .resampling import Estimate

Verdict = Literal["helps", "harms", "no difference", "undecided"]
Word = Literal[
    "better", "worse", "kept", "lost", "open", "unclear", "not more than a control", "as untrained", "not measured"
]


class Reason(Frozen):
    """What one outcome contributes to a verdict."""

    metric: str
    label: str
    word: Word
    sentence: str


class Decision(Frozen):
    """The verdict on a comparison."""

    comparison: str
    treatment: str
    baseline: str
    model: str | None
    verdict: Verdict
    sentence: str
    reasons: list[Reason]


def decide(effects: ComparisonEffects, rule: Rule, names: dict[str, str] | None = None) -> Decision:
    """Apply the rule.

    Args:
        effects: of one comparison.
        rule: of the study.
        names: labels of variants; a variant without one goes by its name.

    """
    label = _Labels(names or {})
    reasons = [_reason(one, rule, label) for one in effects.outcomes]
    verdict = _verdict(effects, reasons, rule)
    pair = f"{label(effects.treatment)} against {label(effects.baseline)}"
    where = f" on {effects.model}" if effects.model else ""
    return Decision(
        comparison=effects.name,
        treatment=effects.treatment,
        baseline=effects.baseline,
        model=effects.model,
        verdict=verdict,
        sentence=capitalised(f"{pair}{where}: {_because(verdict, effects, reasons, rule)}"),
        reasons=reasons,
    )


class _Labels(dict[str, str]):
    def __call__(self, name: str) -> str:
        return self.get(name) or name


def _verdict(effects: ComparisonEffects, reasons: Sequence[Reason], rule: Rule) -> Verdict:
    words = [reason.word for reason in reasons]
    if "worse" in words or "lost" in words:
        return "harms"
    fidelity = [reason.word for reason, one in zip(reasons, effects.outcomes, strict=True) if one.kind == "fidelity"]
    if words.count("better") >= rule.least_benefits and all(word == "kept" for word in fidelity):
        return "helps"
    if words and "better" not in words and all(map(_negligible, effects.outcomes)):
        return "no difference"
    return "undecided"


def _negligible(one: OutcomeEffect) -> bool:
    """Whether the whole interval lies within what does not matter."""
    limit = one.margin if one.kind == "fidelity" else one.negligible
    effect = one.effect
    if limit is None or effect is None or effect.low is None or effect.high is None:
        return False
    return -limit < effect.low and effect.high < limit


def _reason(one: OutcomeEffect, rule: Rule, label: _Labels) -> Reason:
    word, sentence = _judged(one, rule, label)
    return Reason(metric=one.metric, label=one.label, word=word, sentence=sentence)


def _judged(one: OutcomeEffect, rule: Rule, label: _Labels) -> tuple[Word, str]:
    effect = one.effect
    if effect is None or effect.value is None:
        return "not measured", f"{one.label} was not measured: {one.why_missing or 'it is undefined'}"
    said = f"{one.label} ({figures(effect, one.unit)})"
    if effect.low is None or effect.high is None:
        return "open", f"{said}: {effect.levels}"
    gain = one.sign * effect.value
    worse = one.p_worse_holm is not None and one.p_worse_holm < rule.alpha
    if one.kind == "fidelity":
        return _fidelity(one, said, gain, worse)
    if gain < 0 and worse:
        return "worse", f"{said} is worse"
    if effect.low <= 0 <= effect.high:
        return "unclear", f"{said}: the interval includes zero"
    if gain < 0:
        return "open", f"{said} is worse taken alone, not with {_p(one.p_worse_holm)} over all outcomes"
    for control in one.controls:
        advantage = control.advantage
        if advantage is None or advantage.value is None or advantage.low is None:
            return "open", f"{said} is better, but control {label(control.control)} has no numbers to beat"
        if not _above(advantage, one.sign):
            name, difference = label(control.control), figures(advantage, one.unit)
            if _above(advantage, -one.sign):
                why = f"control {name} does better: the difference from it is {difference}"
            else:
                why = f"its difference from control {name} may be zero: {difference}"
            return "not more than a control", f"{said} is better, but {why}"
    if one.wants_untrained:
        if one.untrained is None or one.untrained.low is None:
            return "open", f"{said} is better, but an untrained twin was not measured on it"
        if not _above(one.untrained, one.sign):
            return "as untrained", (
                f"{said} is better, but not beyond what the same architectures show untrained: "
                f"{figures(one.untrained, one.unit)} remains"
            )
    if one.p_better_holm is None or one.p_better_holm >= rule.alpha:
        return "open", f"{said} is better taken alone, not with {_p(one.p_better_holm)} over all outcomes"
    return "better", f"{said} is better"


def _fidelity(one: OutcomeEffect, said: str, gain: float, significant: bool) -> tuple[Word, str]:
    effect, margin = one.effect, one.margin or 0.0
    assert effect is not None  # noqa: S101 - the caller looked
    low = min(one.sign * (effect.low or 0.0), one.sign * (effect.high or 0.0))
    allowed = f"the margin of {margin:g}"
    if low > -margin:
        return "kept", f"{said} is within {allowed}"
    if gain < -margin and significant:
        return "lost", f"{said} is worse by more than {allowed}"
    return "open", f"{said} may be worse by more than {allowed}"


def _above(estimate: Estimate, sign: int) -> bool:
    """Whether the whole interval of a gain lies above zero."""
    if estimate.low is None or estimate.high is None:
        return False
    return estimate.low > 0 if sign > 0 else estimate.high < 0


def figures(estimate: Estimate, unit: str = "", *, signed: bool = True) -> str:
    """``+0.012 nats [−0.003, 0.027]``; a level, which is no difference, without its plus."""
    if estimate.value is None:
        return "undefined"
    digits = decimals(estimate.value, estimate.low, estimate.high)
    value = ("+" if estimate.value > 0 and signed else "") + show(estimate.value, digits)
    ends = ""
    if estimate.low is not None and estimate.high is not None:
        ends = f" [{show(estimate.low, digits)}, {show(estimate.high, digits)}]"
    return value + ("" if unit in ("", "1", "share") else f" {unit}") + ends


def _p(p: float | None) -> str:
    return "any p" if p is None else f"p = {p:.2g}"


def _because(verdict: Verdict, effects: ComparisonEffects, reasons: Sequence[Reason], rule: Rule) -> str:
    """The verdict and what it rests on."""
    by_word: dict[str, list[str]] = {}
    for reason in reasons:
        by_word.setdefault(reason.word, []).append(reason.sentence)
    n = f"{len(effects.seeds)} seed{'' if len(effects.seeds) == 1 else 's'}"
    if verdict == "harms":
        good = by_word.get("better", [])
        but = f"; against that, {listed(good)}" if good else ""
        return f"it harms. {capitalised(listed([*by_word.get('lost', []), *by_word.get('worse', [])]))}{but} ({n})."
    if verdict == "helps":
        kept = by_word.get("kept", [])
        beside = f", while {listed(kept)}" if kept else ""
        return f"it helps. {capitalised(listed(by_word['better']))}{beside} ({n})."
    if verdict == "no difference":
        return f"no difference. {capitalised(listed(r.sentence for r in reasons))}: all of it negligible ({n})."
    if not reasons:
        return "undecided: the study names no outcome."
    without = {one.effect.levels for one in effects.outcomes if one.effect is not None and one.effect.low is None}
    if len(without) == 1 and all(one.effect is None or one.effect.low is None for one in effects.outcomes):
        return f"undecided: {without.pop()}, so no effect is told from chance ({n})."
    order = ("better", "not more than a control", "as untrained", "open", "not measured")
    fidelity = {one.metric for one in effects.outcomes if one.kind == "fidelity"}
    better = len(by_word.get("better", []))
    if better >= rule.least_benefits:
        why = [r.sentence for r in reasons if r.metric in fidelity and r.word != "kept"]
        return f"undecided. {capitalised(listed(by_word['better']))}; but {listed(why)} ({n})."
    found = [sentence for word in order for sentence in by_word.get(word, [])]
    pairs = zip(reasons, effects.outcomes, strict=True)
    unclear = [(one.label, one.effect) for reason, one in pairs if reason.word == "unclear" and one.effect is not None]
    if unclear:
        shown = [f"{label} ({figures(effect)})" if len(unclear) < 4 else label for label, effect in unclear]
        found.append(f"no difference is told from chance in {listed(shown)}")
    kept = [reason.word for reason in reasons if reason.metric in fidelity]
    if found and kept and set(kept) == {"kept"}:
        found.append("fidelity is kept")
    return f"undecided. {capitalised('; '.join(found)) or 'Fidelity is kept, and nothing else was asked for'} ({n})."
