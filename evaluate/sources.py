"""What an evaluation measures in: a language model and a text, or the held-out vectors of a store without a model.

Both give rows to measure on, say which SAEs fit them, and set up the pass; only the first can splice.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from ..cache.format.manifest import ModelIdentity, TextIdentity
from ..cache.store import ActivationStore
from ..errors import TcsaeError
from ..extract.assets import MODELS, demo_text
from ..extract.model.hooks import module_path
from ..extract.model.load import LanguageModel, check_context, load_language_model, outline_model
from ..extract.text.local_files import local_path
from ..extract.text.open import open_documents, resolve_text
from ..extract.text.rows import row_blocks
from ..sites import Location
from ..system.device import resolve_device
from .config import FIDELITY, EvaluateConfig
from .made_for import made_for_notes
from .model.heldout_text import Activations, HeldOutText
from .model.kept_states import KeptStates
from .model.logit_effects import LogitEffects
from .model.probes import ProbedModel
from .model.splice import Head, SplicedModel
from .model.stored_vectors import StoredVectors, open_held_out
from .model.token_text import token_classes
from .model.untouched import Untouched, states_bytes
from .one_pass import Measurement
from .results import ModelFacts
from .subjects import Group, Subject
from .table_row import Candidate

VERIFY_ROWS, VERIFY_TOKENS = 2, 64
"""Of the text: where splices are compared with hooks before anything is measured."""


class Source(Protocol):
    """What an evaluation measures in."""

    spliced: bool
    """Whether reconstructions can be spliced, so that there are CE and KL."""
    device: torch.device
    facts: ModelFacts
    identity: ModelIdentity
    """Of the language model, or of what made the vectors."""
    trained_on: bool
    """Whether the rows are those that its runs were trained on."""

    @property
    def activations(self) -> SplicedModel | StoredVectors:
        """Where the tensors at the locations come from."""
        ...

    def reads(self) -> list[Path] | None:
        """The files that it is read from; None where they may change without a trace on this machine."""
        ...

    def about(self) -> list[str]:
        """What the report must say of it, as sentences."""
        ...

    def unfit(self, subject: Subject) -> str | None:
        """Why an SAE cannot be measured in it; None where it can."""
        ...

    def differences(self, subject: Subject) -> Sequence[str]:
        """What an SAE from elsewhere was made for, and is not here."""
        ...

    def elsewhere(self) -> Group:
        """Model and text, without SAEs, as a process in another folder must name them."""
        ...

    def gather(self) -> tuple[HeldOutText, TextIdentity]:
        """The rows that are measured on."""
        ...

    def prepare(self, text: HeldOutText, locations: Sequence[Location]) -> list[str]:
        """Try what the pass relies on; returns what the report must say."""
        ...

    def keep_states(self, text: HeldOutText, locations: Sequence[Location], folder: Path) -> None:
        """Keep in a folder what this text is to the untouched model, for evaluations to come."""
        ...

    def untouched(self, text: HeldOutText) -> Activations:
        """The tensors of a text at the locations, read from where they are kept."""
        ...

    def measurement(self, text: HeldOutText, candidates: list[Candidate]) -> Measurement:
        """A pass over the text."""
        ...

    def probed(self, text: HeldOutText) -> ProbedModel:
        """What is asked after the pass."""
        ...


def source_of(config: EvaluateConfig, group: Group) -> Source:
    """What this group is measured in."""
    return InModel(config, group) if group.vectors is None else InVectors(config, group)


class InModel:
    """A language model, loaded, and a text."""

    spliced = True
    trained_on = False

    def __init__(self, config: EvaluateConfig, group: Group):
        self.config, self.group = config, group
        outline = outline_model(group.model)
        self._reads = _files_of(group, outline.files.folder)
        self._model = outline.source
        check_context(outline.config, outline.source.id, group.text.context)
        self.lm = load_language_model(outline)
        self.device = self.lm.device
        self.facts = _model_facts(self.lm)
        self.identity = self.lm.identity
        self.activations, self.head = SplicedModel(self.lm), Head(self.lm)
        self.effects: LogitEffects | None = None
        self.uniform: frozenset[Location] = frozenset()
        self._untouched: Untouched | None = None

    def reads(self) -> list[Path] | None:
        """Those of the model and the text, as they were before anything was read."""
        return self._reads

    def about(self) -> list[str]:
        """Where the weights are not those of the store: one sentence."""
        expected, found = self.group.model_fingerprint, self.lm.identity
        if expected is None or expected == found.fingerprint:
            return []
        return [
            f"the weights of {found.id} are not those the store was extracted with (fingerprint "
            f"{found.fingerprint[:12]}, the store's {expected[:12]})"
        ]

    def unfit(self, subject: Subject) -> str | None:
        """Another width or depth, or another module."""
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

    def differences(self, subject: Subject) -> Sequence[str]:
        """Another model, BOS, context …: see :mod:`.made_for`."""
        return made_for_notes(subject.made_for, self.lm, self.group.text.context)

    def elsewhere(self) -> Group:
        """The model by its absolute path or commit."""
        return replace(self.group, model=self._model, subjects=[])

    def gather(self) -> tuple[HeldOutText, TextIdentity]:
        """The held-out documents of the text, and what identifies it."""
        config, group = self.config, self.group
        documents = open_documents(group.text)
        identity = resolve_text(group.text, self.lm, documents)
        blocks = row_blocks(
            group.text, self.lm, held_out=group.held_out, documents=documents, rows_per_block=config.batch_rows
        )
        text = HeldOutText.gather((block for block, _ in blocks), config.rows, documents.label, only=config.role)
        return replace(text, classes_RT=token_classes(self.lm.tokenizer, text.tokens_RT)), identity

    def prepare(self, text: HeldOutText, locations: Sequence[Location]) -> list[str]:
        """Compare splices with hooks and the head with the model's own logits."""
        model = self.activations
        tokens = text.tokens(slice(0, VERIFY_ROWS), self.device)[:, :VERIFY_TOKENS]
        said = model.verify(tokens, locations)
        clean = model.clean(tokens[:1], locations)
        self.head.verify(tokens[:1], clean.final_BTD)
        self.effects = LogitEffects(self.lm, self.head)
        said += [one for one in (self.head.note, None if self.config.quick else self.effects.note) if one]
        self.uniform = frozenset(
            at
            for at, x_BTD in clean.at.items()
            if "zero_all" in self.config.reference_rows
            and self.head.uniform_at_zero
            and not model.spliced(at, torch.zeros_like(x_BTD), tokens[:1], clean).any()
        )
        return said

    def keep_states(self, text: HeldOutText, locations: Sequence[Location], folder: Path) -> None:
        """In as many bytes as the configuration allows."""
        if self.config.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        needed = states_bytes(self.activations, text, locations)
        kept = KeptStates.within(folder, needed, self.config.keep_states * 1e9)
        self._untouched = Untouched(self.activations, text, locations, kept)

    def untouched(self, text: HeldOutText) -> Activations:
        """Run, or read."""
        known = self._untouched
        return known if known is not None and known.text is text else self.activations

    def measurement(self, text: HeldOutText, candidates: list[Candidate]) -> Measurement:
        """With splices."""
        known = self._untouched if self._untouched is not None and self._untouched.text is text else None
        splices = self.config.measures(FIDELITY)
        return Measurement(self.activations, self.head, text, candidates, self.uniform, splices, known)

    def probed(self, text: HeldOutText) -> ProbedModel:
        """Altered rows can be run."""
        return ProbedModel.of(self.activations, self.effects, text)


