"""Does a feature depend on the position, or does it only fire in bursts? A null distribution from rotated rows.

Shapes: F features, P rotated positions (1 … T − 1; position 0 stays out), R rotations, E stored entries, C features of
a chunk.

A replicate rotates positions 1 … T − 1 of every row by an offset of the row's own: documents, runs and values stay,
only their alignment to the position goes. The statistic is the between-position sum of squares Σ_p D_p² / n_p with D_p
= Σ (z − z̄) at position p; the total sum of squares is the same in every replicate, so this orders replicates as η²
does.

Memory: rotating all text would cost R·F·P sums. Instead every feature keeps the entries of a random subset of rows,
halved whenever it holds more than ``2·events`` of them (yet never below ``min_rows`` rows): O(F·T) in all, and a byte
per row of text. The test is exact on what is kept. Features are compared with a pooled null: each feature's replicates
are standardised by its own mean and deviation and pooled with those of features about as active. So a few hundred
rotations of thousands of features resolve the p-values that a false-discovery rate needs; beyond the pool's largest
values a gamma tail fitted to it is used.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..protocol import State, TokenBatch
from .active_entries import ActiveEntries, uniform_hash

ROTATIONS = 200
MIN_ROWS = 10
"""Rows a feature must be active in to be tested: with fewer, too few rotations differ."""
MIN_EVENTS = 20
_POOL = 100  # features a stratum should hold
_CHUNK = 32_768  # sums that are computed side by side; up to so many torch uses one thread
_TAIL = 25  # exceedances below which the fitted tail replaces counting


class RotationSample:
    """The entries of every feature in its random subset of rows, bounded per feature."""

    def __init__(self, n_features: int, context: int, seed: int, *, events: int | None = None, min_rows: int = 32):
        self._positions, self._seed, self._min_rows = context - 1, seed, min_rows
        self._events = 4 * context if events is None else events
        self.level_F = np.zeros(n_features, dtype=np.int8)  # a feature keeps the rows whose own level is at least this
        self._kept: list[np.ndarray] = [np.zeros(0, dtype=kind) for kind in (np.int32, np.int32, np.int16, np.float32)]
        self._row_level = np.zeros(0, dtype=np.int8)
        self._uncounted_row, self._uncounted_position = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)

    def update(self, batch: TokenBatch, active: ActiveEntries) -> None:
        """Take one batch in."""
        first_row = len(self._row_level)
        level_B = _levels(uniform_hash(self._seed, batch.rows_B.cpu().numpy()))
        self._row_level = np.concatenate([self._row_level, level_B])
        row, position = (~batch.valid_BT[:, 1:]).nonzero(as_tuple=True)
        self._uncounted_row = np.concatenate([self._uncounted_row, row.cpu().numpy() + first_row])
        self._uncounted_position = np.concatenate([self._uncounted_position, position.cpu().numpy()])
        feature, row = active.feature_E.cpu().numpy(), active.rows().cpu().numpy()
        position = active.positions().cpu().numpy()
        keep = (position > 0) & (level_B[row] >= self.level_F[feature])
        new = (feature[keep], row[keep] + first_row, position[keep] - 1, active.value_E.cpu().numpy()[keep])
        self._kept = [np.concatenate([old, more.astype(old.dtype)]) for old, more in zip(self._kept, new, strict=True)]
        self._thin()

    def state(self) -> State:
        """What it holds."""
        return {
            "level_F": self.level_F,
            "kept": list(self._kept),
            "row_level": self._row_level,
            "uncounted_row": self._uncounted_row,
            "uncounted_position": self._uncounted_position,
        }

    def merge(self, later: State) -> None:
        """Take in the state of later rows.

        A level only ever rises, by conditions that more rows cannot undo: a part of the rows cannot have thinned out
        more than all of them do.
        """
        first_row = len(self._row_level)
        self._row_level = np.concatenate([self._row_level, later["row_level"]])
        self._uncounted_row = np.concatenate([self._uncounted_row, later["uncounted_row"] + first_row])
        self._uncounted_position = np.concatenate([self._uncounted_position, later["uncounted_position"]])
        feature, row, position, value = later["kept"]
        new = (feature, row + np.int32(first_row), position, value)
        self._kept = [np.concatenate(both) for both in zip(self._kept, new, strict=True)]
        self.level_F = np.maximum(self.level_F, later["level_F"])
        self._drop_below()
        self._thin()

    def _drop_below(self) -> None:
        keep = self._row_level[self._kept[1]] >= self.level_F[self._kept[0]]
        self._kept = [column[keep] for column in self._kept]

    def _thin(self) -> None:
        """Halve the rows of features that hold too much, as long as that leaves rows enough."""
        counts = np.bincount(self._kept[0], minlength=len(self.level_F))
        while (over := (counts > 2 * self._events) & (self._rows_at(self.level_F + 1) >= self._min_rows)).any():
            self.level_F[over] += 1
            self._drop_below()
            counts = np.bincount(self._kept[0], minlength=len(self.level_F))

    def _rows_at(self, level: np.ndarray) -> np.ndarray:
        at_least = np.bincount(self._row_level, minlength=128)[::-1].cumsum()[::-1]
        return at_least[level]

    def events(self) -> tuple[np.ndarray, np.ndarray]:
        """Stored entries and distinct rows with any, per feature: [F] each."""
        size = len(self.level_F)
        pairs = np.unique(self._kept[0].astype(np.int64) * max(len(self._row_level), 1) + self._kept[1])
        return (
            np.bincount(self._kept[0], minlength=size),
            np.bincount(pairs // max(len(self._row_level), 1), minlength=size),
        )

    def statistics(self, features: np.ndarray, rotations: int, seed: int) -> np.ndarray:
        """The statistic of ``features`` [C], observed and then per rotation: float64 [C, 1 + rotations]."""
        generator = np.random.default_rng(seed)
        offsets = generator.integers(self._positions, size=(rotations + 1, len(self._row_level)), dtype=np.int16)
        offsets[0] = 0
        found = np.empty((len(features), rotations + 1))
        by_feature = np.argsort(self._kept[0], kind="stable")
        first_F = np.searchsorted(self._kept[0][by_feature], np.arange(len(self.level_F) + 1))
        chunks: list[tuple[np.ndarray, np.ndarray]] = []
        for level in np.unique(self.level_F[features]):
            mine = np.flatnonzero(self.level_F[features] == level)
            counted = self._counted(int(level), offsets)
            chunks += [(chunk, counted) for chunk in np.array_split(mine, -(-len(mine) * self._positions // _CHUNK))]

        def of_chunk(chunk: np.ndarray, counted: np.ndarray) -> None:
            column, place = _ranges(first_F[features[chunk]], first_F[features[chunk] + 1])
            _, row, position, value = (kept[by_feature[place]] for kept in self._kept)
            found[chunk] = _statistics(column, row, position, value, offsets, counted, len(chunk))

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(of_chunk, *zip(*chunks, strict=True)))
        return found

    def _counted(self, level: int, offsets: np.ndarray) -> np.ndarray:
        """Tokens at every position, [R + 1, P], of the rows of a level, rotated as their rows are."""
        rows = int((self._row_level >= level).sum())
        keep = self._row_level[self._uncounted_row] >= level
        row, position = self._uncounted_row[keep], self._uncounted_position[keep]
        counted = np.full((len(offsets), self._positions), float(rows))
        for at, offset in enumerate(offsets):
            moved = (position + offset[row]) % self._positions
            counted[at] -= np.bincount(moved, minlength=self._positions)
        return counted

    def p_values(self, *, rotations: int = ROTATIONS) -> np.ndarray:
        """One-sided p per feature: float64 [F], NaN for a feature too rare to be tested."""
        events, rows = self.events()
        tested = np.flatnonzero((events >= MIN_EVENTS) & (rows >= MIN_ROWS))
        p = np.full(len(events), np.nan)
        if not len(tested):
            return p
        tested = tested[np.argsort(events[tested], kind="stable")]
        observed, null = standardised(self.statistics(tested, rotations, self._seed + 1))
        for stratum in np.array_split(np.arange(len(tested)), max(1, len(tested) // _POOL)):
            p[tested[stratum]] = pooled_p(observed[stratum], null[stratum].ravel())
        return p


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers from each first up to each last, one range after the other: which range, and the number."""
    sizes = last - first
    which = np.repeat(np.arange(len(first)), sizes)
    return which, np.arange(len(which)) + np.repeat(first - (np.cumsum(sizes) - sizes), sizes)


