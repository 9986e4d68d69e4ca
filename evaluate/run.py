"""Stage three as a whole: SAEs in, report out.

Each model is loaded once. Rows that an earlier evaluation of the same text finished are taken from the report's folder;
what is missing is measured in as few passes over the text as memory allows, in halves where a pass does not fit; the
report is assembled from all rows and says on which machine it was made.
"""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..cache.format.manifest import installed_versions
from ..console import Progress, note, progress, warn
from ..errors import ResourceError, RunError, TcsaeError, needs
from ..extract.model.hooks import module_path
from ..extract.model.load import LanguageModel, check_context, load_language_model
from ..extract.text.open import open_documents, resolve_text
from ..extract.text.rows import row_blocks
from ..plugins import load_plugins
from ..sites import Location
from ..system.free_memory import peak_memory
from .assemble import compose
from .config import ACTIVATIONS, EvaluateConfig
from .features.collect import FeatureBrowser
from .made_for import made_for_notes
from .metrics.all import AllMetrics, families, installed, probes
from .metrics.by_scope import ByScope, BySummand
from .metrics.windows import WindowMetrics
from .model.heldout_text import HeldOutText, Survey, survey
from .model.logit_effects import LogitEffects
from .model.probes import ProbeContext, ProbedModel
from .model.reference_rows import untrained_sae, zero_sae
from .model.splice import Head, SplicedModel
from .model.token_text import token_classes
from .one_pass import Measurement
from .protocol import RawActivations
from .report.page import write_report
from .results import EvaluationReport, Failure, ModelFacts, write_results
from .row_cache import RowCache, measuring_code, slug
from .subjects import Group, Subject, UntrainedTwin, gather_subjects
from .table_row import Candidate, MeasuredRow, row_of

PASS_BYTES = 4e9
"""Weights of SAEs held at once on a CPU; on a GPU a quarter of its memory."""
VERIFY_ROWS = 2
"""Rows on which the shared prefix is tried."""
BROWSER_CARDS = 200
"""Cards over all SAEs of a report, at least a tenth of it each."""
# What torch says where it has no exception of its own for it.
_WORDS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Outcome:
    """One report and where it lies."""

    report: EvaluationReport
    folder: Path
    page: Path | None

    def with_failures(self, failures: Sequence[Failure]) -> Outcome:
        """The same, with what failed after its report was written; written again."""
        report = self.report.model_copy(update={"failures": [*self.report.failures, *failures]})
        write_results(report, self.folder)
        return Outcome(report, self.folder, write_report(report, self.folder))


def evaluate(config: EvaluateConfig) -> list[Outcome]:
    """Evaluate everything asked for: one report per language model and text.

    Raises:
        UsageError: nothing to evaluate, or a plug-in that cannot be run.
        TcsaeError: of the only thing that could be evaluated.

    """
    needs("matplotlib", extra="report", what="a report")
    plugins = load_plugins(config.plugins)
    groups, failures = gather_subjects(config, plugins)
    for failure in failures:
        warn(f"{failure.path}: {failure.message}")
    if not groups:
        raise RunError(
            failures[0].message if len(failures) == 1 else f"none of the {len(failures)} SAEs can be evaluated"
        )
    names = _names(config, groups)
    outcomes = []
    for group, name in zip(groups, names, strict=True):
        try:
            outcomes.append(_Evaluation(config, group, name, failures, plugins).run())
            failures = []  # reported
        except TcsaeError as failure:
            if len(groups) == 1:
                raise
            warn(f"{group.model.id}: {failure}")
            failures.append(Failure(path=group.model.id, message=str(failure)))
    if not outcomes:
        raise RunError(f"none of the {len(groups)} language models could be evaluated in; the messages above say why")
    if failures:
        outcomes[-1] = outcomes[-1].with_failures(failures)
    return outcomes


def _names(config: EvaluateConfig, groups: Sequence[Group]) -> list[str]:
    """A folder name per group, different from each other."""
    names: list[str] = []
    for group in groups:
        name = config.name or slug(Path(group.model.id).name) or "report"
        while name in names:
            name += "-" + (slug(Path(group.text.dataset).name) or "2")
        names.append(name)
    return names


