"""What a store of codes says of every feature: numbers, profiles, where it fires, which others fire with it.

One pass over the codes, kept beside them. The language model is not needed, and not even its tokenizer.

Shapes: R rows, T positions, N tokens, F features, E entries, K kept places, B bins, L lags, C neighbours.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...console import note, progress
from ...errors import RunError, TcsaeError
from ...train.sae.protocol import SparseAutoencoder
from ..codes.encode import weights_hash
from ..codes.store import CodeStore, RowCodes
from ..metrics.active_entries import ActiveEntries, Matches, PairMasks, matches, pair_masks, uniform_hash
from ..metrics.lag_correlation import XX, XY, YY, X, Y, autocorrelation
from ..metrics.position import eta_squared
from ..metrics.run_lengths import RunCounts, followed
from ..metrics.temporal import LAGS, MIN_ACTIVE
from .collect import RANDOM, STRONGEST

SURVEY = "values/survey.npz"
"""Where a survey is kept, inside the store of codes."""
BINS, BINS_PER_OCTAVE, LOWEST_OCTAVE = 64, 2, -12
"""Of the histogram of activations: bin b counts |z| from 2^(b/2 − 12) on; the first and the last take the rest."""
TOGETHER, NEIGHBOURS = 6, 6
_PAIRS = 20_000_000  # of entries on one token that co-activation is counted from
_ENTRIES_AT_ONCE = 200_000
_PAIRS_AT_ONCE = 4_000_000
_STRONGEST_OF_TOKEN = 128  # entries of a token that enter co-activation
_LEAST = 1e-6  # correlation of being active
_FEWEST = 3  # tokens that two features share, below which nothing is said

NUMBERS = {
    "density": "share of the tokens that count on which it is active",
    "max_activation": "its largest activation",
    "mean_activation": "mean activation where it is active",
    "lag1_autocorrelation": "correlation with itself one token later",
    "run_length": "mean number of tokens that it stays active",
    "eta_squared": "share of its variance that the position in the row explains (corrected for bias)",
    "neighbour_cosine": "cosine with the nearest other decoder row",
    "together": "correlation of being active with the feature that most often is so on the same tokens",
}
"""The numbers of every feature and what they mean; definitions are those of the evaluation (docs/METHOD.md)."""


@dataclass(frozen=True)
class Survey:
    """Everything known of F features from their codes. Undefined numbers are NaN, absent places row −1."""

    density_F: np.ndarray
    max_activation_F: np.ndarray
    mean_activation_F: np.ndarray
    eta_squared_F: np.ndarray
    run_length_F: np.ndarray
    position_mean_FT: np.ndarray
    lag_autocorrelation_FL: np.ndarray
    histogram_FB: np.ndarray
    """Tokens by activation; see :data:`BINS`."""
    strongest_FK: np.ndarray
    """Places row · T + position of the peaks in the rows where it fires most strongly, the strongest first; −1: none.
    """
    random_FK: np.ndarray
    """The same of rows drawn at random among those where it fires."""
    together_FC: np.ndarray
    """The features most often active on the same tokens, by correlation; −1: none."""
    together_value_FC: np.ndarray
    neighbour_FC: np.ndarray
    """The nearest other decoder rows."""
    neighbour_cosine_FC: np.ndarray
    n_tokens: int
    """Tokens that count."""
    pair_tokens: int
    """Tokens among them that co-activation was counted from."""

    @property
    def n_features(self) -> int:
        """F."""
        return len(self.density_F)

    def numbers(self) -> dict[str, np.ndarray]:
        """The numbers [F] of every feature, by the names of :data:`NUMBERS`."""
        known = {
            "density": self.density_F,
            "max_activation": self.max_activation_F,
            "mean_activation": self.mean_activation_F,
            "lag1_autocorrelation": self.lag_autocorrelation_FL[:, 0],
            "run_length": self.run_length_F,
            "eta_squared": self.eta_squared_F,
            "neighbour_cosine": self.neighbour_cosine_FC[:, 0],
            "together": self.together_value_FC[:, 0],
        }
        return {name: known[name] for name in NUMBERS}

    def known(self) -> dict[str, np.ndarray]:
        """The same with the curves, as cards take them."""
        curves = {"position_mean": self.position_mean_FT, "lag_autocorrelation": self.lag_autocorrelation_FL}
        return self.numbers() | curves


def survey(codes: CodeStore, run: str) -> Survey:
    """What is known of every feature; kept beside the codes, and taken from there if it is of these codes.

    Args:
        codes: of the run.
        run: folder of the run, whose decoder says which features are neighbours.

    Raises:
        RunError: the codes are those of another SAE.
        StoreError: the codes are damaged.

    """
    if weights_hash(run) != codes.manifest.weights:
        raise RunError(
            f"{codes.path} holds the codes of another SAE than {run} (its weights have changed): encode again with "
            "`pipeline encode --fresh`"
        )
    kept = _kept(codes)
    if kept is not None:
        return kept
    if not codes.n_rows:
        raise RunError(f"{codes.path} holds no rows: encode some first")
    found = _Pass(codes, SparseAutoencoder.load(run)).run()
    _keep(codes, found)
    return found


def _keep(codes: CodeStore, found: Survey) -> None:
    file = io.BytesIO()
    plain: dict[str, Any] = {field.name: np.asarray(getattr(found, field.name)) for field in fields(Survey)}
    np.savez_compressed(file, fingerprint=np.array(codes.fingerprint()), **plain)
    try:
        codes.place.replace(SURVEY, file.getvalue())
    except (OSError, TcsaeError) as problem:
        note(f"what was found of {codes.path} is not kept: {problem}")


def _kept(codes: CodeStore) -> Survey | None:
    """The kept survey if it is undamaged and of these codes."""
    try:
        with np.load(io.BytesIO(codes.place.read(SURVEY)), allow_pickle=False) as file:
            if str(file["fingerprint"]) != codes.fingerprint():
                return None
            plain: dict[str, Any] = {field.name: file[field.name] for field in fields(Survey)}
    except (OSError, ValueError, KeyError, TcsaeError, EOFError):
        return None
    except Exception as damage:  # whatever zipfile makes of a damaged file: it is computed again
        note(f"{codes.path}/{SURVEY} cannot be read ({type(damage).__name__}): computing it again")
        return None
    plain |= {name: int(plain[name]) for name in ("n_tokens", "pair_tokens")}
    return Survey(**plain)


class _Pass:
    """One pass over the codes."""

    def __init__(self, codes: CodeStore, sae: SparseAutoencoder):
        self._codes, size, context = codes, codes.n_features, codes.context
        self._w_dec_FD = sae.token_coder().W_dec.detach().float()
        cpu = torch.device("cpu")
        self._position_sum_FT, self._tokens_T = np.zeros((size, context)), np.zeros(context)
        self._square_F = np.zeros(size)  # of all positions but the first
        self._lag_sums_SFL = np.zeros((5, size, min(LAGS, context - 1)))
        self._pairs_L = np.zeros(min(LAGS, context - 1))
        self._runs = RunCounts(size, context, cpu)
        self._count_F, self._sum_F = np.zeros(size), np.zeros(size)
        self._max_F = np.full(size, -np.inf)
        self._histogram_FB = np.zeros((size, BINS), np.int64)
        self._strongest, self._random = _Places(size, STRONGEST), _Places(size, RANDOM)
        self._together = _Together(size, _share_of_tokens(codes))
        self._n_tokens = 0

    def run(self) -> Survey:
        """Everything."""
        codes = self._codes
        with progress("features", codes.n_rows * codes.context) as bar:
            for part in codes:
                for piece in pieces_of(part):
                    self._take(piece)
                    bar.advance(piece.tokens_RT.size)
        return self._result()

    def _take(self, part: RowCodes) -> None:
        context, token_E, feature_E = self._codes.context, part.entry_tokens, part.feature_E
        value_E = part.value_E.astype(np.float64)
        self._n_tokens += int(part.valid.sum())
        self._count_F += np.bincount(feature_E, minlength=len(self._count_F))
        self._sum_F += np.bincount(feature_E, value_E, minlength=len(self._count_F))
        np.maximum.at(self._max_F, feature_E, value_E)
        octave_E = np.log2(np.maximum(np.abs(value_E), 2.0**LOWEST_OCTAVE)) - LOWEST_OCTAVE
        bin_E = np.minimum((octave_E * BINS_PER_OCTAVE).astype(np.int64), BINS - 1)
        np.add.at(self._histogram_FB, (feature_E, bin_E), 1)
        position_E = token_E % context
        np.add.at(self._position_sum_FT, (feature_E, position_E), value_E)
        self._square_F += np.bincount(feature_E, value_E**2 * (position_E > 0), minlength=len(self._count_F))
        self._tokens_T += part.valid.sum(0)
        place_E = token_E + part.first_row * context
        row_E = place_E // context
        self._strongest.add(feature_E, value_E, row_E, place_E)
        feature_P, _, row_P, place_P = _peaks(feature_E, value_E, row_E, place_E)
        self._random.add(feature_P, uniform_hash(1, feature_P.astype(np.int64), row_P), row_P, place_P)
        self._together.add(place_E, feature_E, part.value_E)
        self._over_time(part)

    def _over_time(self, part: RowCodes) -> None:
        valid_RT = torch.from_numpy(part.valid)
        rows, context = valid_RT.shape
        active = entries_of(part, self._codes.n_features)
        documents_RT = torch.from_numpy(part.documents_RT.astype(np.int64))
        masks = pair_masks(valid_RT, documents_RT, len(self._pairs_L))
        found = matches(active, masks)
        self._add_lags(active, masks, found)
        group_N = torch.zeros(rows * context, dtype=torch.int64)
        self._runs.update(active, masks, group_N, *followed(active, found))

    def _add_lags(self, active: ActiveEntries, masks: PairMasks, found: Matches) -> None:
        """The sums of :mod:`~tcsae.evaluate.metrics.lag_correlation`, of all tokens together."""
        size, (feature_E, token_E, value_E) = self._codes.n_features, _arrays(active)
        lag_M, earlier_M, later_M = found.lag_M.numpy(), found.earlier_M.numpy(), found.later_M.numpy()
        product_M = value_E[earlier_M] * value_E[later_M]
        for lag in range(1, len(self._pairs_L) + 1):
            self._pairs_L[lag - 1] += int(masks.earlier_LN[lag].sum())
            mine = lag_M == lag
            sums_FL = self._lag_sums_SFL[:, :, lag - 1]
            sums_FL[XY] += np.bincount(feature_E[earlier_M[mine]], product_M[mine], size)
            for plain, squared, ends_N in ((X, XX, masks.earlier_LN[lag]), (Y, YY, masks.later_LN[lag])):
                at = ends_N.numpy()[token_E]
                feature, value = feature_E[at], value_E[at]
                sums_FL[plain] += np.bincount(feature, value, size)
                sums_FL[squared] += np.bincount(feature, value**2, size)

    def _result(self) -> Survey:
        sums = (self._position_sum_FT[:, 1:], self._square_F, self._tokens_T[1:])  # as in the evaluation
        eta_F = eta_squared(*(torch.from_numpy(each) for each in sums)).numpy()
        alive_F = self._count_F > 0
        chances_F, ends_F = (each.sum(0).numpy() for each in (self._runs.chances_GF, self._runs.ends_GF))
        enough_F = (self._count_F >= MIN_ACTIVE) & (ends_F > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_F = self._sum_F / self._count_F
            position_mean_FT = self._position_sum_FT / self._tokens_T
            run_F = np.where(enough_F, chances_F / ends_F, np.nan)
        lags = autocorrelation(torch.from_numpy(self._pairs_L), torch.from_numpy(self._lag_sums_SFL), centred=True)
        neighbour_FC, cosine_FC = nearest_rows(self._w_dec_FD, self._w_dec_FD, NEIGHBOURS, same=True)
        together_FC, value_FC = self._together.strongest(TOGETHER)
        single = np.float32
        return Survey(
            density_F=(self._count_F / max(self._n_tokens, 1)).astype(single),
            max_activation_F=np.where(alive_F, self._max_F, np.nan).astype(single),
            mean_activation_F=mean_F.astype(single),
            eta_squared_F=eta_F.astype(single),
            run_length_F=run_F.astype(single),
            position_mean_FT=position_mean_FT.astype(single),
            lag_autocorrelation_FL=lags.numpy().astype(single),
            histogram_FB=self._histogram_FB.astype(np.int32),
            strongest_FK=self._strongest.places(),
            random_FK=self._random.places(),
            together_FC=together_FC,
            together_value_FC=value_FC,
            neighbour_FC=neighbour_FC,
            neighbour_cosine_FC=cosine_FC,
            n_tokens=self._n_tokens,
            pair_tokens=self._together.n_tokens,
        )


def _arrays(active: ActiveEntries) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return active.feature_E.numpy(), active.token_E.numpy(), active.value_E.numpy()


def entries_of(part: RowCodes, n_features: int) -> ActiveEntries:
    """The codes as the evaluation's own measures take them: by feature, then token."""
    rows, context = part.tokens_RT.shape
    order = np.argsort(part.feature_E, kind="stable")
    return ActiveEntries(
        torch.zeros(rows, context, 0),
        rows,
        context,
        n_features,
        torch.from_numpy(part.valid).reshape(-1),
        torch.from_numpy(part.feature_E[order].astype(np.int64)),
        torch.from_numpy(part.entry_tokens[order]),
        torch.from_numpy(part.value_E[order].astype(np.float64)),
    )


