"""What a report says first: does the temporal term help, harm, or is it undecided, and at what cost.

The verdict on a pair rests on every paired outcome that is not in the loss, those against the term like those for it.
An outcome counts as better or worse where it is so after Holm's correction over all outcomes of the pair; its p is that
of a normal distribution with the width of the paired interval.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..intervals.holm import holm
from ..metrics.all import definitions
from ..results import EvaluationReport, Metric, Paired, Record
from .sweep import Sweep
from .wording import capitalised, decimals, listed, metric_label, show, show_interval

Aspect = Literal["cost", "benefit", "position"]
Word = Literal["better", "worse", "undecided"]

OUTCOMES: dict[str, tuple[Aspect, Literal["higher", "lower"]]] = {
    "ce_score_mean": ("cost", "higher"),
    "kl_score_mean": ("cost", "higher"),
    "explained_variance": ("cost", "higher"),
    "same_token": ("benefit", "higher"),
    "boundary": ("benefit", "higher"),
    "probe_topic_passage_k20": ("benefit", "higher"),
    "probe_topic_token_k20": ("benefit", "higher"),
    "probe_token_class_k20": ("benefit", "higher"),
    "eta_squared": ("position", "lower"),
    "position_specific_share": ("position", "lower"),
    "prefix_shift": ("position", "higher"),
    "probe_position_k20": ("position", "lower"),
}
"""Outcome → what it speaks of, and its good direction for a method that wants features that position does not move."""
_ALPHA = 0.05
_MOST_SENTENCES = 4
MOST_ROWS = 8
"""Pairs that are shown one by one; of more, the seeds of a series in one row, and each below it."""
_FEWEST = 10  # documents or blocks; an interval from fewer is too narrow to conclude from


@dataclass(frozen=True)
class Judged:
    """One outcome of a pair."""

    key: str
    label: str
    aspect: Aspect
    word: Word
    difference: Metric

    @property
    def figures(self) -> str:
        """``+0.012 [0.003, 0.021]``."""
        value = self.difference.value or 0.0
        digits = decimals(value, self.difference.low, self.difference.high)
        interval = show_interval(self.difference, digits)
        bracket = f" [{interval.replace(' … ', ', ')}]" if interval else ""
        return ("+" if value > 0 else "") + show(value, digits) + bracket


@dataclass(frozen=True)
class Line:
    """A line of the small table: an aspect, good, bad, mixed, undecided or not measured, and what that rests on."""

    aspect: str
    word: str
    because: str


@dataclass(frozen=True)
class PairVerdict:
    """What is said first of a pair TC-SAE − twin."""

    pair: Paired
    word: Literal["helps", "harms", "mixed", "undecided"]
    sentence: str
    lines: list[Line]
    name: str
    """What the first of the pair is called among the runs of its layer and site."""


def verdicts(report: EvaluationReport) -> list[PairVerdict]:
    """One for every TC-SAE with its twin, in the report's order."""
    sweep = Sweep(report)
    return [_verdict(pair, report, sweep) for pair in report.paired if pair.kind == "twin"]


@dataclass(frozen=True)
class SeriesVerdict:
    """How the pairs of one series came out: its label, its style, and of every column how many said what."""

    name: str
    style: str
    words: tuple[str, ...]
    n: int


def by_series(found: Sequence[PairVerdict], report: EvaluationReport) -> list[tuple[str, list[SeriesVerdict]]]:
    """Where there are many pairs, by layer and site: what the seeds of every series say. Empty where there are few."""
    if len(found) <= MOST_ROWS:
        return []
    sweep = Sweep(report)
    groups: dict[str, dict[tuple[str, str], list[PairVerdict]]] = {}
    for one in found:
        record = report.record(one.pair.first, *one.pair.location)
        series = sweep.of(record) if record else None
        key = (series.label, series.style) if series else (one.name, "tc")
        groups.setdefault(str(one.pair.location), {}).setdefault(key, []).append(one)
    if all(len(pairs) == 1 for series in groups.values() for pairs in series.values()):
        return []
    return [
        (at, [SeriesVerdict(label, style, _counted(pairs), len(pairs)) for (label, style), pairs in series.items()])
        for at, series in groups.items()
    ]