def _statistics(
    column: np.ndarray,
    row: np.ndarray,
    position: np.ndarray,
    value: np.ndarray,
    offsets: np.ndarray,
    counted: np.ndarray,
    n_columns: int,
) -> np.ndarray:
    """Σ_p D_p² / n_p of every column under every rotation: float64 [C, R + 1].

    All is one thread's work on arrays that stay in its cache: a few thousand numbers are summed sooner than a second
    thread has been woken, and much sooner where another program has the processor.
    """
    positions = counted.shape[1]
    values = torch.from_numpy(value.astype(np.float64))
    # Σ (S_p − z̄ n_p)² / n_p = Σ S_p² / n_p − z̄ Σ S_p, S_p the sums of z: the second term is that of every rotation.
    total_C = np.bincount(column, weights=values.numpy(), minlength=n_columns)
    constant_C = total_C**2 / counted[0].sum()
    position, start = position.astype(np.int64), column * positions
    S_CP, found = torch.empty(n_columns, positions, dtype=torch.float64), np.empty((n_columns, len(offsets)))
    for at, (offset, counted_P) in enumerate(zip(offsets, counted, strict=True)):
        moved = position + offset[row]
        moved -= positions * (moved >= positions)
        S_CP.zero_().view(-1).index_add_(0, torch.from_numpy(moved + start), values)
        found[:, at] = np.square(S_CP.numpy()) @ (1 / np.maximum(counted_P, 1)) - constant_C
    return found