def pieces_of(part: RowCodes) -> list[RowCodes]:
    """A part in runs of rows of bounded size."""
    rows = len(part.tokens_RT)
    step = max(1, int(rows * _ENTRIES_AT_ONCE / max(len(part.value_E), 1)))
    return [part.rows(start, min(start + step, rows)) for start in range(0, rows, step)]


def _share_of_tokens(codes: CodeStore) -> float:
    """The share of tokens whose pairs of entries are as many as are counted."""
    per_token = min(codes.n_entries / max(codes.n_rows * codes.context, 1), _STRONGEST_OF_TOKEN)
    pairs = codes.n_rows * codes.context * per_token**2 / 2
    return min(1.0, _PAIRS / max(pairs, 1.0))


def _peaks(
    feature_E: np.ndarray, value_E: np.ndarray, row_E: np.ndarray, place_E: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of every feature in every row the entry of the largest positive activation: [P] each."""
    fires = value_E > 0
    feature_E, value_E, row_E, place_E = (each[fires] for each in (feature_E, value_E, row_E, place_E))
    order = np.lexsort((place_E, -value_E, row_E, feature_E))
    feature, row = feature_E[order], row_E[order]
    first = np.ones(len(order), bool)
    first[1:] = (feature[1:] != feature[:-1]) | (row[1:] != row[:-1])
    chosen = order[first]
    return feature_E[chosen], value_E[chosen], row_E[chosen], place_E[chosen]


class _Places:
    """Per feature the K rows of highest score, with the place of the peak in each."""

    def __init__(self, n_features: int, keep: int):
        self._n, self._keep = n_features, keep
        self._feature, self._place = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._score = np.zeros(0)

    def add(self, feature_E: np.ndarray, score_E: np.ndarray, row_E: np.ndarray, place_E: np.ndarray) -> None:
        """Take entries in; of a feature in a row the one of the highest score counts."""
        feature_P, score_P, _, place_P = _peaks(feature_E, score_E, row_E, place_E)
        feature = np.concatenate([self._feature, feature_P])
        score, place = np.concatenate([self._score, score_P]), np.concatenate([self._place, place_P])
        order = np.lexsort((place, -score, feature))
        keep = order[_rank(feature[order]) < self._keep]
        self._feature, self._score, self._place = feature[keep], score[keep], place[keep]

    def places(self) -> np.ndarray:
        """The places [F, K], best first; −1: none."""
        out = np.full((self._n, self._keep), -1, np.int64)
        out[self._feature, _rank(self._feature)] = self._place
        return out


def _rank(group: np.ndarray) -> np.ndarray:
    """Number of every item within its group, of items sorted by group."""
    at = np.arange(len(group))
    starts = np.ones(len(group), bool)
    starts[1:] = group[1:] != group[:-1]
    return at - np.maximum.accumulate(np.where(starts, at, 0))


class _Together:
    """How often two features are active on the same token, from a share of the tokens."""

    def __init__(self, n_features: int, share: float):
        self._n, self._share = n_features, share
        self._key, self._both = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._new: list[np.ndarray] = []  # pairs that are not counted yet
        self._count_F = np.zeros(n_features)
        self.n_tokens = 0

    def add(self, place_E: np.ndarray, feature_E: np.ndarray, value_E: np.ndarray) -> None:
        """Take entries in, sorted by token, then feature."""
        chosen = uniform_hash(2, place_E) < self._share
        place, feature, value = place_E[chosen], feature_E[chosen].astype(np.int64), value_E[chosen]
        order = np.lexsort((-np.abs(value), place))
        keep = np.sort(order[_rank(place[order]) < _STRONGEST_OF_TOKEN])
        place, feature = place[keep], feature[keep]
        self.n_tokens += len(np.unique(place))
        self._count_F += np.bincount(feature, minlength=self._n)
        keys = []
        for shift in range(1, _STRONGEST_OF_TOKEN):
            same = place[shift:] == place[:-shift]
            if not same.any():
                break
            keys.append(feature[:-shift][same] * self._n + feature[shift:][same])
        self._new += keys
        if sum(map(len, self._new)) > max(_PAIRS_AT_ONCE, len(self._key)):  # to sort the known ones again is the cost
            self._count()

    def _count(self) -> None:
        """Count the new pairs among the known ones."""
        if self._new:
            key, both = np.unique(np.concatenate([*self._new, self._key]), return_inverse=True)
            weight = np.concatenate([np.ones(sum(map(len, self._new)), np.int64), self._both])
            self._key, self._both, self._new = key, np.bincount(both, weight).astype(np.int64), []

    def strongest(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The n features of the highest correlation (phi) of being active with each: numbers, values [F, n]."""
        self._count()
        keep = self._both >= _FEWEST
        a, b, both = self._key[keep] // self._n, self._key[keep] % self._n, self._both[keep].astype(np.float64)
        total = max(self.n_tokens, 1)
        p, q = self._count_F[a] / total, self._count_F[b] / total
        with np.errstate(invalid="ignore", divide="ignore"):
            phi = (both / total - p * q) / np.sqrt(p * (1 - p) * q * (1 - q))
        phi = np.where(np.isfinite(phi), phi, -1.0)
        one, other, value = np.concatenate([a, b]), np.concatenate([b, a]), np.concatenate([phi, phi])
        order = np.lexsort((other, -value, one))
        one, other, value = one[order], other[order], value[order]
        rank = _rank(one)
        first = (rank < n) & (value > _LEAST)
        numbers, values = np.full((self._n, n), -1, np.int32), np.full((self._n, n), np.nan, np.float32)
        numbers[one[first], rank[first]], values[one[first], rank[first]] = other[first], value[first]
        return numbers, values


def nearest_rows(rows_FD: Tensor, others_GD: Tensor, n: int, *, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The n rows of ``others_GD`` of the highest cosine with each of ``rows_FD``: numbers and cosines [F, n].

    Args:
        rows_FD: decoder rows.
        others_GD: what is compared with; shorter lists end in −1 and NaN.
        n: how many.
        same: both are the same rows, and a row is not its own neighbour.

    """
    unit_GD = torch.nn.functional.normalize(others_GD.float(), dim=1)
    numbers = np.full((len(rows_FD), n), -1, np.int32)
    cosines = np.full((len(rows_FD), n), np.nan, np.float32)
    taken = min(n, len(others_GD) - int(same))
    if taken < 1:
        return numbers, cosines
    for start in range(0, len(rows_FD), 1024):
        cosine = torch.nn.functional.normalize(rows_FD[start : start + 1024].float(), dim=1) @ unit_GD.T
        if same:
            at = torch.arange(len(cosine))
            cosine[at, at + start] = -torch.inf
        best, which = cosine.topk(taken, dim=1)
        numbers[start : start + len(cosine), :taken] = which.numpy()
        cosines[start : start + len(cosine), :taken] = best.numpy()
    return numbers, cosines


def order_of(found: Mapping[str, np.ndarray], name: str, *, up: bool = False) -> np.ndarray:
    """Feature numbers by one of their numbers, largest first (``up``: smallest); undefined ones last."""
    values_F = found[name]
    order = np.argsort(np.where(np.isfinite(values_F), values_F if up else -values_F, np.inf), kind="stable")
    return order
