"""What an evaluation is asked to do: one frozen record, checked when it is made. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, Unpack

from .. import options
from ..cache.format.layout import ROLES
from ..errors import UsageError
from ..system.untrusted_files import folder_name, seed_number

UNTRAINED_TWINS = "untrained_twins"
"""A reference row for every architecture among the runs: untrained:topk, untrained:txc …"""
ACTIVATIONS = "identity_bf16"
"""The reference row of the activations themselves, rounded to bfloat16: noise floor, and ceiling of all probes."""
REFERENCES = (ACTIVATIONS, "zero_all", "zero", "mean", "previous_token", "untrained", "zero_sae", UNTRAINED_TWINS)
WITH_FEATURES = (ACTIVATIONS, "untrained", UNTRAINED_TWINS)
"""References of which more than the splice is measured."""
REFERENCES_FOLDER = ".references"
"""The folder beside the reports that holds what all of them share; named so that it is no report."""
STATES_FOLDER = "states"
"""Inside it, per model and text: states of the untouched model."""
CODES_FOLDER = "codes"
"""The folder inside a report that holds the codes of its runs, where they are kept."""
FIDELITY, FEATURES = "fidelity", "features"
PARTS = (FIDELITY, FEATURES, "temporal", "position")
"""What ``only`` chooses among; probes of the model belong to none of them."""
QUICK_BATCHES = 10


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation: which SAEs, in which model, on how much of which text."""

    runs: tuple[str, ...] = ()
    """Run folders. None named here nor among ``saes``: every finished run in ``runs_folder``."""
    saes: tuple[str, ...] = ()
    """SAEs from elsewhere: a SAELens folder, a Gemma Scope ``.npz``, a dictionary_learning ``ae.pt``, or a hub id."""
    layers: tuple[int, ...] = ()
    """The layer of each of ``saes``, or one for all; empty where their own files say it."""
    sites: tuple[str, ...] = ()
    """The hook point of each of ``saes``, or one for all; empty where their own files say it."""
    runs_folder: str = "runs"
    """Where runs are looked for."""
    model: str | None = None
    """The language model; None takes the one that each run's store names."""
    revision: str | None = None
    """Its branch, tag or commit on the hub."""
    gguf_file: str | None = None
    """A GGUF file inside the model's folder or repository."""
    dataset: str | None = None
    """The text; None takes the held-out documents of the text that each run's store names."""
    split: str | None = None
    """Its split; None means the store's, or ``train``."""
    text_column: str | None = None
    """Its column; None means the store's, or ``text``."""
    label_column: str | None = None
    """The column with each document's label; None means the store's, if it names one."""
    chat_template: bool = False
    """Whether the column of ``dataset`` holds messages; a store of conversations says so itself."""
    batches: int = 200
    """How many batches of text."""
    batch_rows: int = 16
    """Rows (model contexts) per batch."""
    splice_rows: int = 0
    """Rows in which SAEs are spliced into the model for CE and KL, which costs most; 0: all."""
    references: tuple[str, ...] = REFERENCES
    """Reference rows measured at every layer and site."""
    only: tuple[str, ...] = ()
    """Parts of an evaluation (:data:`PARTS`), none for all of them; L0 and L1 are always measured. Of conversations
    also a role: only tokens in its messages are then measured.
    """
    out: str = "reports"
    """Where reports are written."""
    name: str | None = None
    """The report's folder under ``out``; None names it after the model."""
    seed: int = 0
    """Of the bootstrap, of the untrained SAE and of the permutation nulls."""
    device: str = "auto"
    """``cuda``, ``cpu`` …"""
    dtype: str = "auto"
    """Of the language model; every metric is computed in float32 or better."""
    device_map: str = ""
    """How a model larger than one GPU is spread (:class:`~tcsae.extract.config.ModelSource`)."""
    load_in: str = ""
    """Quantised weights of the model: 8bit or 4bit; empty: as each run's store has them."""
    quick: bool = False
    """Ten batches and no feature browser: a first look."""
    plugins: tuple[str, ...] = ()
    """Python files that register metrics, report panels or what an SAE is made of; each is run first."""
    keep_states: float = 4.0
    """GB beside the reports in which states of the untouched model are kept, so that the next evaluation on a text need
    not run it; 0: none.
    """
    codes: bool = False
    """Keep the sparse codes of every run on the text beside the report, for what `pipeline features --report` shows."""
    fresh: bool = False
    """Measure everything again, also what an earlier evaluation of the same text has measured."""
    workers: int | None = None
    """Processes of a local Dask cluster among which the rows of the text are divided; None: this process alone."""
    scheduler: str | None = None
    """Address of a Dask scheduler among whose workers they are divided."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers {self.workers} must be at least 1")
        if self.workers and self.scheduler:
            raise UsageError("--workers starts a cluster of its own and --scheduler names one: give only one of them")
        if self.batches < 1:
            raise UsageError(f"--batches {self.batches} measures nothing: use 1 or more")
        if self.batch_rows < 1:
            raise UsageError(f"{self.batch_rows} rows per batch hold no text: use 1 or more")
        if self.splice_rows < 0:
            raise UsageError(f"--splice-rows {self.splice_rows} is no number of rows: use 1 or more, or 0 for all")
        if not 0 <= self.keep_states < math.inf:
            raise UsageError(f"--keep-states {self.keep_states} is no number of GB: use 0 for none, or more")
        for option, given in (("layer", self.layers), ("site", self.sites)):
            if given and len(given) not in (1, len(self.saes)):
                raise UsageError(
                    f"--{option} was given {len(given)} times for {len(self.saes)} SAEs: give one for each --sae, or "
                    "one for all"
                )
        if self.rows >= 1 << 40:
            raise UsageError(f"{self.batches} batches of {self.batch_rows} rows are more than any text: use fewer")
        seed_number(self.seed)
        if self.name:
            folder_name(self.name, "--name")
        unknown = [name for name in self.references if name not in REFERENCES]
        if unknown:
            raise UsageError(f"there is no reference '{unknown[0]}': choose among {', '.join(REFERENCES)}")
        unknown = [name for name in self.only if name not in (*PARTS, *ROLES)]
        if unknown:
            raise UsageError(
                f"--only {unknown[0]} is neither a part of an evaluation ({', '.join(PARTS)}) nor a role in "
                f"conversations ({', '.join(ROLES)}): name one of these"
            )
        roles = [name for name in self.only if name in ROLES]
        if len(roles) > 1:
            raise UsageError(f"--only {' '.join(roles)} names {len(roles)} roles: one report is of one role, or of all")

    @property
    def on_workers(self) -> bool:
        """Whether the rows of the text are divided among processes."""
        return self.workers is not None or self.scheduler is not None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of ``only``; empty: everything is measured."""
        return tuple(name for name in self.only if name in PARTS)

    @property
    def role(self) -> str | None:
        """The role of ``only``; None: messages of every role count."""
        return next((name for name in self.only if name in ROLES), None)

    def measures(self, part: str) -> bool:
        """Whether a part is measured."""
        return not self.parts or part in self.parts

    @property
    def reference_rows(self) -> tuple[str, ...]:
        """The references of which something is measured: without fidelity, a splice alone says nothing."""
        return tuple(name for name in self.references if self.measures(FIDELITY) or name in WITH_FEATURES)

    @property
    def rows(self) -> int:
        """How many rows of text are wanted."""
        return (min(self.batches, QUICK_BATCHES) if self.quick else self.batches) * self.batch_rows


