"""Sparse probes over codes that are written: what a few features tell of a document's label, of a token's class or of
its position, without the language model. Method and samples are those of the evaluation
(:mod:`~tcsae.evaluate.metrics.probing.sparse_probes`); the text is that of the codes.

Shapes: R rows, T positions, M samples, F features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...cache.store import ActivationStore
from ...console import progress
from ...errors import StoreError, UsageError, needs
from ...extract.config import TextSource
from ...extract.text.open import open_documents
from ..codes.beside_report import document_labels
from ..codes.format import OUTLIER
from ..codes.store import CodeStore, RowCodes
from ..intervals.bootstrap import Resampler
from ..metrics.probing.one_vs_rest import FOLDS, Question, rank_features, sparse_columns
from ..metrics.probing.passages import pooled
from ..metrics.probing.sparse_probes import BUCKETS, KS, PASSAGES, TARGETS, TOKENS
from ..metrics.token_sample import SampledTokens, TokenSample
from ..model.heldout_text import number_units
from ..model.stored_vectors import StoredVectors
from ..model.token_text import TOKEN_CLASSES, token_class
from ..protocol import TokenBatch
from ..results import Metric
from .look import TokenTexts
from .survey import entries_of, pieces_of

QUESTIONS = {
    "label": "topic_passage",
    "label_token": "topic_token",
    "token_class": "token_class",
    "position": "position",
}
"""What can be asked, and what the evaluation calls it."""
FEATURES_SHOWN = 5


@dataclass(frozen=True)
class ProbeFindings:
    """What probes found."""

    asked: str
    text: str
    """What is looked for, in words."""
    accuracy: dict[int, Metric]
    """Balanced accuracy by number of features; 0.5 is chance."""
    permuted: Metric | None
    """The same with the classes permuted, at the largest number of features: must be at chance."""
    n_samples: int
    n_documents: int
    features: dict[str, list[tuple[int, int]]]
    """Class → (feature, in how many folds it was among the best), the most often chosen first."""

    def facts(self) -> dict[str, object]:
        """For machines."""

        def plain(metric: Metric | None) -> dict[str, float | None] | None:
            return None if metric is None else {"value": metric.value, "low": metric.low, "high": metric.high}

        return {
            "asked": self.asked,
            "samples": self.n_samples,
            "documents": self.n_documents,
            "accuracy": {str(k): plain(metric) for k, metric in self.accuracy.items()},
            "permuted": plain(self.permuted),
            "features": {name: [list(pair) for pair in pairs] for name, pairs in self.features.items()},
        }


def probe(codes: CodeStore, asked: str, *, seed: int | None = None) -> ProbeFindings:
    """Ask k = 1, 5 and 20 features about each class against the rest, by cross-validation over documents.

    Args:
        codes: of a run.
        asked: label (of passages), label_token, token_class or position.
        seed: of the samples and of the permutation; None: that of the evaluation that kept the codes, else 0.

    Raises:
        UsageError: no such question, or the text has too few documents or no labels.
        TextError: the text of the codes cannot be read for its labels.
        StoreError: the codes are damaged.

    """
    if asked not in QUESTIONS:
        raise UsageError(f"there is no probe '{asked}': choose one of {', '.join(QUESTIONS)}")
    needs("sklearn", extra="study", what="--probe")
    target = TARGETS[QUESTIONS[asked]]
    seed = codes.manifest.seed if seed is None else seed
    sample, unit_documents = _sample(codes, pooled_rows=target.pooled, seed=seed)
    class_M, names = _classes(codes, asked, sample)
    known = torch.from_numpy(np.flatnonzero(class_M >= 0))
    question = Question.of(sample.keep(known), class_M[known.numpy()], target.by_document)
    if len(question.asked) < 2:
        of_label = asked.startswith("label")
        why = "its text has no labels, or too few documents of each" if of_label else "there is too little text"
        raise UsageError(f"{codes.path} cannot be asked for the {asked.replace('_', ' ')}: {why}")
    resampler = Resampler.of(unit_documents, seed)
    ranking = rank_features(question.sample, question.class_M, question.fold_M, question.asked, max(KS))
    columns, accuracy = sparse_columns(question.sample, ranking), {}
    for k in KS:
        accuracy[k] = resampler.metric(question.answered("accuracy", partial(columns, k=k))["accuracy"])
    control = question.permuted(seed)
    of_control = rank_features(control.sample, control.class_M, control.fold_M, control.asked, max(KS))
    found = control.answered("accuracy", partial(sparse_columns(control.sample, of_control), k=max(KS)))
    return ProbeFindings(
        asked=asked,
        text=target.text,
        accuracy=accuracy,
        permuted=resampler.metric(found["accuracy"]) if found else None,
        n_samples=len(question.class_M),
        n_documents=len(np.unique(question.sample.document_M.numpy())),
        features={names[one]: _chosen(ranking, one) for one in question.asked},
    )


def _chosen(ranking: Mapping[tuple[int, int], Tensor], one: int) -> list[tuple[int, int]]:
    """The features of a class, by the number of folds that chose them among their best, then by rank."""
    best = [ranking[one, fold][:FEATURES_SHOWN].tolist() for fold in range(FOLDS)]
    counts = Counter(feature for each in best for feature in each)
    ranks = {f: min(each.index(f) for each in best if f in each) for f in counts}
    order = sorted(counts, key=lambda feature: (-counts[feature], ranks[feature], feature))
    return [(feature, counts[feature]) for feature in order[:FEATURES_SHOWN]]


def _sample(codes: CodeStore, *, pooled_rows: bool, seed: int) -> tuple[SampledTokens, np.ndarray]:
    """Tokens, or passages as if each were one token, and the document of every unit.

    Units are documents; of codes that an evaluation kept they are its own.
    """
    cpu, of_evaluation = torch.device("cpu"), codes.manifest.kept_by == "evaluate"
    sample = TokenSample(PASSAGES if pooled_rows else TOKENS, 0, seed, cpu)
    documents: list[np.ndarray] = []
    real: list[np.ndarray] = []
    with progress("probe", codes.n_rows * codes.context) as bar:
        for part in codes:
            if of_evaluation:
                documents.append(part.documents_RT.astype(np.int64))
                real.append((part.flags_RT & ~np.uint8(OUTLIER)) == 0)
            for piece in pieces_of(part):
                batch, active = _batch(piece), entries_of(piece, codes.n_features)
                sample.update(*(pooled(batch, active) if pooled_rows else (batch, active)))
                bar.advance(piece.tokens_RT.size)
    found = sample.taken()
    if of_evaluation:
        units_RT, unit_documents = number_units(np.concatenate(documents), np.concatenate(real))
        unit_M = units_RT[found.row_M.numpy(), found.position_M.numpy()]
    else:
        unit_documents, unit_M = np.unique(found.document_M.numpy(), return_inverse=True)
    return replace(found, unit_M=torch.from_numpy(unit_M)), unit_documents


def _batch(part: RowCodes) -> TokenBatch:
    documents, valid = torch.from_numpy(part.documents_RT.astype(np.int64)), torch.from_numpy(part.valid)
    unknown = torch.full_like(documents, -1)
    return TokenBatch(
        x_BTD=torch.zeros(*valid.shape, 0),
        tokens_BT=torch.from_numpy(part.tokens_RT.astype(np.int64)),
        documents_BT=documents,
        units_BT=documents,
        valid_BT=valid,
        real_BT=valid,
        rows_B=torch.arange(part.first_row, part.first_row + len(valid)),
        labels_BT=unknown,
        classes_BT=unknown,
    )


def _classes(codes: CodeStore, asked: str, sample: SampledTokens) -> tuple[np.ndarray, list[str]]:
    """The class of every sample, int64 [M], −1 where it has none; and what classes are called."""
    if asked == "position":
        width = codes.context / BUCKETS
        names = [f"positions {round(at * width)} to {round((at + 1) * width) - 1}" for at in range(BUCKETS)]
        return (sample.position_M.numpy() * BUCKETS) // codes.context, names
    if asked == "token_class":
        text = TokenTexts(codes)
        different, at_M = np.unique(sample.token_M.numpy(), return_inverse=True)
        return np.array([token_class(text(int(token))) for token in different])[at_M], list(TOKEN_CLASSES)
    documents, at_M = np.unique(sample.document_M.numpy(), return_inverse=True)
    labels = labels_of(codes, documents)
    names = sorted({name for name in labels.values() if name is not None})
    number = {name: at for at, name in enumerate(names)}
    return np.array([number.get(labels[int(one)] or "", -1) for one in documents], dtype=np.int64)[at_M], names


def labels_of(codes: CodeStore, documents: np.ndarray) -> dict[int, str | None]:
    """The labels of documents: kept with the codes, from the text they are of, or from the store of vectors.

    Raises:
        TextError: the text cannot be read.
        StoreError: it is another text now, or the store is gone.

    """
    manifest = codes.manifest
    if manifest.kept_by == "evaluate":
        labels = document_labels(codes)
        return {int(one): labels.get(int(one)) for one in documents}
    known = manifest.of_store.text
    if not manifest.of_store.of_language_model:
        vectors = StoredVectors(ActivationStore.open(manifest.store), torch.device("cpu"))
        return {int(one): vectors.label(int(one)) for one in documents}
    source = TextSource(
        dataset=known.dataset,
        split=known.split,
        text_column=known.text_column,
        label_column=known.label_column,
        chat_template=known.chat_template,
        packing=known.packing,
        context=known.context,
        seed=known.seed,
        held_out=known.held_out,
    )
    text = open_documents(source)
    if not known.fingerprint.startswith(text.fingerprint):
        raise StoreError(f"{known.dataset} is not the text that {codes.path} is of: its labels cannot be read from it")
    wanted, found = set(map(int, documents)), {}
    for number, _ in text.read(min(wanted, default=0)):
        if number in wanted:
            found[number] = text.label(number)
        if len(found) == len(wanted):
            break
    return {one: found.get(one) for one in wanted}