def _levels(uniform: np.ndarray) -> np.ndarray:
    """How often a number in [0, 1) can be doubled before it reaches 1: at least ℓ with probability 2^−ℓ."""
    return np.minimum(np.floor(-np.log2(np.maximum(uniform, 2.0**-60))), 60).astype(np.int8)


def standardised(statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed [C] and null [C, R] in units of the null's deviation from its mean.

    Every replicate is measured against the others, as the observed one is: the mean must not contain it.
    """
    observed, null = statistics[:, 0], statistics[:, 1:]
    n = null.shape[1]
    total, squares = null.sum(1, keepdims=True), (null**2).sum(1, keepdims=True)
    mean = (total - null) / (n - 1)
    deviation = np.sqrt(np.maximum((squares - null**2) / (n - 1) - mean**2, 1e-12 * mean**2 + 1e-300))
    spread = np.sqrt(np.maximum(null.var(1), 1e-12 * null.mean(1) ** 2 + 1e-300))
    return (observed - null.mean(1)) / spread, (null - mean) / deviation


def pooled_p(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """One-sided p of each observed value: counted where enough of the pooled null lies above, else from a gamma tail.

    The tail is that of a gamma distribution with the pool's mean, variance and skewness (Pearson's type III), scaled to
    meet the count where it takes over.
    """
    ordered = np.sort(null)
    above = len(ordered) - np.searchsorted(ordered, observed, side="left")
    p = (above + 1) / (len(ordered) + 1)
    if len(ordered) <= _TAIL:
        return p
    edge = ordered[-_TAIL]
    far = observed > edge
    ratio = _gamma_tail(observed[far], ordered) / np.maximum(_gamma_tail(np.array([edge]), ordered), 1e-300)
    p[far] = np.clip(ratio, 0, 1) * (_TAIL + 1) / (len(ordered) + 1)
    return p


def _gamma_tail(value: np.ndarray, null: np.ndarray) -> np.ndarray:
    mean, spread = null.mean(), null.std()
    skewness = max(float(((null - mean) ** 3).mean()) / spread**3, 1e-3) if spread > 0 else 1e-3
    shape = 4 / skewness**2
    scaled = np.maximum((value - mean) / max(spread, 1e-300) * math.sqrt(shape) + shape, 0.0)
    return torch.special.gammaincc(torch.tensor(shape, dtype=torch.float64), torch.from_numpy(scaled)).numpy()


def false_discovery_rate(p: np.ndarray) -> np.ndarray:
    """Benjamini–Hochberg q-values: the smallest rate at which each feature is a discovery; NaN stays NaN."""
    q = np.full(len(p), np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    if len(order):
        raw = p[order] * len(order) / np.arange(1, len(order) + 1)
        q[order] = np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1)
    return q