class _Evaluation:
    """One group on its way to a report."""

    def __init__(
        self,
        config: EvaluateConfig,
        group: Group,
        name: str,
        failures: Sequence[Failure],
        plugins: Mapping[str, str],
    ):
        self.config, self.group, self.name, self.plugins = config, group, name, plugins
        self.families, left_out = installed(families(plugins))
        self.failures = list(failures)
        self.folder = Path(config.out) / name
        self.notes: list[str] = []
        for message in left_out:
            self._say(message)

    def run(self) -> Outcome:
        started = time.perf_counter()
        config, group = self.config, self.group
        self.lm = load_language_model(group.model)
        check_context(self.lm.model.config, self.lm.identity.id, group.text.context)
        self._compare_model()
        self._drop_unfit()
        self._compare_origins()
        self.locations = sorted({subject.at for subject in group.subjects})
        documents = open_documents(group.text)
        identity = resolve_text(group.text, self.lm, documents)
        blocks = row_blocks(
            group.text, self.lm, held_out=group.held_out, documents=documents, rows_per_block=config.batch_rows
        )
        text = HeldOutText.gather((block for block, _ in blocks), config.rows, documents.label, only=config.only)
        text = replace(text, classes_RT=token_classes(self.lm.tokenizer, text.tokens_RT))
        self.text = text.spliced_in(config.splice_rows)
        if config.only:
            self._say(f"only tokens in messages of the role '{config.only}' are measured")
        if len(self.text) < config.rows:
            self._say(f"the text ends after {len(self.text)} rows of the {config.rows} asked for")
        if self.text.spliced_R is not None:
            self._say(f"CE and KL are of {config.splice_rows} of the {len(self.text)} rows")
        self.model, self.head = SplicedModel(self.lm), Head(self.lm)
        model = self.lm.identity
        settings = (config.batch_rows, config.seed, config.quick, tuple(self.families))
        if self.text.spliced_R is not None:
            settings = (*settings, config.splice_rows)
        facts = (model.fingerprint, model.dtype, self.text.fingerprint, *settings, measuring_code(self.plugins))
        self.rows = RowCache(self.folder, facts, self.locations, config.references, group.subjects, fresh=config.fresh)
        if self.rows.missing:
            with within_memory(config.batch_rows):
                self._measure()
        report = compose(
            self.rows.finished,
            self.text,
            name=self.name,
            machine=describe_machine(self.lm.device),
            versions=versions(),
            plugins=dict(self.plugins),
            model=_model_facts(self.lm),
            identity=identity,
            seed=config.seed,
            layers=sorted({at.layer for at in self.locations}),
            failures=self.failures,
            notes=self.notes,
            seconds=round(time.perf_counter() - started, 1),
            peak_memory_bytes=peak_memory(self.lm.device),
        )
        write_results(report, self.folder)
        return Outcome(report, self.folder, write_report(report, self.folder))

    def _say(self, message: str) -> None:
        self.notes.append(message)
        note(message)

    def _compare_model(self) -> None:
        expected, found = self.group.model_fingerprint, self.lm.identity
        if expected is not None and expected != found.fingerprint:
            self._say(
                f"the weights of {found.id} are not those the store was extracted with (fingerprint "
                f"{found.fingerprint[:12]}, the store's {expected[:12]})"
            )

    def _compare_origins(self) -> None:
        """Say where an SAE from elsewhere was made for something else."""
        for number, subject in enumerate(self.group.subjects):
            notes = made_for_notes(subject.made_for, self.lm, self.group.text.context)
            for message in notes:
                warn(f"{subject.facts.path}: {message}")
            self.group.subjects[number] = replace(subject, notes=(*subject.notes, *notes))

    def _drop_unfit(self) -> None:
        """Leave out SAEs of another width or depth; fail when none is left."""
        for subject in list(self.group.subjects):
            if (message := self._unfit(subject)) is not None:
                warn(f"{subject.facts.path}: {message}")
                self.group.subjects.remove(subject)
                self.failures.append(Failure(path=subject.facts.path, message=message))
        if not self.group.subjects:
            raise RunError(self.failures[-1].message)

    def _unfit(self, subject: Subject) -> str | None:
        lm, at = self.lm, subject.at
        if not 0 <= at.layer < lm.n_layers:
            return f"the SAE belongs to layer {at.layer}; {lm.identity.id} has layers 0 to {lm.n_layers - 1}"
        if subject.facts.d_model != lm.d_model:
            return (
                f"{lm.identity.id} has width {lm.d_model}; the SAE expects {subject.facts.d_model}: name the model "
                "it was trained on with --model"
            )
        try:
            there = module_path(lm, at)
        except TcsaeError as failure:
            return str(failure)
        said = subject.module or there
        if f".{there}".endswith(f".{said}") or f".{said}".endswith(f".{there}"):  # with or without "model." before it
            return None
        return f"the SAE reads the output of {said}, but {at.site} of {lm.identity.architecture} is that of {there}"

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        config = self.config
        kept = len(self.rows.finished)
        if kept:
            note(f"{kept} of {len(self.rows.wanted)} rows were measured before and are kept")
        tokens = self.text.tokens(slice(0, VERIFY_ROWS), self.lm.device)
        for message in self.model.verify(tokens, self.locations):
            self._say(message)
        clean = self.model.clean(tokens[:1], self.locations)
        self.head.verify(tokens[:1], clean.final_BTD)
        self.effects = LogitEffects(self.lm, self.head)
        for message in (self.head.note, None if config.quick else self.effects.note):
            if message:
                self._say(message)
        uniform = frozenset(
            at
            for at, x_BTD in clean.at.items()
            if self.head.uniform_at_zero
            and not self.model.spliced(at, torch.zeros_like(x_BTD), tokens[:1], clean).any()
        )
        surveys = survey(self.model, self.text, self.locations, config.batch_rows)
        limit = PASS_BYTES
        if self.lm.device.type == "cuda":
            limit = torch.cuda.get_device_properties(self.lm.device).total_memory / 4
        passes = deque(self.rows.passes(limit))
        with progress("evaluate", len(self.text) * self.text.context * len(passes)) as bar:
            while passes:
                part = passes.popleft()
                if not self._fits(part, surveys, uniform, bar):
                    release()
                    left = [key for key in part if key in self.rows.missing]
                    self._say(f"out of memory with {len(part)} rows of the table at once: going on with half as many")
                    passes.extendleft([left[len(left) // 2 :], left[: len(left) // 2]])

    def _fits(
        self, part: list[str], surveys: dict[Location, Survey], uniform: frozenset[Location], bar: Progress
    ) -> bool:
        """Measure these rows in one pass; false where they do not fit into memory together."""
        try:
            candidates = [one for key in part if (one := self._candidate(key, surveys)) is not None]
            measurement = Measurement(self.model, self.head, self.text, candidates, uniform)
            measurement.run(self.config.batch_rows, bar)
            for failure in measurement.failures:
                warn(f"{failure.path}: {failure.message}")
            self.failures += measurement.failures
            self._finish(measurement.candidates)
        except Exception as failure:
            if len(part) == 1 or not is_out_of_memory(failure):
                raise
            return False
        return True

    def _candidate(self, key: str, surveys: dict[Location, Survey]) -> Candidate | None:
        at, what = self.rows.wanted[key]
        sae: Any = None
        if isinstance(what, UntrainedTwin):
            row, sae = MeasuredRow(what.name, "reference", at.layer, site=at.site), what.load(surveys[at].mean_D)
        elif isinstance(what, str):
            row = MeasuredRow(what, "reference", at.layer, site=at.site)
            if what == "untrained":
                sae = untrained_sae(self.lm.d_model, self.config.seed)
            elif what == "zero_sae":
                sae = zero_sae(self.lm.d_model)
        else:
            row = row_of(what)
            try:
                sae = what.load()
            except TcsaeError as failure:
                warn(f"{what.facts.path}: {failure}")
                self.failures.append(Failure(path=what.facts.path, message=str(failure)))
                return None
        if sae is not None:
            sae = sae.to(self.lm.device, torch.float32).token_coder()
        scope = what.scope if isinstance(what, Subject) else 1.0
        accumulators = self._accumulators(row, sae, scope, surveys[at])
        return Candidate(row, sae, surveys[at], accumulators, key)

    def _accumulators(self, row: MeasuredRow, sae: Any, scope: float, seen: Survey) -> dict[str, Any]:
        common = {"context": self.text.context, "seed": self.config.seed}
        if row.name == ACTIVATIONS and row.kind == "reference":
            raw = RawActivations(self.lm.d_model, self.lm.device)
            return {"metrics": AllMetrics(raw, self.families, **common)}
        if sae is None or row.name == "zero_sae":
            return {}
        found: dict[str, Any] = {"metrics": AllMetrics(sae, self.families, **common)}
        inside = max(1, round(scope * sae.n_features))
        if inside < sae.n_features:
            found["by_scope"] = ByScope(sae, self.families, **common, inside=inside)
        if sae.summands:
            found["by_summand"] = BySummand(sae, self.families, **common)
        if sae.sees == "window":
            found["windows"] = WindowMetrics(seen.mean_D)
        if row.kind == "sae" and not self.config.quick:
            cards = max(BROWSER_CARDS // len(self.group.subjects), BROWSER_CARDS // 10)
            found["browser"] = FeatureBrowser(sae, seed=self.config.seed, n_cards=cards)
        return found

    def _finish(self, candidates: list[Candidate]) -> None:
        """Complete and keep every row of a pass."""
        probed = ProbedModel.of(self.model, self.effects, self.text)
        at = None
        for candidate in sorted(candidates, key=lambda one: one.row.location):
            if candidate.row.location != at:
                probed.forget()
            at = candidate.row.location
            per_feature = candidate.finish()
            candidate.row.documents_U = self.text.unit_documents
            if candidate.sae is not None and candidate.accumulators and not self.config.quick:
                facts = (at, self.config.seed, per_feature, candidate.survey.norm_limit)
                context = ProbeContext(probed, candidate.sae, *facts)
                candidate.row.take(probes(context, self.families))
                for family in self.families.values():
                    candidate.row.definitions |= family.definitions
                if "browser" in candidate.accumulators:
                    shown: Any = candidate.accumulators["browser"]
                    candidate.row.cards = shown.cards(context)
            self.rows.put(candidate.key, candidate.row)


def _model_facts(lm: LanguageModel) -> ModelFacts:
    shared = {name: getattr(lm.identity, name) for name in ModelFacts.model_fields if name != "d_model"}
    return ModelFacts(d_model=lm.d_model, **shared)


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether an allocation failed: on the GPU, on the CPU by torch, or on the CPU by Python and NumPy."""
    if isinstance(failure, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(failure, TcsaeError):  # a plug-in's failure is told in a sentence; what it was is its cause
        return failure.__cause__ is not None and is_out_of_memory(failure.__cause__)
    return isinstance(failure, RuntimeError) and any(words in str(failure) for words in _WORDS)


@contextmanager
def within_memory(batch_rows: int) -> Iterator[None]:
    """A block that measures one SAE at a time in the end: what then does not fit is a batch of ``batch_rows`` rows.

    Raises:
        ResourceError: an allocation failed inside.

    """
    try:
        yield
    except Exception as failure:
        if not is_out_of_memory(failure):
            raise
        rows = f"{batch_rows} row{'' if batch_rows == 1 else 's'}"
        remedy = (
            "give a smaller --batch-size" if batch_rows > 1 else "try another --device, or one SAE at a time with --run"
        )
        raise ResourceError(
            f"out of memory with batches of {rows}, one SAE at a time: {remedy}; rows that are finished are kept"
        ) from failure


def release() -> None:
    """Give back to the device what a failed pass held."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_machine(device: torch.device) -> dict[str, str | int | float | None]:
    """Processor, threads and device; nothing that identifies a person or a host."""
    facts: dict[str, str | int | float | None] = {
        "device": device.type,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions() -> dict[str, str]:
    """Of Python and the packages that shape the numbers."""
    return {"python": platform.python_version(), **installed_versions()}
