"""From a study file to its stages: one extraction per text, one training per store, one evaluation per text. Pure.

Every stage is a call of the ordinary command's function with an ordinary configuration; what a study adds is that all
of them follow from one file. Nothing here reads a store or a model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..evaluate.config import EvaluateConfig
from ..extract.config import ExtractConfig, extract_config
from ..options import several
from ..sites import Location
from ..train.config import TrainConfig
from ..train.presets import PRESETS, build_config
from .file import StudyFile, Text, Variant

MOST_BATCH_ROWS = 16
# What a study decides itself.
_OF_TRAINING = (
    "data.store",
    *(f"run.{key}" for key in ("seed", "steps", "tokens", "out", "name", "baseline", "device")),
)
_OF_EXTRACTION = ("layers", "site", "model", "dataset", "tokens", "out", "fresh", "device", "workers", "scheduler")


@dataclass(frozen=True)
class PlannedMember:
    """One SAE of a study: a variant with a seed at a place of a model."""

    text: str
    at: Location
    variant: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """Of its run folder and of its row in the report."""
        return self.config.run.name

    @property
    def key(self) -> str:
        """Unique in the study."""
        return f"{self.text}/{self.name}"

    @property
    def folder(self) -> Path:
        """Of its run."""
        return Path(self.config.run.out) / self.name


@dataclass(frozen=True)
class Training:
    """All members at one place of one text, which train on one store: together, as far as they share a stream."""

    text: str
    at: Location
    store: str
    members: tuple[PlannedMember, ...]

    @property
    def key(self) -> str:
        """Name of the stage."""
        return f"train {self.text} {self.at.short}"


@dataclass(frozen=True)
class AloneStage(Training):
    """SAEs that are trained once more, for a few steps, each in a process of its own: for time and memory alone."""

    repeats: int = 1

    @property
    def key(self) -> str:
        """Name of the stage."""
        return f"cost {self.text} {self.at.short}"

    def file(self, each: PlannedMember) -> Path:
        """What is kept of one of them."""
        return each.folder.parent / f"{each.name}.json"


@dataclass(frozen=True)
class PlannedText:
    """A model and its text: what is extracted, trained and evaluated of it."""

    name: str
    text: Text
    model: str
    """As members name it: the model, or the whole text's name where a model has several texts."""
    extraction: ExtractConfig
    trainings: tuple[Training, ...]
    evaluation: EvaluateConfig
    """Without the runs, which are those that finish."""
    alone: AloneStage | None = None
    """At its first place: what a training costs does not depend on the layer."""

    @property
    def members(self) -> tuple[PlannedMember, ...]:
        """Of all its places."""
        return tuple(itertools.chain.from_iterable(training.members for training in self.trainings))

    @property
    def report(self) -> Path:
        """Folder of its report."""
        return Path(self.evaluation.out) / str(self.evaluation.name)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of its stages, in order."""
        alone = () if self.alone is None else (self.alone.key,)
        trained = tuple(training.key for training in self.trainings)
        return (f"extract {self.name}", *trained, *alone, f"evaluate {self.name}")


@dataclass(frozen=True)
class StudyPlan:
    """All stages of a study."""

    study: StudyFile
    out: Path
    texts: tuple[PlannedText, ...]

    @property
    def members(self) -> tuple[PlannedMember, ...]:
        """All SAEs, in the file's order."""
        return tuple(itertools.chain.from_iterable(text.members for text in self.texts))

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of all stages, in order."""
        return tuple(itertools.chain.from_iterable(text.stages for text in self.texts))


def output_folder(study: StudyFile, out: str | Path | None = None) -> Path:
    """Where a study is kept: ``out``, or ``studies/out/NAME-SCALE``."""
    return Path(out) if out else Path("studies/out") / f"{study.name}-{study.scale}"


def plan_study(
    study: StudyFile, out: str | Path | None = None, *, device: str = "auto", scheduler: str | None = None
) -> StudyPlan:
    """The stages of a study at its chosen scale.

    Args:
        study: the file.
        out: where all of it is kept.
        device: for every stage.
        scheduler: address of a Dask scheduler, for the extraction.

    Raises:
        UsageError: an option or field that the stages do not know, or that the study decides itself.

    """
    folder = output_folder(study, out)
    names = _names_of_texts(study.sizes.texts)
    of_model = [text.model for text in study.sizes.texts]
    texts = []
    for name, text in zip(names, study.sizes.texts, strict=True):
        extraction = _extraction(study, text, f"{folder}/stores/{name}", device, scheduler)
        trainings = tuple(
            _training(study, name, at, store, f"{folder}/runs/{name}", device) for at, store in extraction.paths.items()
        )
        model = text.model if of_model.count(text.model) == 1 else name
        evaluation = _evaluation(study, name, extraction, trainings, f"{folder}/reports", device)
        alone = _alone(study, trainings[0], f"{folder}/cost/{name}", device)
        texts.append(PlannedText(name, text, model, extraction, trainings, evaluation, alone))
    return StudyPlan(study, folder, tuple(texts))


def _names_of_texts(texts: tuple[Text, ...]) -> list[str]:
    """``demo-topics`` for the text ``topics`` of the model ``demo``; numbered where two would have one name."""
    names: list[str] = []
    for text in texts:
        base = name = "-".join(
            re.sub(r"[^\w.]+", "-", Path(part).name).strip("-.") for part in (text.model, text.dataset)
        )
        number = itertools.count(2)
        while name in names:
            name = f"{base}-{next(number)}"
        names.append(name)
    return names


def _extraction(study: StudyFile, text: Text, out: str, device: str, scheduler: str | None) -> ExtractConfig:
    for option in text.options:
        if option in _OF_EXTRACTION:
            raise UsageError(f"text {text.dataset} gives the option '{option}', which the study decides: leave it out")
    given: dict[str, Any] = {"model": text.model, "dataset": text.dataset, "tokens": study.sizes.tokens}
    return extract_config(
        layers=text.layers, site=text.sites, out=out, device=device, scheduler=scheduler, **given, **text.options
    )


def _training(study: StudyFile, text: str, at: Location, store: str, out: str, device: str) -> Training:
    members = tuple(
        PlannedMember(text, at, variant.name, seed, config)
        for variant in study.active
        for seed, config in _configs(study, variant, at, {"data.store": store, "run.out": out, "run.device": device})
    )
    return Training(text, at, store, members)


def _alone(study: StudyFile, training: Training, out: str, device: str) -> AloneStage | None:
    """The variants of ``cost_alone`` that this scale runs, seed by seed, so that all of them see the same machine."""
    asked = study.cost_alone
    variants = [] if asked is None else [one for one in study.active if one.name in asked.variants]
    if asked is None or not variants:
        return None
    text, at, store = training.text, training.at, training.store
    # No checkpoint, which would count as memory; no logger of others.
    few = {"run.steps": asked.steps, "run.checkpoint_every": asked.steps, "run.checkpoint_minutes": 0.0}
    place = {"data.store": store, "run.out": out, "run.device": device, "run.log": ("jsonl",), **few}
    members = [
        PlannedMember(text, at, variant.name, seed, config)
        for variant in variants
        for seed, config in _configs(study, variant, at, place)
    ]
    members.sort(key=lambda each: study.sizes.seeds.index(each.seed))
    return AloneStage(text, at, store, tuple(members), asked.repeats)


def _configs(
    study: StudyFile, variant: Variant, at: Location, place: Mapping[str, Any]
) -> Iterator[tuple[int, TrainConfig]]:
    if variant.preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise UsageError(f"variant {variant.name} has the preset '{variant.preset}': choose one of {known}")
    chosen = {**study.train, **study.sizes.train, **variant.train}
    for field in chosen:
        if field in _OF_TRAINING:
            raise UsageError(f"variant {variant.name} gives {field}, which the study decides: leave it out of its file")
        if field.count(".") != 1:
            raise UsageError(
                f"variant {variant.name} gives '{field}', which is no field of the training: write one such as sae.k"
            )
    decided = {"run.steps": study.sizes.steps, "run.baseline": False, **place}
    for seed in study.sizes.seeds:
        own = {"run.seed": seed, "run.name": f"{at.short}-{variant.name}-s{seed}"}
        try:
            config = build_config(variant.preset, None, {**chosen, **decided, **own})
        except UsageError as failure:
            raise UsageError(f"variant {variant.name}: {failure}") from failure
        yield seed, config


def _evaluation(
    study: StudyFile,
    name: str,
    extraction: ExtractConfig,
    trainings: tuple[Training, ...],
    out: str,
    device: str,
) -> EvaluateConfig:
    rows = study.sizes.rows
    batch = max(size for size in range(1, MOST_BATCH_ROWS + 1) if rows % size == 0)
    plugins = {file for training in trainings for each in training.members for file in each.config.run.plugins}
    config = EvaluateConfig(
        batches=rows // batch,
        batch_rows=batch,
        splice_rows=study.sizes.splice_rows,
        out=out,
        name=name,
        device=device,
        dtype=extraction.model.dtype,
        plugins=several(sorted({*plugins, *extraction.plugins})),
        codes=study.codes,
    )
    return replace(config, runs=tuple(str(each.folder) for training in trainings for each in training.members))