class InVectors:
    """Held-out vectors of a store."""

    spliced = False

    def __init__(self, config: EvaluateConfig, group: Group):
        assert group.vectors is not None  # noqa: S101 - see source_of
        self.config, self.group = config, group
        self.device = resolve_device(config.device)
        trained_on = group.trained_on if group.trained_on and Path(group.trained_on).exists() else None
        store = None if trained_on is None else ActivationStore.open(trained_on)
        self.activations = open_held_out(group.vectors, store, self.device)
        self.facts = self.activations.facts
        vectors = self.activations.store
        self.identity = vectors.manifest.model
        self.trained_on = store is not None and store.fingerprint() == vectors.fingerprint()

    def reads(self) -> list[Path] | None:
        """A store has too many files to be looked at one by one."""
        return None

    def about(self) -> list[str]:
        """Why there is no CE."""
        return [
            f"{self.facts.id} is no language model: there are no next tokens to predict, and so neither CE nor KL; "
            "all other figures are of its held-out vectors"
        ]

    def unfit(self, subject: Subject) -> str | None:
        """Another place or width."""
        store = self.activations.store
        said, found = (subject.at, subject.facts.d_model), (store.location, store.d_model)
        if said == found:
            return None
        return (
            f"the SAE is of layer {said[0]} and width {said[1]}, {store.path} of layer {found[0]} and width "
            f"{found[1]}: name the held-out store of its vectors with --dataset"
        )

    def differences(self, subject: Subject) -> Sequence[str]:  # noqa: ARG002 - as of a model
        """Nothing is known."""
        return []

    def elsewhere(self) -> Group:
        """The stores by their absolute paths."""
        group = self.group
        places = {
            name: place if place is None or "://" in place else str(Path(place).absolute())
            for name, place in (("vectors", group.vectors), ("trained_on", group.trained_on))
        }
        return replace(group, subjects=[], **places)

    def gather(self) -> tuple[HeldOutText, TextIdentity]:
        """Rows of the store."""
        vectors, config = self.activations, self.config
        text = HeldOutText.gather(vectors.blocks(config.batch_rows), config.rows, vectors.label, only=config.role)
        return text, vectors.store.manifest.text

    def prepare(self, text: HeldOutText, locations: Sequence[Location]) -> list[str]:  # noqa: ARG002 - as a model
        """Nothing is relied on."""
        return []

    def keep_states(self, text: HeldOutText, locations: Sequence[Location], folder: Path) -> None:
        """They are kept already."""

    def untouched(self, text: HeldOutText) -> Activations:  # noqa: ARG002 - as of a model
        """The store."""
        return self.activations

    def measurement(self, text: HeldOutText, candidates: list[Candidate]) -> Measurement:
        """Without splices."""
        return Measurement(self.activations, None, text, candidates)

    def probed(self, text: HeldOutText) -> ProbedModel:
        """Only rows of the store can be looked at again."""
        return ProbedModel.of(self.activations, None, text)


def _files_of(group: Group, model: Path) -> list[Path] | None:
    """Files of the language model and the text; None where the hub may have others tomorrow."""
    text = demo_text() if group.text.dataset == "demo" else local_path(group.text.dataset)
    here = Path(group.model.id).exists() or group.model.id in MODELS
    pinned = re.fullmatch("[0-9a-f]{40}", group.model.revision or "") is not None
    if text is None or not (here or pinned):
        return None
    return [text, *sorted(path for path in model.iterdir() if path.is_file())]


def _model_facts(lm: LanguageModel) -> ModelFacts:
    shared = {name: getattr(lm.identity, name) for name in ModelFacts.model_fields if name != "d_model"}
    return ModelFacts(d_model=lm.d_model, **shared)
