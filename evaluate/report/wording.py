"""The report's words: what rows and metrics are called, how many digits a number gets, and what the headline may say.

The headline says no more than the intervals do: where an interval includes zero, or there is none, the word is
"undecided".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...console import format_bytes, format_duration
from ..results import MADE_OF_ANOTHER, EvaluationReport, Metric, Paired, Record
from .chart import number, power_label

REFERENCE_NAMES = {
    "identity_bf16": "identity (bf16)",
    "identity": "identity",
    "zero_all": "zero, every position",
    "zero": "zero",
    "mean": "mean",
    "previous_token": "previous token",
    "untrained": "untrained SAE",
    "zero_sae": "all-zero SAE",
}
ARROWS = {"lower": "↓", "higher": "↑"}
MADE = {"pruned": "pruned", "finetuned": "fine-tuned"}
"""Role of an SAE that was made of another → how."""


def role_of(record: Record) -> str:
    """The style a record is drawn in: tc, twin, external or reference."""
    if record.kind == "reference":
        return "reference"
    return record.role or "external"


def metric_label(key: str, report: EvaluationReport) -> str:
    """A metric's short name: the definition's, else its key in words."""
    found = report.definitions.get(key)
    return (found.label if found else "") or key.replace("_", " ")


def better_of(key: str, report: EvaluationReport) -> str | None:
    """Which direction is good: lower, higher, or None."""
    found = report.definitions.get(key)
    return found.better if found else None


def decimals(value: float, low: float | None = None, high: float | None = None) -> int:
    """Digits after the point: two figures of the interval's half width, or three of the value; at most four."""
    if low is not None and high is not None and high > low:
        figures = 1 - math.floor(math.log10((high - low) / 2))
    else:
        figures = 2 - math.floor(math.log10(abs(value))) if value else 1
    return min(4, max(0, figures))


def show(value: float, digits: int) -> str:
    """A number with these digits; what they would round to zero keeps one figure of its own."""
    if value and abs(value) < 0.5 * 10.0**-digits:
        exponent = math.floor(math.log10(abs(value)))
        head = round(value / 10.0**exponent)
        return f"{number(head, 0)}·{power_label(10.0**exponent)}" if exponent < -4 else number(value, -exponent)
    return number(value, digits)


def show_interval(metric: Metric, digits: int) -> str:
    """The interval, or nothing."""
    if metric.low is None or metric.high is None or metric.low == metric.high:
        return ""
    low, high = show(metric.low, digits), show(metric.high, digits)
    return "" if low == high else f"{low} … {high}"


@dataclass(frozen=True)
class Verdict:
    """What a difference first − second with its interval allows to say."""

    decided: bool
    difference: str
    interval: str
    word: str  # lower, higher, equal, undecided

    @property
    def bracket(self) -> str:
        """The interval for running text."""
        return f" [{self.interval.replace(' … ', ', ')}]" if self.interval else ""


def verdict(metric: Metric) -> Verdict | None:
    """None where the difference is undefined; "equal" only where it is zero without any spread."""
    if metric.value is None:
        return None
    digits = decimals(metric.value, metric.low, metric.high)
    shown = ("+" if metric.value > 0 else "") + show(metric.value, digits)
    if metric.value == 0 and not metric.low and not metric.high:
        return Verdict(True, "0", "", "equal")
    if metric.low is None or metric.high is None:
        return Verdict(False, shown, "", "undecided (no interval)")
    interval = show_interval(metric, digits)
    if metric.low <= 0 <= metric.high:
        return Verdict(False, shown, interval, "undecided")
    return Verdict(True, shown, interval, "lower" if metric.value < 0 else "higher")


def evaluated(report: EvaluationReport) -> str:
    """One sentence: what was evaluated, on what, where."""
    saes = [record for record in report.records if record.kind == "sae"]
    what = f"{len(saes)} sparse autoencoder{'' if len(saes) == 1 else 's'}"
    places = [str(at) for at in report.locations]
    where = f"layer{'' if len(places) == 1 else 's'} {listed(places)}"
    machine = (
        report.machine.get("gpu")
        or report.machine.get("device_name")
        or report.machine.get("device")
        or "an unnamed machine"
    )
    model = f"{named(report.model.id, 'model')} ({report.model.architecture}, {report.model.dtype})"
    if not report.model.predicts_tokens:
        return (
            f"{what} at {where} of {named(report.model.id, 'model')}, on {report.n_tokens:,} held-out vectors from "
            f"{_documents(report).replace('document', 'sequence')} in rows of {report.text.context}, seed "
            f"{report.seed}, on {machine}."
        )
    return (
        f"{what} at {where} of {model}, spliced into the model on {report.n_tokens:,} held-out tokens from "
        f"{_documents(report)} of {named(report.text.dataset, 'text')}, {report.text.context} tokens of context, seed "
        f"{report.seed}, on {machine}."
    )


def _documents(report: EvaluationReport) -> str:
    return f"{report.n_documents:,} document{'' if report.n_documents == 1 else 's'}"