class EvaluateOptions(TypedDict, total=False):
    """The options of ``pipeline evaluate`` under their names in Python; one that is None is left at its default."""

    run: str | Path | Sequence[str | Path] | None
    """Run folders; none named here nor in ``sae``: every finished run in ``runs``."""
    sae: str | Path | Sequence[str | Path] | None
    """SAEs from elsewhere: folders, files or hub ids."""
    layer: int | Sequence[int] | None
    """The layer of each ``sae``, or one for all."""
    site: str | Sequence[str] | None
    """The hook point of each ``sae``, or one for all."""
    runs: str | Path | None
    model: str | Path | None
    revision: str | None
    gguf_file: str | None
    dataset: str | Path | None
    split: str | None
    text_column: str | None
    label_column: str | None
    chat_template: bool | None
    """Whether the column holds messages, which the tokenizer's chat template puts into words."""
    batches: int | None
    batch_size: int | None
    """Rows (model contexts) per batch."""
    splice_rows: int | None
    """Rows in which SAEs are spliced into the model; 0: all."""
    references: str | Sequence[str] | None
    """Names of reference rows; ``all`` or ``none``."""
    only: str | Sequence[str] | None
    """Measure just these: fidelity, features, temporal, position; of conversations also one role, such as assistant."""
    quick: bool | None
    seed: int | None
    device: str | None
    dtype: str | None
    device_map: str | None
    """``auto``: a model larger than one GPU is spread over all, the CPU's memory and the disk (accelerate)."""
    load_in: Literal["8bit", "4bit"] | None
    """Quantised weights (bitsandbytes); by default as each run's store has them."""
    out: str | Path | None
    name: str | None
    plugin: str | Path | Sequence[str | Path] | None
    """Python files with metrics or panels of your own, or with what a run was trained with."""
    keep_states: float | None
    """GB beside the reports for states of the untouched model; 0: none."""
    codes: bool | None
    """Keep the sparse codes of every run on the text beside the report."""
    fresh: bool | None
    workers: int | None
    """Divide the rows of the text among so many processes of this machine."""
    scheduler: str | None
    """Divide them among the workers of this Dask scheduler."""


_FIELDS = {
    "run": "runs",
    "sae": "saes",
    "layer": "layers",
    "site": "sites",
    "runs": "runs_folder",
    "batch_size": "batch_rows",
    "plugin": "plugins",
}


def evaluate_config(**asked: Unpack[EvaluateOptions]) -> EvaluateConfig:
    """The configuration that options mean; defaults are those of the record.

    Raises:
        UsageError: no such option, or a value that cannot be.

    """
    given = options.chosen(asked, EvaluateOptions, "evaluate")
    for name in ("run", "sae", "layer", "site", "plugin", "references", "only"):
        if name in given:
            given[name] = options.several(given[name])
    if "references" in given:
        given["references"] = _references(given["references"])
    return EvaluateConfig(
        **options.fields(given, {name: _FIELDS.get(name, name) for name in EvaluateOptions.__annotations__})
    )


def _references(named: Sequence[str]) -> tuple[str, ...]:
    """Names of reference rows, in the report's order; ``all`` and ``none`` stand alone."""
    if len(named) > 1 and {"all", "none"} & set(named):
        raise UsageError(f"--references {' '.join(named)}: say all, none, or names")
    if named[0] in ("all", "none"):
        return REFERENCES if named[0] == "all" else ()
    known = tuple(name for name in REFERENCES if name in named)
    return (*known, *(name for name in named if name not in REFERENCES))
