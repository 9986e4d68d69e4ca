"""The study file: everything that could be chosen with a look at the results is in it, so it is fixed before the run.

A TOML file is read into :class:`StudyFile`. Its hash covers every field that bears on a number, after the scale was
chosen, and stands in the report: a study whose rule, margin or outcome was changed afterwards has another hash.
"""

from __future__ import annotations

import json
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UsageError
from ..system.untrusted_files import read_bytes, shown

_REMEDY = "name a study file, such as studies/verdict.toml"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Text(_Part):
    """Where a model's text comes from; the fields are options of ``pipeline extract``."""

    model: str
    dataset: str
    layers: tuple[int, ...] = Field(min_length=1)
    sites: tuple[str, ...] = ("resid_post",)
    options: dict[str, Any] = {}
    """Further options of extract by name: context, held_out, label_column, packing, seed, dtype …"""


class Variant(_Part):
    """One kind of SAE; every seed trains one on the same stream."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.+-]{0,59}$")
    label: str = ""
    """For tables and pictures; the name where empty."""
    preset: str = "modern"
    train: dict[str, Any] = {}
    """Dotted fields of the training configuration over the preset and the study's ``train``."""


class Comparison(_Part):
    """A question: does ``treatment`` do better than ``baseline``, and better than every control does?"""

    name: str
    treatment: str
    baseline: str
    controls: tuple[str, ...] = ()
    untrained: bool = True
    """An effect counts only where it exceeds what the same architecture shows untrained."""


class Outcome(_Part):
    """A metric of ``results.json`` that the decision rests on. None of them is in any variant's loss."""

    metric: str
    better: Literal["higher", "lower"]
    kind: Literal["fidelity", "utility", "position", "features"]
    """fidelity: must not be worse than ``margin`` allows. The others: may be a benefit or a harm."""
    margin: float | None = Field(default=None, gt=0)
    """Of non-inferiority, in the metric's unit."""
    negligible: float | None = Field(default=None, gt=0)
    """An effect this small does not matter, in the metric's unit; only with it can "no difference" be concluded."""
    label: str = ""

    @model_validator(mode="after")
    def _fidelity_has_a_margin(self) -> Outcome:
        if (self.kind == "fidelity") != (self.margin is not None):
            raise ValueError(f"outcome {self.metric}: a margin belongs to every fidelity outcome and to no other")
        if self.kind == "fidelity" and self.negligible is not None:
            raise ValueError(f"outcome {self.metric}: the margin says what is negligible of a fidelity outcome")
        return self


class Rule(_Part):
    """The decision rule. It is the same for every comparison."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Family-wise error over the outcomes of a comparison (Holm)."""
    resamples: int = Field(default=2000, ge=100)
    seed: int = 0
    least_benefits: int = Field(default=1, ge=1)
    """So many outcomes that are not fidelity must be better, against controls and untrained twin, too; none worse."""


class CostAlone(_Part):
    """Variants whose SAEs are trained once more, each in a process of its own, for time and memory alone.

    Members of a study share a process, whose memory says nothing of one of them.
    """

    variants: tuple[str, ...] = Field(min_length=1)
    steps: int = Field(default=50, ge=2)
    repeats: int = Field(default=3, ge=1)
    """Of every SAE; the least counts. What else happens at that moment, such as reading ahead, only ever adds."""


class Scale(_Part):
    """Sizes of a run of the study."""

    tokens: int = Field(gt=0)
    steps: int = Field(gt=0)
    rows: int = Field(gt=0)
    """Held-out rows that are evaluated."""
    splice_rows: int = Field(default=0, ge=0)
    """Those of them in which SAEs are spliced into the model for CE and KL, which costs most; 0: all."""
    seeds: tuple[int, ...] = Field(min_length=1)
    texts: tuple[Text, ...] = Field(min_length=1)
    train: dict[str, Any] = {}
    variants: tuple[str, ...] | None = None
    """Names of the variants that are run; all where None."""
    estimate: str = ""
    """Hours and disk, where they were estimated for a machine that is not this one."""


class StudyFile(_Part):
    """A study, as written and with one of its scales chosen."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,59}$")
    question: str
    scale: str = "small"
    scales: dict[str, Scale] = Field(min_length=1)
    train: dict[str, Any] = {}
    """Dotted fields of the training configuration that all variants share."""
    variants: tuple[Variant, ...] = Field(min_length=1)
    comparisons: tuple[Comparison, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    rule: Rule = Rule()
    cost_alone: CostAlone | None = None
    codes: bool = False
    """Keep the codes of every SAE on the evaluated rows beside the report; no number depends on it."""

    @model_validator(mode="after")
    def _names_are_known_and_single(self) -> StudyFile:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError("two variants have one name")
        for what, listed in (
            ("comparisons have one name", [one.name for one in self.comparisons]),
            ("outcomes have one metric", [one.metric for one in self.outcomes]),
        ):
            if twice := next((one for one in listed if listed.count(one) > 1), None):
                raise ValueError(f"two {what}: '{twice}'")
        if self.scale not in self.scales:
            raise ValueError(f"scale '{self.scale}' is not among {', '.join(self.scales)}")
        for each in self.comparisons:
            for name in (each.treatment, each.baseline, *each.controls):
                if name not in names:
                    raise ValueError(f"comparison '{each.name}' names variant '{name}', which the file does not have")
        for name in () if self.cost_alone is None else self.cost_alone.variants:
            if name not in names:
                raise ValueError(f"cost_alone names variant '{name}', which the file does not have")
        for scale in self.scales.values():
            for name in scale.variants or ():
                if name not in names:
                    raise ValueError(f"a scale names variant '{name}', which the file does not have")
        return self

    @property
    def sizes(self) -> Scale:
        """Of the chosen scale."""
        return self.scales[self.scale]

    @property
    def active(self) -> tuple[Variant, ...]:
        """The variants of the chosen scale."""
        wanted = self.sizes.variants
        return tuple(variant for variant in self.variants if wanted is None or variant.name in wanted)

    def at_scale(self, scale: str) -> StudyFile:
        """The same study with another of its scales chosen.

        Raises:
            UsageError: it has no such scale.

        """
        if scale not in self.scales:
            raise UsageError(f"scale '{scale}' is not among {', '.join(self.scales)}")
        return self.model_copy(update={"scale": scale})

    def fingerprint(self) -> str:
        """SHA-256 of everything that bears on a number or on the verdict, at the chosen scale; 16 hex digits."""
        # A file without the table has the hash that it had before there was one.
        left_out = {"scales", "codes"} | ({"cost_alone"} if self.cost_alone is None else set())
        plain = self.model_dump(mode="json", exclude=left_out) | {"sizes": self.sizes.model_dump(mode="json")}
        return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def read_study(path: str | Path, scale: str | None = None) -> StudyFile:
    """Read a study file.

    Args:
        path: TOML.
        scale: which of its scales; by default the one that the file names.

    Raises:
        UsageError: it cannot be read, or says something that does not fit; with the field.

    """
    try:
        missing = f"{shown(path)} is missing: {_REMEDY}"
        tree = tomllib.loads(read_bytes(path, most=1 << 20, missing=missing, remedy=_REMEDY).decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as failure:
        raise UsageError(f"{shown(path)} is no TOML file ({failure}): {_REMEDY}") from failure
    if scale is not None:
        tree["scale"] = scale
    try:
        return StudyFile.model_validate(tree)
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{shown(path)}: {where + ': ' if where else ''}{what}") from failure