def _counted(pairs: Sequence[PairVerdict]) -> tuple[str, ...]:
    columns = [[one.word for one in pairs], *([one.lines[i].word for one in pairs] for i in range(len(pairs[0].lines)))]
    return tuple(
        ", ".join(f"{word} {n}" if n < len(column) else word for word, n in Counter(column).most_common())
        for column in columns
    )


def first_sentences(found: Sequence[PairVerdict]) -> list[str]:
    """What a report begins with: a sentence per pair, or with many pairs how many of them came out how."""
    if not found:
        return ["No TC-SAE was evaluated beside a twin, so nothing can be said of the temporal term."]
    if len(found) <= _MOST_SENTENCES:
        return [one.sentence for one in found]
    counts = {word: sum(one.word == word for one in found) for word in ("helps", "harms", "mixed", "undecided")}
    told = {"helps": "it helps in", "harms": "it harms in", "mixed": "better and worse in", "undecided": "undecided in"}
    parts = listed(f"{told[word]} {n}" for word, n in counts.items() if n)
    return [f"Of {len(found)} comparisons of the temporal term with its twin, {parts}; each is told below."]


def _verdict(pair: Paired, report: EvaluationReport, sweep: Sweep) -> PairVerdict:
    judged = judge(pair.metrics, report)
    words = [one.word for one in judged]
    lost = [one for one in judged if one.word == "worse"]
    gained = [one for one in judged if one.word == "better"]
    word: Literal["helps", "harms", "mixed", "undecided"] = "undecided"
    if lost or gained:
        word = "mixed" if lost and [one for one in gained if one.aspect != "cost"] else "harms" if lost else "helps"
    if word == "helps" and all(one.aspect == "cost" for one in gained):
        word = "undecided"  # a better reconstruction is no benefit of time
    n = f"{len(words)} outcome{'s' if len(words) != 1 else ''} outside the loss"
    if _few(report):
        word = "undecided"
        said = f"undecided: {report.n_tokens:,} tokens of {report.n_documents} documents are too little text to say"
    elif not judged:
        said = "undecided: no outcome was measured of both"
    elif word == "helps":
        said = (
            f"the temporal term helps: better in {_named(gained)}. {capitalised(_cost(judged))}. Of {n}, none is worse"
        )
    elif word == "harms":
        also = f". Better in {_named(gained)}" if gained else ". Better in none"
        said = (
            f"the temporal term harms: worse in {_named(lost)}{also}. Of {n}, {words.count('undecided')} are undecided"
        )
    elif word == "mixed":
        both = f"Better in {_named(gained)}. Worse in {_named(lost)}"
        said = f"the temporal term does both. {both}. These are of {n}"
    else:
        found = f"better in {_named(gained)} alone" if gained else "none is decided"
        said = f"undecided. Of {n}, {found}. {capitalised(_cost(judged))}"
    warning = f" ({pair.warning})" if pair.warning else ""
    lines = [_line(aspect, judged) for aspect in ("cost", "benefit", "position")]
    record = report.record(pair.first, *pair.location)
    name = pair.first if record is None else sweep.label(record)
    sentence = f"Layer {pair.location}, {name}: {said}{warning}."
    return PairVerdict(pair, word, sentence, [*lines, _controls(pair, judged, report, sweep)], name)


def judge(differences: Mapping[str, Metric], report: EvaluationReport) -> list[Judged]:
    """Every outcome among the differences, with its word after Holm's correction over all of them."""
    found = []
    for key, difference in differences.items():
        if _better(key, report) is None or difference.value is None:
            continue
        found.append((key, _gain(key, difference, report), _p(difference), difference))
    adjusted = holm([p for _, _, p, _ in found])
    order = {key: i for i, key in enumerate(OUTCOMES)}
    judged = [
        Judged(
            key,
            metric_label(key, report),
            OUTCOMES[key][0] if key in OUTCOMES else "benefit",
            ("better" if gain > 0 else "worse") if p is not None and p < _ALPHA else "undecided",
            difference,
        )
        for (key, gain, _, difference), p in zip(found, adjusted, strict=True)
    ]
    return sorted(judged, key=lambda one: order.get(one.key, len(order)))


