"""What k features tell of a document's topic, of a token's class and of its position. See :mod:`one_vs_rest`.

Shapes: M samples, F features, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ....train.sae.protocol import SparseCoder
from ...model.token_text import TOKEN_CLASSES
from ...protocol import Findings, RawActivations, State, TokenBatch
from ...results import Definition
from ..active_entries import ActiveEntries
from ..registry import metric
from ..token_sample import SampledTokens, TokenSample
from .one_vs_rest import DENSE_C, FOLDS, Columns, Question, rank_features, sparse_columns
from .passages import MIN_TOKENS, pooled

KS = (1, 5, 20)
PASSAGES = 1000
TOKENS = 3000
BUCKETS = 8


@dataclass(frozen=True)
class Target:
    """What a probe looks for."""

    text: str
    """As its definition says it."""
    label: str
    better: Literal["lower", "higher"]
    pooled: bool = False
    """Whether it is asked of passages, otherwise of tokens."""
    by_document: bool = False
    """Whether all tokens of a document are of one class."""


_TOPIC = "the document's label (the first folder of its file, or the column of labels)"
_PASSAGES = (
    f"from codes averaged over a passage, a row of one document with at least {MIN_TOKENS} tokens that count; at most "
    f"{PASSAGES:,} passages"
)
_TOKENS = f"from the code of a single token; at most {TOKENS:,} tokens"
TARGETS = {
    "topic_passage": Target(
        f"{_TOPIC}, {_PASSAGES}", "topic of a passage", better="higher", pooled=True, by_document=True
    ),
    "topic_token": Target(f"{_TOPIC}, {_TOKENS}", "topic of a token", better="higher", by_document=True),
    "token_class": Target(
        f"the class of the token's own text ({', '.join(TOKEN_CLASSES)}), {_TOKENS}", "token class", better="higher"
    ),
    "position": Target(
        f"in which of {BUCKETS} equal parts of the row a token stands, {_TOKENS}. Features that do not depend on the "
        "position leave it at 0.5",
        "position",
        better="lower",
    ),
}

_HOW = (
    "balanced accuracy of a logistic regression, one class against the rest, mean over classes: 0.5 is chance, or "
    f"always the same answer; {FOLDS} folds over documents, each document in one part of a fold only"
)


def _definitions() -> dict[str, Definition]:
    found = {}
    for name, target in TARGETS.items():
        for k in KS:
            features = f"{k} feature{'s' if k > 1 else ''}"
            found[f"probe_{name}_k{k}"] = Definition(
                text=f"{_HOW}. Looks for {target.text}. Sees {features}, chosen for each class on the training "
                "documents by |difference of means| / standard deviation",
                unit="share",
                better=target.better,
                label=f"{target.label}, k = {k}",
                group="probes" if k == KS[-1] else "",
            )
        found[f"probe_{name}_permuted"] = Definition(
            text=f"probe_{name}_k{KS[-1]} with the classes permuted over "
            f"{'documents' if target.by_document else 'tokens'}: a live control, which must be at chance, 0.5",
            unit="share",
            label=f"{target.label}, permuted",
        )
    return found


def _ceilings() -> dict[str, Definition]:
    return {
        f"probe_activation_{name}": Definition(
            text=f"{_HOW}. Looks for {target.text}. Sees all dimensions of the raw activation in place of features: "
            "the ceiling",
            unit="share",
            better=target.better,
            label=f"{target.label}, raw activations",
        )
        for name, target in TARGETS.items()
    }


class _Probes:
    """A sample of passages and one of tokens, and what is asked of them.

    Args:
        d_model: width of the activations that are kept; 0 keeps codes alone.
        context: positions of a row.
        seed: of the samples and the permutations.
        device: of the batches.

    """

    needs = ("sklearn", "study")

    def __init__(self, d_model: int, context: int, seed: int, device: torch.device):
        self._context, self._seed = context, seed
        self._tokens = TokenSample(TOKENS, d_model, seed, device)
        self._passages = TokenSample(PASSAGES, d_model, seed, device)

    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:  # noqa: ARG002
        """Take one batch in."""
        self._tokens.update(batch, active)
        self._passages.update(*pooled(batch, active))

    def state(self) -> State:
        """What it holds."""
        return {"tokens": self._tokens.state(), "passages": self._passages.state()}

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        self._tokens.merge(later["tokens"])
        self._passages.merge(later["passages"])

    def _questions(self) -> Iterator[tuple[str, Question]]:
        """Every target that this text has classes for."""
        for name, target in TARGETS.items():
            sample = (self._passages if target.pooled else self._tokens).taken()
            class_M = _classes(name, sample, self._context)
            known = class_M >= 0
            sample = sample.keep(known.nonzero().squeeze(1))
            question = Question.of(sample, class_M[known].cpu().numpy(), target.by_document)
            if len(question.asked) > 1:
                yield name, question


def _left_out(asked: Collection[str]) -> list[str]:
    return [f"no probe for the {TARGETS[name].label}: {why}" for name, why in _WHY.items() if name not in asked]


_WHY = {
    "topic_passage": "the text has no labels, or too few documents of each",
    "token_class": "there is too little text",
    "position": "there is too little text",
}


@metric("sparse_probes")
class SparseProbes(_Probes):
    """Probes that see k features."""

    definitions = _definitions() | _ceilings()
    by_part = tuple(f"probe_{name}_k{KS[-1]}" for name in TARGETS)

    def __init__(self, sae: SparseCoder, *, context: int, seed: int):
        super().__init__(0, context, seed, sae.W_dec.device)

    def result(self) -> Findings:
        """Accuracies for every target and k, and the control."""
        asked = dict(self._questions())
        found = Findings(notes=_left_out(asked))
        for name, question in asked.items():
            columns = self._columns(question)
            for k in KS:
                found.sums |= question.answered(f"probe_{name}_k{k}", partial(columns, k=k))
            control = question.permuted(self._seed)
            found.sums |= control.answered(f"probe_{name}_permuted", partial(self._columns(control), k=KS[-1]))
        return found

    def _columns(self, question: Question) -> Callable[..., np.ndarray | None]:
        ranking = rank_features(question.sample, question.class_M, question.fold_M, question.asked, KS[-1])
        return sparse_columns(question.sample, ranking)

    class OfActivations(_Probes):
        """Probes that see the whole activation: how well the best of codes could do."""

        definitions = _ceilings()

        def __init__(self, activations: RawActivations, *, context: int, seed: int):
            super().__init__(activations.d_model, context, seed, activations.device)

        def result(self) -> Findings:
            """Accuracies for every target."""
            found = Findings()
            for name, question in self._questions():
                columns = _always(question.sample.x_MD.cpu().numpy())
                found.sums |= question.answered(f"probe_activation_{name}", columns, penalty=DENSE_C)
            return found


def _always(x_MD: np.ndarray) -> Columns:
    return lambda *_: x_MD


def _classes(name: str, sample: SampledTokens, context: int) -> Tensor:
    """What is asked of every sample: int64 [M], −1 where it has no class."""
    if name == "token_class":
        return sample.class_M
    if name == "position":
        return (sample.position_M * BUCKETS).div(context, rounding_mode="floor")
    return sample.label_M
