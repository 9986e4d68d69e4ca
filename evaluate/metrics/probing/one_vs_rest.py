"""Sparse probes: a few features chosen for a class, and a logistic regression on them, by cross-validation over
documents.

Every class is asked for against the rest. In each of three folds the k features are chosen on the training documents
alone, by |mean of the class − mean of the rest| / σ, σ over all training samples: the order of the ANOVA F-statistic,
one of the selections of Gurnee et al. (arXiv 2305.01610); without σ it is the mean difference that SAEBench (arXiv
2503.09532) ranks by, which depends on how a dictionary scales its features. Then a logistic regression on the
standardised features, as scikit-learn's with class_weight "balanced". No document is in both parts of a fold, and each
is tested once.

Shapes: M samples, F features, C classes, G folds, D columns of dense inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...protocol import SumsByUnit, UnitSums
from ..active_entries import uniform_hash
from ..token_sample import SampledTokens
from .logistic import predictions

FOLDS = 3
MIN_POSITIVES = 5
"""Samples of a class that the training part of every fold must hold; classes with fewer are not asked for."""
NARROW = 32
"""Columns up to which all classes of a fold are fitted together; scikit-learn is as fast with more of them."""
TOGETHER = 32
"""Classes at most whose columns are in memory together."""
DENSE_C = 0.01
"""Inverse strength of the penalty where all dimensions are used, which a few hundred samples would else overfit."""


Columns = Callable[[int, int], np.ndarray | None]
"""(class, fold) → what its probe sees of every sample [M, k]; None where no feature tells anything, and the answer is
no.
"""


@dataclass(frozen=True)
class Question:
    """What class each sample is of, and how the samples are divided."""

    sample: SampledTokens
    class_M: np.ndarray  # int64
    fold_M: np.ndarray  # int64
    asked: list[int]
    by_document: bool
    """Whether all samples of a document are of one class."""

    @classmethod
    def of(cls, sample: SampledTokens, class_M: np.ndarray, by_document: bool) -> Question:
        """Divided by document."""
        fold_M = folds_of(sample.document_M.cpu().numpy(), class_M, by_class=by_document)
        return cls(sample, class_M, fold_M, classes_asked(class_M, fold_M), by_document)

    def permuted(self, seed: int) -> Question:
        """The same samples with the classes dealt out anew: over documents, or over samples."""
        generator = np.random.default_rng(seed)
        if not self.by_document:
            return Question.of(self.sample, generator.permutation(self.class_M), False)
        _, first_M, at_M = np.unique(self.sample.document_M.cpu().numpy(), return_index=True, return_inverse=True)
        return Question.of(self.sample, generator.permutation(self.class_M[first_M])[at_M], True)

    def answered(self, key: str, columns: Columns, penalty: float = 1.0) -> dict[str, UnitSums]:
        """Mean balanced accuracy over the classes as sums per unit of text; ``penalty`` is scikit-learn's C.

        A sample of a class weighs 1 / (2 · the class's samples), one of the rest 1 / (2 · the rest's), and every class
        the same.
        """
        if len(self.asked) < 2:
            return {}
        above_M, below_M = np.zeros(len(self.class_M)), np.zeros(len(self.class_M))
        is_CM = self.class_M == np.array(self.asked)[:, None]
        for is_M, says_M in zip(is_CM, self._says(is_CM, columns, penalty), strict=True):
            weight_M = np.where(is_M, 0.5 / is_M.sum(), 0.5 / (~is_M).sum()) / len(self.asked)
            above_M += weight_M * (says_M == is_M)
            below_M += weight_M
        by_unit = SumsByUnit()
        by_unit.add(self.sample.unit_M, above=torch.from_numpy(above_M), below=torch.from_numpy(below_M))
        return {key: replace(by_unit.ratio("above", "below", "share"), definition=key, n=len(self.class_M))}

    def _says(self, is_CM: np.ndarray, columns: Columns, penalty: float) -> np.ndarray:
        """What the probe of every class, trained on the other folds, says of every sample: bool [C, M]."""
        says_CM = np.zeros_like(is_CM)
        for fold in range(FOLDS):
            test_M = self.fold_M == fold
            if not test_M.any():
                continue
            for first in range(0, len(self.asked), TOGETHER):
                some = enumerate(self.asked[first : first + TOGETHER], first)
                seen = {at: x_MK for at, one in some if (x_MK := columns(one, fold)) is not None}
                if seen:
                    fitted = _narrow if max(x_MK.shape[1] for x_MK in seen.values()) <= NARROW else _wide
                    says_CM[np.ix_(list(seen), test_M)] = fitted(seen, is_CM, test_M, penalty)
        return says_CM


def _narrow(seen: Mapping[int, np.ndarray], is_CM: np.ndarray, test_M: np.ndarray, penalty: float) -> np.ndarray:
    """What probes of few columns say of the test samples: bool [classes seen, M of the test]."""
    width = max(x_MK.shape[1] for x_MK in seen.values())
    x_CMK = np.stack([np.pad(x_MK, ((0, 0), (0, width - x_MK.shape[1]))) for x_MK in seen.values()])
    return predictions(x_CMK[:, ~test_M], is_CM[list(seen)][:, ~test_M], x_CMK[:, test_M], penalty)


def _wide(seen: Mapping[int, np.ndarray], is_CM: np.ndarray, test_M: np.ndarray, penalty: float) -> np.ndarray:
    """The same of many columns, class by class."""
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    found = []
    # So small a problem is solved ten times as fast without threads, and checking it takes a fifth of the time.
    with threadpool_limits(1), config_context(assume_finite=True, skip_parameter_validation=True):
        for at, x_MK in seen.items():
            regression = LogisticRegression(C=penalty, class_weight="balanced", max_iter=1000)
            scaler = StandardScaler().fit(x_MK[~test_M])  # no pipeline, which takes as long as so small a fit
            regression.fit(scaler.transform(x_MK[~test_M]), is_CM[at, ~test_M])
            found.append(regression.predict(scaler.transform(x_MK[test_M])))
    return np.stack(found)


def folds_of(document_M: np.ndarray, class_M: np.ndarray, *, by_class: bool) -> np.ndarray:
    """The fold [M] in which a sample is tested: that of its document, by a hash of the document's number.

    ``by_class``: documents, each of one class, are dealt out class by class, so that every fold has some of each.
    """
    documents, first_M, at_M = np.unique(document_M, return_index=True, return_inverse=True)
    group = class_M[first_M] if by_class else np.zeros(len(documents))
    order = np.lexsort((uniform_hash(0, documents), group))
    fold = np.empty(len(documents), dtype=np.int64)
    fold[order] = np.arange(len(documents)) % FOLDS
    return fold[at_M]


def classes_asked(class_M: np.ndarray, fold_M: np.ndarray) -> list[int]:
    """The classes that the training part of every fold has enough of, and enough of the rest."""

    def enough(one: int) -> bool:
        return all(
            MIN_POSITIVES <= (class_M[fold_M != fold] == one).sum() <= (fold_M != fold).sum() - MIN_POSITIVES
            for fold in range(FOLDS)
        )

    return [one for one in np.unique(class_M).tolist() if enough(one)]


Ranking = dict[tuple[int, int], Tensor]
"""(class, fold) → the best features in its training part, best first: int64 [at most k]."""


def rank_features(
    sample: SampledTokens, class_M: np.ndarray, fold_M: np.ndarray, asked: Sequence[int], k: int
) -> Ranking:
    """Choose features from sums over the entries, without writing dense codes out. Shapes: F features of the sample.

    Scores are rounded to six digits and ties go to the smaller number, so that no rounding upstream decides.
    """
    device = sample.value_E.device
    slot_E, value_E = sample.slot_E.long(), sample.value_E.double()
    fold_G = torch.from_numpy(fold_M).to(device)
    features_F, column_E = torch.unique(sample.feature_E.long(), return_inverse=True)  # in rising order
    place_E = fold_G[slot_E] * len(features_F) + column_E

    def outside(weight_E: Tensor) -> list[Tensor]:
        """Sums per feature over the training part of every fold."""
        total = torch.zeros(FOLDS * len(features_F), dtype=torch.float64, device=device)
        of_fold = total.index_add_(0, place_E, weight_E).view(FOLDS, -1)
        return [of_fold.sum(0) - part for part in of_fold]

    totals, squares = outside(value_E), outside(value_E**2)
    best = {}
    for one in asked:
        is_M = torch.from_numpy(class_M == one).to(device)
        inside = outside(value_E * is_M[slot_E])
        for fold in range(FOLDS):
            train_M = fold_G != fold
            n, n_in = int(train_M.sum()), int((train_M & is_M).sum())
            total_F, square_F, inside_F = totals[fold], squares[fold], inside[fold]
            variance_F = square_F / n - (total_F / n) ** 2
            gap_F = (inside_F / n_in - (total_F - inside_F) / (n - n_in)).abs()
            score_F = torch.where(variance_F > 1e-12 * square_F / n, gap_F / variance_F.clamp(min=1e-300).sqrt(), 0.0)
            best[one, fold] = features_F[_best(score_F, k)]
    return best


def _best(score_F: Tensor, k: int) -> Tensor:
    """The places of the ``k`` highest scores above zero, best first; without sorting all of them."""
    rounded_F = (score_F * 1e6).round()
    least = rounded_F.topk(min(k, len(rounded_F))).values.min() if len(rounded_F) else 0.0
    place = ((rounded_F >= least) & (score_F > 0)).nonzero().squeeze(1)
    return place[torch.argsort(rounded_F[place], descending=True, stable=True)][:k]


def sparse_columns(sample: SampledTokens, ranking: Ranking) -> Callable[..., np.ndarray | None]:
    """What a probe for a class sees in a fold: (class, fold, k) → the codes [M, k] of the best k features."""
    every = torch.unique(torch.cat(list(ranking.values()))) if ranking else torch.zeros(0, dtype=torch.int64)
    found = sample.dense(every)[0].cpu().numpy()
    place = {feature: at for at, feature in enumerate(every.tolist())}

    def columns(one: int, fold: int, k: int) -> np.ndarray | None:
        chosen = [place[feature] for feature in ranking[one, fold][:k].tolist()]
        return found[:, chosen] if chosen else None

    return columns