def _better(key: str, report: EvaluationReport) -> str | None:
    """Which direction is good for an outcome; None for what is none: what is in the loss, and doubles of outcomes."""
    if key in OUTCOMES:
        return OUTCOMES[key][1]
    found = report.definitions.get(key)
    # Which of the program's own metrics are outcomes is said above; a plug-in's is one if it has a good direction.
    return found.better if found is not None and key in _added(report) else None


def _added(report: EvaluationReport) -> set[str]:
    return report.definitions.keys() - definitions().keys() if report.plugins else set()


def _p(difference: Metric) -> float:
    """Two-sided, of a normal distribution as wide as the 95 % interval; 1 where there is no interval."""
    low, high, value = difference.low, difference.high, difference.value
    if low is None or high is None or value is None or high <= low:
        return 1.0
    return math.erfc(abs(value) / ((high - low) / 3.92) / math.sqrt(2))


def _few(report: EvaluationReport) -> bool:
    count = report.resampling.split()[0].replace(",", "")
    return not count.isdigit() or int(count) < _FEWEST


def _named(judged: Sequence[Judged]) -> str:
    return "; ".join(f"{one.label} ({one.figures})" for one in judged)


def _cost(judged: Sequence[Judged]) -> str:
    lost = [one for one in judged if one.aspect == "cost" and one.word == "worse"]
    if lost:
        return f"it costs {_named(lost)}"
    measured = [one for one in judged if one.aspect == "cost"]
    return f"no cost is decided ({_named(measured)})" if measured else "its cost was not measured"


def _line(aspect: str, judged: Sequence[Judged]) -> Line:
    of_it = [one for one in judged if one.aspect == aspect]
    words = {one.word for one in of_it}
    if not of_it:
        return Line(aspect, "not measured", "")
    both = {"better", "worse"} <= words
    word = "mixed" if both else "bad" if "worse" in words else "good" if "better" in words else "undecided"
    return Line(aspect, word, "; ".join(f"{one.label} {one.figures}, {one.word}" for one in of_it))


def _controls(pair: Paired, judged: Sequence[Judged], report: EvaluationReport, sweep: Sweep) -> Line:
    """Whether a control of the same layer, against its own twin, shows what the term shows."""
    own = report.record(pair.first, pair.layer, pair.site)
    controls = [
        (other, record)
        for other in report.paired
        if other.kind == "twin" and other.location == pair.location
        if (record := report.record(other.first, *other.location)) is not None and _is_control(own, record)
    ]
    if not controls:
        return Line("controls", "not measured", "no control (another partner, the same weight) was evaluated beside it")
    gained = [one for one in judged if one.word == "better" and one.aspect != "cost"]
    if not gained:
        return Line("controls", "undecided", "there is no benefit that a control could share")
    shared = [
        f"{sweep.label(record)} shows as much {one.label}"
        for one in gained
        for other, record in controls
        if (theirs := other.metrics.get(one.key)) is not None
        if theirs.value is not None and _gain(one.key, theirs, report) >= _gain(one.key, one.difference, report)
    ]
    if shared:
        return Line("controls", "bad", "; ".join(shared))
    names = listed(dict.fromkeys(_partner(record) for _, record in controls))
    return Line("controls", "good", f"larger than with {names}")


def _gain(key: str, difference: Metric, report: EvaluationReport) -> float:
    return (difference.value or 0.0) * (1 if _better(key, report) == "higher" else -1)


def _partner(record: Record) -> str:
    return str(record.sae.settings.get("temporal.partner", "")) if record.sae else ""


def _is_control(own: Record | None, other: Record) -> bool:
    """Whether another SAE differs in whom the term compares, and in nothing else that was set."""
    if own is None or own.sae is None or other.sae is None:
        return False
    first, second = own.sae.settings, other.sae.settings
    compared = [key for key in first if key.split(".")[0] in ("sae", "temporal", "loss", "optimiser")]
    differ = {key for key in compared if first.get(key) != second.get(key)}
    return differ == {"temporal.partner"}