def outcomes_of_changes(report: EvaluationReport) -> list[str]:
    """What pruning and fine-tuning did, a sentence per pair; with more than four pairs, how many of them went which
    way.
    """
    found = []
    for kind in MADE_OF_ANOTHER:
        pairs = [pair for pair in report.paired if pair.kind == kind]
        if len(pairs) > 4:
            found += [sentence for key in _HEADLINE if (sentence := _tally(pairs, key))]
        else:
            found += [_outcome(pair, report) for pair in pairs]
    return found


PAIRS = {"twin": ("TC-SAE", "twin"), "pruned": ("pruned SAE", "original"), "finetuned": ("fine-tuned SAE", "original")}
"""What the two sides of a pair are called, by its kind."""
_HEADLINE = {
    "ce_score_mean": "share of CE recovered",
    "kl": "KL",
    "l0": "L0",
    "temporal_variation": "variation over time",
    "temporal_variation_refit": "the same with gains refitted",
}


def _outcome(pair: Paired, report: EvaluationReport) -> str:
    parts = []
    for key, phrase in _HEADLINE.items():
        found = verdict(pair.metrics[key]) if key in pair.metrics else None
        if found and found.word == "equal":
            parts.append(f"{phrase} equal")
        elif found:
            good = (
                "" if not found.decided else {None: "", found.word: " (better)"}.get(better_of(key, report), " (worse)")
            )
            parts.append(f"{phrase} {found.word}{good}, {found.difference}{found.bracket}")
    if not parts:
        return f"Layer {pair.location}: {pair.first} and {pair.second} have no metric in common."
    return f"Layer {pair.location}, {pair.first} minus its original: {'; '.join(parts)}."


def _tally(pairs: Sequence[Paired], key: str) -> str:
    words = [found.word for pair in pairs if key in pair.metrics and (found := verdict(pair.metrics[key]))]
    if not words:
        return ""
    counts = {word: sum(w == word for w in words) for word in ("higher", "lower", "equal")}
    parts = [f"{n} {word}" for word, n in counts.items() if n]
    rest = len(words) - sum(counts.values())
    parts += [f"{rest} undecided"] if rest else []
    return f"{len(words)} pairs, {' minus '.join(PAIRS[pairs[0].kind])}: {_HEADLINE[key]} {listed(parts)}."


def named(identity: str, kind: str) -> str:
    """What a model or text is called in a sentence: the built-in ones are recorded as "demo"."""
    built_in = {"demo": f"the demo {kind}", "demo-gemma3": "the demo model Gemma-3-270M"}
    return built_in.get(identity, identity)


def capitalised(text: str) -> str:
    """With a capital as its first letter; a symbol such as λ stays what it is."""
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def listed(items: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = list(items) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def provenance(report: EvaluationReport) -> list[tuple[str, str]]:
    """Name and value of everything that says how the report came about."""
    facts = [
        ("created", report.created),
        *(_of_model(report) if report.model.predicts_tokens else _of_vectors(report)),
        (
            "evaluated",
            f"{report.n_tokens:,} tokens, {report.n_rows:,} rows, {_documents(report)}; seed {report.seed}",
        ),
        ("intervals", f"95 %, resampling {report.resampling}"),
        (
            "took",
            format_duration(report.seconds)
            + (f", peak memory {format_bytes(m)}" if (m := report.peak_memory_bytes) else ""),
        ),
        ("machine", ", ".join(_machine(k, v) for k, v in report.machine.items() if v is not None) or "—"),
        ("versions", ", ".join(f"{k} {v}" for k, v in report.versions.items()) or "—"),
    ]
    if report.plugins:
        facts.append(("plug-ins", ", ".join(f"{name} (SHA-256 {one[:12]}…)" for name, one in report.plugins.items())))
    return facts


def _of_model(report: EvaluationReport) -> list[tuple[str, str]]:
    model, text = report.model, report.text
    return [
        ("model", f"{model.id}, revision {model.revision or '—'}, fingerprint {model.fingerprint}"),
        ("", f"{model.architecture}, {model.n_layers} layers, width {model.d_model}, vocabulary {model.vocab_size:,}"),
        ("arithmetic", f"{model.dtype}, {model.attn_implementation} attention; cross-entropy and KL in float32"),
        ("text", f"{text.dataset}, split {text.split or '—'}, fingerprint {text.fingerprint}, packing {text.packing}"),
        ("held out", f"{text.held_out:.1%} of the documents, by a hash of their text; none was trained on"),
    ]


def _of_vectors(report: EvaluationReport) -> list[tuple[str, str]]:
    model, text = report.model, report.text
    return [
        ("vectors", f"of {model.id}, imported from {text.dataset} ({model.dtype}), width {model.d_model}"),
        ("", f"fingerprint {text.fingerprint}"),
        ("held out", f"{text.held_out:.1%} of the sequences, or of the positions of a single one"),
    ]


def _machine(name: str, value: str | int | float) -> str:
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes').replace('_', ' ')} {format_bytes(float(value))}"
    return f"{name.replace('_', ' ')} {value}"
