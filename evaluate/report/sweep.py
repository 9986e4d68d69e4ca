"""What was swept: which settings the runs of a report differ in, and how each run is called, ordered and drawn by them.

Runs that differ in nothing but their seed are one series, and share a colour. Everything here is read from the runs'
configurations, never from their names: a run may be called anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..results import MADE_OF_ANOTHER, EvaluationReport, Record
from .chart import RAMP, ROLES, SERIES
from .wording import MADE, REFERENCE_NAMES, role_of

_WORDS = {  # setting → how a value of it is said; in this order in a run's name, the least needed last
    "kind": "{}",
    "temporal.weight": "λ2 = {}",
    "sae.k": "k = {}",
    "sae.width": "{} features",
    "loss.l1": "λ1 = {}",
    "loss.target_l0": "L0 to {}",
    "sae.groups": "groups {}",
    "temporal.form": "{}",
    "temporal.partner": "partner {}",
    "temporal.lag": "lag {}",
    "temporal.scope": "scope {}",
    "temporal.per_feature": "λ2 per feature: {}",
    "data.window": "T = {}",
    "optimiser.lr": "learning rate {}",
    "steps": "{} steps",
}
_GROUPS = ("data.", "sae.", "loss.", "temporal.", "optimiser.")
_FOLLOWS = {  # from the store, or from other settings
    *("data.store", "data.view", "data.siblings", "data.pair_draw", "data.pair_loss", "data.pool", "data.seed"),
    *("sae.architecture", "sae.activation", "sae.window", "sae.expansion", "sae.round_width", "loss.l0_penalty"),
    *("temporal.weight_by_layer",),
}
COLOURS = [name for name, style in SERIES.items() if style.light not in (ROLES["twin"].light, ROLES["reference"].light)]
"""Styles of series: none is that of a twin or of a reference row."""
TWIN, ALONE = "twin", "no temporal term"


@dataclass(frozen=True)
class Series:
    """Runs of one configuration, one per seed."""

    label: str
    style: str
    facet: str
    """The small chart it stands in where one chart would hold too many series; empty: in each."""
    is_baseline: bool
    """A twin, or a run without the temporal term whose others have it: marked wherever it stands, and in no order."""
    order: tuple[Any, ...]


class Sweep:
    """The series of a report's runs.

    Args:
        report: with at least the records that are asked for.

    """

    def __init__(self, report: EvaluationReport):
        self._report = report
        self._runs = [r for r in report.records if r.kind == "sae" and r.sae is not None and r.role in ("tc", "twin")]
        self._baseline = {id(run): run.role == "twin" or self._is_without_term(run) for run in self._runs}
        compared = [run for run in self._runs if not self._baseline[id(run)]]
        self._fields = _telling(compared or self._runs)
        self._keys = {id(run): tuple(_value(run, field) for field in self._fields) for run in self._runs}
        distinct = {(run.location, self._keys[id(run)]) for run in compared}
        self.several = len(distinct) > len({run.location for run in compared})
        """Whether runs of one layer and site differ in more than their seed and the temporal term."""
        self.names: dict[str, str] = {}
        """Style → what is drawn in it."""
        self._series: dict[int, Series] = {}
        made = {ROLES[record.role].light for record in report.records if record.role in MADE_OF_ANOTHER}
        self._colours = [name for name in COLOURS if SERIES[name].light not in made]
        self._make(list(dict.fromkeys(self._keys[id(run)] for run in compared)))
        self._labels = self._distinct_labels()

    def _is_without_term(self, run: Record) -> bool:
        """Whether it is what other runs of its layer and site are without their temporal term."""
        if not _is_off(run):
            return False
        others = (other for other in self._runs if other.location == run.location and not _is_off(other))
        apart = [field for field in _candidates(self._runs) if not field.startswith(("temporal.", "data."))]
        return any(all(_value(run, field) == _value(other, field) for field in apart) for other in others)

    def _make(self, keys: Sequence[tuple[Any, ...]]) -> None:
        """A series for every key, with its style: steps of a ramp for one number, else a colour for each series as
        far as there are any, else a colour for each value of one setting and a small chart for those of the others.
        """
        values = {f: _in_order(f, (key[i] for key in keys)) for i, f in enumerate(self._fields)}
        coloured = next((f for f in self._fields if f == "temporal.weight" and len(_numbers(values[f])) > 1), None)
        alone = len(self._fields) == 1 and all(_is_number(v) for v in values[self._fields[0]][:-1])
        if alone:
            coloured = self._fields[0]
        elif len(keys) <= len(self._colours):
            coloured = None
        elif coloured is None:
            fitting = [f for f in self._fields if len(values[f]) <= len(self._colours)]
            coloured = max(fitting or self._fields, key=lambda f: len(values[f]))
        split = [f for f in self._fields if f != coloured] if coloured and not alone else []
        order = [*split, coloured] if coloured else list(self._fields)
        for run in self._runs:
            key, baseline = self._keys[id(run)], self._baseline[id(run)]
            kind = (TWIN if run.role == "twin" else ALONE) if baseline else ""
            said = self._told(run)
            words = _all_said({f: v for f, v in said.items() if not (baseline and _of_term(f))})
            rank = tuple(_rank(said[f], values[f]) for f in order)
            style = self._style(run, key, keys, coloured, values) if not baseline else "twin"
            facet = "" if baseline or not split else _all_said({f: said[f] for f in split}) or "others"
            label = ", ".join(filter(None, [words, kind])) or ROLES["tc"].name
            self._series[id(run)] = Series(label, style, facet, baseline, (baseline, *rank))
            one = said[coloured] if coloured else None
            name = label if coloured is None or baseline else "others" if one is None else _said(coloured, one)
            if self.several:
                others = self.names.setdefault(style, name)
                if baseline and others != name:
                    self.names[style] = f"{TWIN} (λ2 = 0)"

    def _style(
        self,
        run: Record,
        key: tuple[Any, ...],
        keys: Sequence[tuple[Any, ...]],
        coloured: str | None,
        values: Mapping[str, Sequence[Any]],
    ) -> str:
        if not self.several:
            return role_of(run)
        if coloured is None:
            return self._colours[sorted(keys, key=lambda k: _order(k, self._fields, values)).index(key)]
        value, all_of_it = key[self._fields.index(coloured)], [v for v in values[coloured] if v is not None]
        if value is None:
            return "external"
        place = all_of_it.index(value)
        if all(map(_is_number, all_of_it)):
            steps = list(RAMP)
            return steps[round(place * (len(steps) - 1) / max(1, len(all_of_it) - 1))]
        return self._colours[place % len(self._colours)]

    def _distinct_labels(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for at in self._report.locations:
            here = [run for run in self._runs if run.location == at]
            seeds = len({self._series[id(run)] for run in here}) < len(here)
            words = {id(r): self._series[id(r)].label + (f", seed {_seed(r)}" if seeds else "") for r in here}
            said = list(words.values())
            # Runs that settings do not tell apart go by their names.
            own = {id(run): run.name.removeprefix(f"{at.short}-") for run in here}
            found |= {key: label if label and said.count(label) == 1 else own[key] for key, label in words.items()}
        return found

    def of(self, record: Record) -> Series | None:
        """The series of a run; None of anything else."""
        return self._series.get(id(record))

    def style(self, record: Record) -> str:
        """What a record is drawn in."""
        series = self.of(record)
        return role_of(record) if series is None else series.style

    def label(self, record: Record) -> str:
        """What a record is called among those of its layer and site."""
        if id(record) in self._labels:
            return self._labels[id(record)]
        if record.kind == "reference":
            return REFERENCE_NAMES.get(record.name, record.name)
        if record.role in MADE_OF_ANOTHER:
            original = self._report.record(record.pair or "", *record.location)
            beside = [r for r in self._report.records if r.location == record.location and r.role == record.role]
            if original is not None and sum(one.pair == record.pair for one in beside) == 1:
                return f"{self.label(original)}, {MADE[record.role]}"
        return record.name.removeprefix(f"{record.location.short}-")

    def but(self, record: Record, field: str) -> tuple[str, tuple[Any, ...]]:
        """The label of a run's series without a setting, and all other settings; runs of which both are alike differ
        in that setting and the seed alone.
        """
        rest = tuple(_value(record, other) for other in _candidates(self._runs) if other != field)
        return _all_said({f: v for f, v in self._told(record).items() if f != field}), rest

    def _told(self, record: Record) -> dict[str, Any]:
        return dict(zip(self._fields, self._keys[id(record)], strict=True))

    def rank(self, record: Record) -> tuple[Any, ...]:
        """Where a run stands among those of its layer and site: by what was swept and by seed, baselines last."""
        series = self.of(record)
        return (1,) if series is None else (0, series.order, _seed(record))

    def groups(self, records: Iterable[Record]) -> list[tuple[Series | None, list[Record]]]:
        """Records of one layer and site by series, in order; what is no run is a group of its own."""
        found: dict[Any, tuple[Series | None, list[Record]]] = {}
        for record in records:
            series = self.of(record)
            key = record.name if series is None else series
            found.setdefault(key, (series, []))[1].append(record)
        return list(found.values())

    def is_large(self, records: Sequence[Record]) -> bool:
        """Whether there are so many SAEs that those of a series are better shown as one."""
        return len(records) > MANY and any(len(group) > 1 for _, group in self.groups(records))


MANY = 12
"""SAEs of one layer that are shown one by one; of more, the seeds of a series become one row with their mean."""


def _is_off(run: Record) -> bool:
    settings = run.sae.settings if run.sae else {}
    return run.role == "twin" or settings.get("temporal.form") == "none" or settings.get("temporal.weight") == 0


def _of_term(field: str) -> bool:
    return field.startswith("temporal.")


def _seed(run: Record) -> Any:
    seed = run.sae.settings.get("seed") if run.sae else None
    return seed if isinstance(seed, int) else 0


def _candidates(runs: Sequence[Record]) -> list[str]:
    """Settings that may tell runs apart, those with words first."""
    found = dict.fromkeys(_WORDS)
    for run in runs:
        found |= dict.fromkeys(f for f in (run.sae.settings if run.sae else {}) if f.startswith(_GROUPS))
    return [field for field in found if field not in _FOLLOWS]


def _telling(runs: Sequence[Record]) -> list[str]:
    """The fewest settings that tell the runs of a layer and site apart as well as all together do."""
    kept = [
        field
        for field in _candidates(runs)
        if any(
            len({_value(run, field) for run in runs if run.location == at}) > 1 for at in {run.location for run in runs}
        )
    ]

    def told(fields: Sequence[str]) -> int:
        return len({(run.location, tuple(_value(run, field) for field in fields)) for run in runs})

    every = told(kept)
    for field in reversed([field for field in kept if field not in _KEPT]):
        without = [other for other in kept if other != field]
        if told(without) == every:
            kept = without
    return kept


_KEPT = ("kind", "temporal.form")  # say what the numbers are of, so they are said wherever they differ


def _value(run: Record, field: str) -> Any:
    """The value of a setting; None where it means nothing for that run."""
    settings = run.sae.settings if run.sae else {}
    if field == "kind":
        architecture = settings.get("sae.architecture", "sae")
        kind = settings.get("sae.activation") if architecture == "sae" else architecture
        return kind or (run.sae.architecture if run.sae else None)
    if _of_term(field) and _is_off(run):
        return None
    if field == "temporal.lag" and settings.get("temporal.partner") != "lag":
        return None
    if field == "data.window" and settings.get("data.view") != "windows":
        return None
    return settings.get(field)


def _said(field: str, value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else f"{value:,}" if field == "steps" else str(value)
    if field in _WORDS:
        return _WORDS[field].format(text)
    return f"{field.split('.', 1)[1].replace('_', ' ')} = {text}"


def _all_said(settings: Mapping[str, Any]) -> str:
    """Settings that mean something, in words; usual values only where nothing else is said."""
    found = {field: value for field, value in settings.items() if value is not None}
    unusual = {field: value for field, value in found.items() if _UNSAID.get(field, ()) != value}
    return ", ".join(_said(field, value) for field, value in (unusual or found).items())


_UNSAID = {"temporal.scope": 1.0, "temporal.per_feature": "none", "sae.groups": "1.0", "loss.target_l0": 0.0}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(values: Iterable[Any]) -> list[float]:
    return [value for value in values if _is_number(value)]


def _in_order(field: str, values: Iterable[Any]) -> list[Any]:
    """Each once: numbers rising; words from A to Z, the default before them; what does not apply last."""
    found = {value for value in values if value is not None}
    default = _DEFAULTS.get(field)
    numbers = all(map(_is_number, found))
    return [*sorted(found, key=lambda value: value if numbers else (value != default, str(value))), None]


_DEFAULTS = {"kind": "topk", "temporal.partner": "next", "temporal.form": "pairwise"}


def _rank(value: Any, values: Sequence[Any]) -> int:
    return values.index(value) if value in values else len(values)


def _order(key: tuple[Any, ...], fields: Sequence[str], values: Mapping[str, Sequence[Any]]) -> tuple[int, ...]:
    return tuple(_rank(value, values[field]) for value, field in zip(key, fields, strict=True))


def in_reading_order(report: EvaluationReport) -> EvaluationReport:
    """The same report in reading order: by layer and site; runs by what was swept and by seed, twins after them,
    pruned and fine-tuned SAEs in the order of their originals, SAEs from elsewhere, reference rows.
    """
    sweep, places = Sweep(report), {at: n for n, at in enumerate(report.locations)}
    by_name = {(record.location, record.name): record for record in report.records if record.kind == "sae"}

    def place(record: Record) -> tuple[Any, ...]:
        head, below = record, ()
        while head.role in MADE_OF_ANOTHER and len(below) < len(report.records):  # up to the run, however often changed
            above = by_name.get((head.location, head.pair or ""))
            if above is None:
                break
            head, below = above, (MADE_OF_ANOTHER.index(head.role), *below)
        kind = 2 if sweep.of(head) is None else int(len(below) > 0)
        return (record.kind == "reference", places[record.location], kind, sweep.rank(head), len(below), below)

    rank = {(record.location, record.name): place(record) for record in report.records}
    records = sorted(report.records, key=lambda record: rank[(record.location, record.name)])
    last = (True, len(places), 2, (1,), 0, ())
    pairs = sorted(report.paired, key=lambda pair: (places[pair.location], rank.get((pair.location, pair.first), last)))
    return report.model_copy(update={"records": records, "paired": pairs})
