"""Which SAEs are to be evaluated, in which model and on which text: runs and SAEs from elsewhere, grouped so that each
model is loaded once. Whatever cannot be loaded becomes a failure with its sentence, and the others are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..cache.arrays.config import held_out_beside
from ..cache.format.manifest import StoreManifest
from ..console import warn
from ..errors import RunError, TcsaeError, UsageError, printable
from ..extract.config import ModelSource, TextSource
from ..sites import Location, named_module
from ..system.untrusted_files import reason, shown
from ..train.config import SAEConfig
from ..train.formats.from_weights import MADE_FOR
from ..train.formats.locate import load_external
from ..train.formats.saelens import WEIGHTS
from ..train.run_folder.record import RunRecord, find_runs, load_run
from ..train.sae.protocol import RowTokens, SparseAutoencoder
from ..train.sae.registry import ACTIVATIONS, ARCHITECTURES
from .config import EvaluateConfig
from .cost import cost_settings
from .results import MADE_OF_ANOTHER, Failure, Role, SAEFacts


@dataclass(frozen=True)
class Subject:
    """An SAE that is to be evaluated. Its weights are loaded when its turn comes."""

    name: str
    at: Location
    """The layer and hook point whose tensor it reconstructs."""
    facts: SAEFacts
    load: Callable[[], SparseAutoencoder]
    """Can be sent to another process."""
    fingerprint: str
    role: Role | None = None
    pair: str | None = None
    """Name of what it is compared with: a TC-SAE's twin and the other way round, the original of a pruned or fine-tuned
    run.
    """
    scope: float = 1.0
    """Share of the dictionary that the temporal term sees (a twin: its TC-SAE's), or the first of nested groups; below
    1 both parts are measured too.
    """
    module: str | None = None
    """The module whose output it says it reads, where its files name one."""
    notes: tuple[str, ...] = ()
    """What a reader must know of it beforehand."""
    made_for: Mapping[str, Any] = field(default_factory=dict)
    """Of an SAE from elsewhere: what its files say of the model and the text it was trained on."""
    n_bytes: int = 0
    """Of its weights in float32."""
    untrained: UntrainedTwin | None = None
    """Of a run: the same architecture as its training began."""


@dataclass(frozen=True)
class UntrainedTwin:
    """A reference row: an architecture before its training. What it shows of time was not learned."""

    name: str
    at: Location
    load: Callable[[Tensor], SparseAutoencoder]
    """From the mean [D] of the activations."""
    fingerprint: str
    n_bytes: int


@dataclass
class Group:
    """Subjects that share a language model and a text."""

    model: ModelSource
    text: TextSource
    held_out: bool
    """Whether only held-out documents may be read; false for a text that no run was trained on."""
    model_fingerprint: str | None
    vectors: str | None = None
    """The store that is evaluated on where no language model made what the SAEs reconstruct."""
    trained_on: str | None = None
    """The store of the first of its runs, then."""
    subjects: list[Subject] = field(default_factory=list)


def gather_subjects(
    config: EvaluateConfig, plugins: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Group], list[Failure]]:
    """Everything asked for, by model and text. ``plugins``: those that are loaded, file name → SHA-256.

    Raises:
        UsageError: nothing was asked for and there is no finished run.

    """
    paths = list(config.runs)
    if not paths and not config.saes:
        paths = [str(path) for path in find_runs(config.runs_folder)]
        if not paths:
            raise UsageError(
                f"there is no finished run under {config.runs_folder}/: train one, or name an SAE with --run or --sae"
            )
    groups: dict[tuple[Any, ...], Group] = {}
    failures: list[Failure] = []
    for path in paths:
        _attempt(path, failures, lambda path=path: _add_run(groups, config, path, plugins))
    for at, path in enumerate(config.saes):
        layer, site = (each[at if len(each) > 1 else 0] if each else None for each in (config.layers, config.sites))
        said = {"layer": layer, "site": site}
        _attempt(path, failures, lambda path=path, said=said: _add_external(groups, config, path, said))
    for group in groups.values():
        _split_twins(group)
    return list(groups.values()), failures


def _scope(path: str, record: RunRecord) -> float:
    """What the temporal term sees, or the first of nested groups."""
    scope = _settings(path, record, "temporal").get("scope", 1.0)
    if type(scope) not in (int, float) or not 0 < scope <= 1:
        raise RunError(f"{path}: its record has a temporal scope of {shown(repr(scope))}: train the run again")
    groups = _settings(path, record, "sae").get("groups") or [1.0]
    return float(scope if scope < 1 else groups[0])


def _settings(path: str, record: RunRecord, group: str) -> dict[str, Any]:
    """One group of the training's configuration.

    Raises:
        RunError: the record has something else in its place.

    """
    found = record.config.get(group, {})
    if not isinstance(found, dict):
        raise RunError(f"{path}: its record has {shown(repr(found))} for its '{group}' settings: train the run again")
    return found


def _manifest(path: str, record: RunRecord) -> StoreManifest:
    try:
        return StoreManifest.model_validate(record.store_manifest)
    except ValidationError as failure:
        where = ".".join(str(part) for part in failure.errors()[0]["loc"]) or "its top level"
        raise RunError(
            f"{path}: what its record says of the store is not valid at '{shown(where)}': train the run again"
        ) from failure


def _check_fits(path: str, record: RunRecord, manifest: StoreManifest, sae: SparseAutoencoder) -> None:
    said, found = (record.layer, sae.d_model), (manifest.layer, manifest.d_model)
    if said != found:
        raise RunError(
            f"{path} is of layer {said[0]} and width {said[1]}, the store in its record of layer {found[0]} and width "
            f"{found[1]}: its files belong to different runs, train it again"
        )


@torch.no_grad()
def _check_computes(path: str, sae: SparseAutoencoder) -> None:
    """Run it on a few vectors, before a language model is loaded for it: whatever it raises is one sentence.

    Raises:
        RunError: it does not compute, or not codes [.., F] and a reconstruction [.., D].

    """
    x_NTD, coder = torch.ones(1, 4, sae.d_model), sae.token_coder()
    try:
        out = coder.on_rows(x_NTD, RowTokens.whole(x_NTD))
        shapes = list(out.features.shape), list(coder.decode(out.features).shape)
    except Exception as failure:  # of a plug-in, say
        raise RunError(f"{path} does not compute ({type(failure).__name__}: {reason(failure)})") from failure
    if shapes != ([1, 4, sae.n_features], [1, 4, sae.d_model]):
        raise RunError(
            f"{path} makes codes of shape {shapes[0]} and a reconstruction of shape {shapes[1]} from activations of "
            f"shape {list(x_NTD.shape)} with {sae.n_features} features: it cannot be measured"
        )


def _split_twins(group: Group) -> None:
    """A twin knows of no scope: it takes that of the TC-SAE it is paired with."""
    scopes = {(one.at, one.name): one.scope for one in group.subjects if one.role == "tc"}
    for at, one in enumerate(group.subjects):
        if one.role == "twin" and one.pair is not None:
            group.subjects[at] = replace(one, scope=scopes.get((one.at, one.pair), 1.0))


def _attempt(path: str, failures: list[Failure], add: Callable[[], None]) -> None:
    try:
        add()
    except TcsaeError as failure:
        failures.append(Failure(path=path, message=str(failure)))


def _add_run(
    groups: dict[tuple[Any, ...], Group], config: EvaluateConfig, path: str, plugins: Mapping[str, str]
) -> None:
    record = load_run(path)
    if not record.finished:
        raise RunError(
            f"{path} is unfinished (step {record.steps} of {record.planned_steps}): finish it with "
            "pipeline train --resume"
        )
    notes = (*_notes_on_plugins(path, record, plugins), *_notes_on_roles(path, record, config.role))
    notes += _notes_on_parts(record)
    manifest = _manifest(path, record)
    scope = _scope(path, record)
    weights = Path(path) / WEIGHTS
    if not weights.exists():
        raise RunError(f"{path} says it is finished but has no {WEIGHTS}: train it again")
    sae = SparseAutoencoder.load(path)
    _check_fits(path, record, manifest, sae)
    _check_computes(path, sae)
    group = _group(groups, config, manifest, store=record.store)
    role, original = _made_of(sae)
    group.subjects.append(
        Subject(
            name=_free_name(record.name, record.location, group),
            at=record.location,
            facts=_facts_of_run(path, record, sae, {f"{role}_from": original} if role and original else {}),
            load=partial(SparseAutoencoder.load, str(Path(path).absolute())),
            fingerprint=sha256(weights.read_bytes()).hexdigest()[:16],
            role=role or record.role,
            pair=original or record.twin,
            scope=1.0 if role == "pruned" else scope,
            notes=notes,
            n_bytes=_n_bytes(sae),
            untrained=None if original else _untrained(path, record, sae),
        )
    )


def _made_of(sae: SparseAutoencoder) -> tuple[Role | None, str | None]:
    """The role of a run that was made of another one, and that one's name."""
    for role in MADE_OF_ANOTHER:
        if original := sae.metadata.get(f"{role}_from"):
            return role, original  # pyright: ignore[reportReturnType] - one of them
    return None, None


def _notes_on_parts(record: RunRecord) -> tuple[str, ...]:
    """What to note of a run that went on after it was finished."""
    if not record.parts:
        return ()
    steps = " + ".join(f"{part.steps:,}" for part in record.parts)
    return (f"it was trained in {len(record.parts)} parts, of {steps} steps, each with its own learning-rate schedule",)


def _notes_on_roles(path: str, record: RunRecord, measured: str | None) -> tuple[str, ...]:
    """What to note of a run that was trained on the messages of one role and is measured on others."""
    trained = _settings(path, record, "data").get("only", "")
    if not trained or trained == measured:
        return ()
    here = f"those of the role '{measured}'" if measured else "all tokens"
    return (f"it was trained on tokens in messages of the role '{trained}' alone and is measured on {here}",)


def _notes_on_plugins(path: str, record: RunRecord, given: Mapping[str, str]) -> tuple[str, ...]:
    """What to note of plug-ins that have changed since the run was trained with them.

    Raises:
        RunError: a plug-in is missing, or one has changed that says what the SAE computes.

    """
    notes = []
    of_sae = _settings(path, record, "sae")
    makers = ARCHITECTURES.owner(of_sae.get("architecture", "")), ACTIVATIONS.owner(of_sae.get("activation", ""))
    for name, digest in record.plugins.items():
        if name not in given:
            raise RunError(
                f"{path} was trained with the plug-in {name} (SHA-256 {digest[:12]}…), which was not given: add "
                f"--plugin {name}"
            )
        if given[name] == digest:
            continue
        change = f"the plug-in {name} has changed since training (SHA-256 {digest[:12]}… then, {given[name][:12]}… now)"
        if name in [Path(maker).name for maker in makers if maker]:
            raise RunError(f"{path}: {change} and says what this SAE computes: evaluate with the file as it was")
        warn(f"{path}: {change}")
        notes.append(f"{change}; the weights are those of the training")
    return tuple(notes)


def _add_external(
    groups: dict[tuple[Any, ...], Group], config: EvaluateConfig, path: str, said: Mapping[str, Any]
) -> None:
    found = load_external(path, **said)
    _check_computes(path, found.sae)
    group = next(iter(groups.values()), None)  # beside runs it is measured in their model, on their text
    if group is None or len(groups) > 1:
        if config.model is None and found.model_name is None:
            raise UsageError(f"{path} does not say which language model it belongs to: give --model")
        group = _group(groups, config, None, found.model_name)
    digest = sha256()
    for name, value in sorted(found.sae.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    group.subjects.append(
        Subject(
            name=_free_name(found.name, found.at, group),
            at=found.at,
            module=named_module(found.sae.metadata),
            made_for={name: found.sae.metadata[name] for name in MADE_FOR if name in found.sae.metadata},
            facts=SAEFacts(
                path=path,
                source=found.source,
                architecture=found.sae.label,
                d_model=found.sae.d_model,
                n_features=found.sae.n_features,
                settings=cost_settings(found.sae, group.text.context),
            ),
            n_bytes=_n_bytes(found.sae),
            load=partial(
                _external, _elsewhere(path), dict(said)
            ),  # again: what is not measured yet must not fill the memory
            fingerprint=digest.hexdigest()[:16],
            scope=found.sae.prefix_sizes[0] / found.sae.n_features,
        )
    )


def _elsewhere(path: str) -> str:
    """As a process in another folder must name it; ids on the hub as they are."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def _external(path: str, said: Mapping[str, Any]) -> SparseAutoencoder:
    return load_external(path, **said).sae


def _group(
    groups: dict[tuple[Any, ...], Group],
    config: EvaluateConfig,
    manifest: StoreManifest | None,
    model_name: str | None = None,
    store: str = "",
) -> Group:
    if manifest is not None and not manifest.of_language_model and config.model is None:
        vectors = config.dataset or held_out_beside(store)
        if not Path(vectors).exists():
            raise RunError(
                f"the vectors of {manifest.model.id} that were held out are not at {vectors}: name their store with "
                "--dataset, or import with --held-out"
            )
        source = ModelSource(id=manifest.model.id, device=config.device), TextSource(dataset=vectors)
        key = (*source, vectors)
        return groups.setdefault(key, Group(*source, True, manifest.model.fingerprint, vectors, store))
    if manifest is not None and not manifest.of_language_model and config.dataset is None:
        raise UsageError(
            f"{store} holds imported vectors, of which no text is known: with --model, name a text with --dataset"
        )
    model, text, held_out = _model(config, manifest, model_name), _text(config, manifest), True
    if config.dataset is not None and (manifest is None or config.dataset != manifest.text.dataset):
        held_out = False  # a text no run has seen: all of it may be read
    fingerprint = manifest.model.fingerprint if manifest is not None else None
    key = (model, text, held_out)
    return groups.setdefault(key, Group(model, text, held_out, fingerprint))


def _model(config: EvaluateConfig, manifest: StoreManifest | None, model_name: str | None) -> ModelSource:
    load_in = config.load_in or (manifest.model.load_in if manifest is not None else "")
    common = {"device": config.device, "dtype": config.dtype, "device_map": config.device_map, "load_in": load_in}
    if config.model is not None:
        return ModelSource(id=config.model, revision=config.revision, gguf_file=config.gguf_file, **common)
    if manifest is not None:
        known = manifest.model
        return ModelSource(id=known.id, revision=known.revision, gguf_file=known.gguf_file, **common)
    return ModelSource(id=model_name or ModelSource.id, **common)


def _text(config: EvaluateConfig, manifest: StoreManifest | None) -> TextSource:
    if manifest is None or (config.dataset is not None and config.dataset != manifest.text.dataset):
        known = TextSource(dataset=config.dataset or TextSource.dataset)
        context = manifest.text.context if manifest is not None else known.context
        packing = manifest.text.packing if manifest is not None else known.packing
        seed, share = known.seed, 0.0 if config.dataset is not None else known.held_out
    else:
        known = manifest.text
        context, packing, seed, share = known.context, known.packing, known.seed, known.held_out
    return TextSource(
        dataset=known.dataset,
        split=config.split or known.split,
        text_column=config.text_column or known.text_column,
        label_column=config.label_column or known.label_column,
        chat_template=config.chat_template or known.chat_template,
        packing=packing,
        context=context,
        seed=seed,
        held_out=share,
    )


def _facts_of_run(path: str, record: RunRecord, sae: SparseAutoencoder, more: dict[str, str]) -> SAEFacts:
    return SAEFacts(
        path=path,
        source="run",
        architecture=sae.label,
        d_model=sae.d_model,
        n_features=sae.n_features,
        settings=_flat(record.config)
        | {"seed": record.seed, "steps": record.steps, "tokens": record.tokens}
        | more
        | cost_settings(sae, record.store_manifest["text"]["context"], record),
    )


def _n_bytes(sae: SparseAutoencoder) -> int:
    return 4 * sum(value.numel() for value in sae.state_dict().values())


def untrained_name(chosen: SAEConfig) -> str:
    """Of the row that shows an architecture before its training."""
    return f"untrained:{chosen.activation if chosen.architecture == 'sae' else chosen.architecture}"


def _untrained(path: str, record: RunRecord, sae: SparseAutoencoder) -> UntrainedTwin:
    try:
        chosen = SAEConfig.model_validate(record.config.get("sae", {}) | {"width": sae.n_features})
    except (ValidationError, TypeError) as failure:
        raise RunError(
            f"{path}: its record does not say what its SAE is ({reason(failure)}): train it again"
        ) from failure
    if chosen.architecture == "sae" and chosen.activation == "topk" and chosen.k > sae.n_features:
        said = f"its record says that {chosen.k} features are active, it has {sae.n_features}"
        raise RunError(f"{path}: {said}: its files belong to different runs, train it again")

    load = partial(_initialised, chosen, sae.d_model, record.seed, record.input_scale)
    facts = (chosen.model_dump_json(), record.seed, record.input_scale)
    digest = sha256(repr(facts).encode()).hexdigest()[:16]
    return UntrainedTwin(untrained_name(chosen), record.location, load, digest, _n_bytes(sae))


def _initialised(chosen: SAEConfig, d_model: int, seed: int, scale: float, mean_D: Tensor) -> SparseAutoencoder:
    twin = ARCHITECTURES.get(chosen.architecture).build(chosen, d_model)
    twin.initialise(chosen, seed, mean_D.cpu().float() * scale)
    return twin.rescaled(scale).eval()


def untrained_twins(subjects: Iterable[Subject]) -> list[UntrainedTwin]:
    """One for every architecture and layer, that of the first run."""
    found: dict[tuple[Location, str], UntrainedTwin] = {}
    for subject in subjects:
        if subject.untrained is not None:
            found.setdefault((subject.at, subject.untrained.name), subject.untrained)
    return list(found.values())


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """Nested settings by dotted name; lists as text."""
    found: dict[str, str | int | float | bool | None] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = (
                value if isinstance(value, str | int | float | bool | None) else ", ".join(map(str, value))
            )
    return found


def _free_name(name: str, at: Location, group: Group) -> str:
    name = printable(name)
    taken = {subject.name for subject in group.subjects if subject.at == at}
    if name not in taken:
        return name
    return next(f"{name} ({n})" for n in range(2, len(taken) + 3) if f"{name} ({n})" not in taken)
