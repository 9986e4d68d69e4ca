"""Statistics of a store's activations, computed once (one task per shard) and kept beside the shards.

One pass is usually enough. The norm limit (10 × the median norm of the whole store) is not known before the pass, so
it is first estimated from a sample. After the pass the moments are computed again only for the shards where the exact
limit selects other tokens than the estimate did.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..console import note, progress
from ..errors import StoreError, TcsaeError
from ..system.untrusted_files import parse_json
from .cluster import connected
from .format.codecs import CRC_BYTES, check, checksum_bytes
from .format.layout import PADDING, SPECIAL
from .format.manifest import checksum

if TYPE_CHECKING:
    from .store import ActivationStore


_SHIFT = 12  # bits of float32 dropped by the histogram: 2048 bins per octave, each 0.05 % wide


def token_norms(x_BTD: torch.Tensor) -> np.ndarray:
    """‖x‖₂ of every token, float32 ``[B, T]``; not finite where the activation is not finite."""
    # Row by row, so that the result is bit-identical however many rows are passed at once.
    norms = [torch.linalg.vector_norm(row.float(), dim=-1) for row in x_BTD]
    return torch.stack(norms).numpy() if norms else np.empty(x_BTD.shape[:2], np.float32)


@dataclass
class Moments:
    """Number of tokens, mean vector and summed squared distance from it."""

    n: int
    mean_D: np.ndarray  # float64
    m2: float  # Σ_n ‖x_n − mean‖²

    @classmethod
    def none(cls, d_model: int) -> Moments:
        """The moments of no token."""
        return cls(0, np.zeros(d_model), 0.0)

    @classmethod
    def of(cls, x_ND: torch.Tensor) -> Moments:
        """The moments of these tokens, in two passes over them."""
        if not len(x_ND):
            return cls.none(x_ND.shape[1])
        x = x_ND.float()
        mean = x.sum(0, dtype=torch.float64) / len(x)
        return cls(len(x), mean.numpy(), float((x - mean.float()).square_().sum(dtype=torch.float64)))

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of tokens together (Chan, Golub and LeVeque, 1979)."""
        n = self.n + other.n
        if not n:
            return self
        delta = other.mean_D - self.mean_D
        mean = self.mean_D + delta * (other.n / n)
        return Moments(n, mean, self.m2 + other.m2 + float(delta @ delta) * self.n * other.n / n)


@dataclass
class NormSums:
    """Sums over norms: a histogram of ordinary tokens, sums per position, and sums over special tokens."""

    context: int
    counts: np.ndarray = field(default_factory=lambda: np.zeros(1 << (31 - _SHIFT), np.int64))
    position_sum_T: np.ndarray = field(init=False)
    position_count_T: np.ndarray = field(init=False)
    special_sum: float = 0.0
    n_special: int = 0
    n_nonfinite: int = 0

    def __post_init__(self):
        self.position_sum_T = np.zeros(self.context)
        self.position_count_T = np.zeros(self.context, np.int64)

    def add(self, norms_BT: np.ndarray, flags_BT: np.ndarray) -> None:
        """Add the tokens of some rows."""
        finite = np.isfinite(norms_BT)
        token = finite & (flags_BT & PADDING == 0)
        special = token & (flags_BT & SPECIAL != 0)
        ordinary = norms_BT[token & ~special]
        self.counts += np.bincount(ordinary.view(np.uint32) >> _SHIFT, minlength=len(self.counts))
        self.position_sum_T += np.where(token, norms_BT, 0).sum(0, dtype=np.float64)
        self.position_count_T += token.sum(0)
        self.special_sum += float(norms_BT[special].sum(dtype=np.float64))
        self.n_special += int(special.sum())
        self.n_nonfinite += int((~finite).sum())

    def median(self) -> float:
        """Median norm of ordinary tokens, accurate to 0.03 %; 0 if there are none."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        upto = np.cumsum(self.counts)
        return (self._value((total - 1) // 2, upto) + self._value(total // 2, upto)) / 2

    def _value(self, rank: int, upto: np.ndarray) -> float:
        """The norm at a rank (from 0), assuming that norms are evenly spread within a bin of the histogram."""
        at = int(np.searchsorted(upto, rank, side="right"))
        share = (rank - int(upto[at]) + int(self.counts[at]) + 0.5) / int(self.counts[at])
        low, high = (float(np.uint32(bin_ << _SHIFT).view(np.float32)) for bin_ in (at, at + 1))
        return low + share * (high - low)

    def mean_by_position(self) -> np.ndarray:
        """Mean norm at every position, special tokens included; NaN at positions that hold only padding."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.position_sum_T / self.position_count_T


def counted(norms_BT: np.ndarray, flags_BT: np.ndarray, limit: float) -> np.ndarray:
    """Which tokens enter means and training, bool ``[B, T]``.

    A token counts if it is neither special nor padding, its norm is finite, and the norm is at most ``limit``.
    """
    return (flags_BT & (SPECIAL | PADDING) == 0) & (norms_BT <= limit)


def merge(parts: Iterable[Moments], d_model: int) -> Moments:
    """The moments of all parts together, merged in the given order."""
    total = Moments.none(d_model)
    for part in parts:
        total = total.merged(part)
    return total


STATISTICS = "activations/statistics.json"
LIMIT_FACTOR = 10  # massive activations: tokens with a norm above 10 × the median norm (see docs/METHOD.md)
_SAMPLE_CHUNKS = 16
_SHARDS_PER_CALL = 64  # shards per call to Dask, which bounds the memory of this process


@dataclass(frozen=True)
class StoreStatistics:
    """Statistics of the first ``rows`` rows.

    *Counted* tokens are those that are neither special nor padding and whose norm is at most ``norm_limit``.
    """

    rows: int
    n_tokens: int  # counted tokens
    mean_D: np.ndarray  # mean of the counted tokens, float64
    variance: float  # variance of the counted tokens, summed over dimensions
    mean_square_norm: float  # E‖x‖² over the counted tokens
    median_norm: float  # over tokens that are neither special nor padding
    norm_limit: float  # LIMIT_FACTOR × median_norm
    n_over_norm: int  # tokens, neither special nor padding, whose norm exceeds norm_limit
    n_special: int
    special_mean_norm: float | None  # mean norm of special tokens; None if there are none
    mean_norm_by_position_T: np.ndarray  # special tokens included; NaN at positions that hold only padding
    n_nonfinite: int  # tokens that hold NaN or Inf: 0 in a sound store

    @property
    def rms_scale(self) -> float:
        """The factor s with E‖s·x‖² = d_model over the counted tokens; 1 if there are none."""
        return math.sqrt(len(self.mean_D) / self.mean_square_norm) if self.mean_square_norm > 0 else 1.0

    @property
    def has_nonfinite(self) -> bool:
        """Whether NaN or Inf was found."""
        return self.n_nonfinite > 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; NaN becomes null."""
        record = asdict(self)
        record["mean_D"] = self.mean_D.tolist()
        record["mean_norm_by_position_T"] = [
            x if math.isfinite(x) else None for x in self.mean_norm_by_position_T.tolist()
        ]
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> StoreStatistics:
        """The inverse of :meth:`to_json`."""
        profile = [math.nan if x is None else x for x in record["mean_norm_by_position_T"]]
        arrays = {"mean_D": np.array(record["mean_D"]), "mean_norm_by_position_T": np.array(profile)}
        return cls(**{**record, **arrays})


@dataclass(frozen=True)
class _ShardResult:
    """The result of one shard's task."""

    shard: int
    norms_BT: np.ndarray
    flags_BT: np.ndarray
    moments: Moments
    n_over: int
    square_norms: float
    # The largest counted norm and the smallest norm above the limit: any limit between them counts the same tokens.
    near: tuple[float, float]


def store_statistics(store: ActivationStore, *, scheduler: str = "threads") -> StoreStatistics:
    """Statistics of all rows; they are read from the store if it has not grown since, else computed and saved there.

    Raises:
        StoreError: the store is damaged or holds no rows.
        ResourceError: the Dask scheduler cannot be reached, or the connection to it is lost.

    """
    kept = cached_statistics(store)
    if kept is not None:
        return kept
    if not store.n_rows:
        raise StoreError(f"{store.path} holds no rows: extract some first")
    found = _compute(store, scheduler)
    record = {"fingerprint": store.fingerprint(), "statistics": found.to_json()}
    try:
        store.place.replace(STATISTICS, (json.dumps({**record, "check": checksum(record)}) + "\n").encode())
    except (OSError, TcsaeError) as problem:
        note(f"the statistics of {store.path} are not kept: {problem}")
    return found


def cached_statistics(store: ActivationStore) -> StoreStatistics | None:
    """The saved statistics, if they are undamaged and cover exactly the present rows; else None."""
    try:
        record = parse_json(store.place.read(STATISTICS))
        sound = record.pop("check") == checksum(record) and record["fingerprint"] == store.fingerprint()
        return StoreStatistics.from_json(record["statistics"]) if sound else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def norms_key(shard: int) -> str:
    """The file with the norms of one shard: float32 ``[rows, T]`` followed by its CRC-32C."""
    return f"activations/norms.{shard}"


def kept_norms(store: ActivationStore, shard: int, rows: int) -> np.ndarray | None:
    """Norms ``[rows, T]`` of one shard as saved with the statistics; None if they are missing or damaged."""
    norms, crc = np.empty((rows, store.context), "<f4"), bytearray(CRC_BYTES)
    try:
        if store.place.read_into(norms_key(shard), 0, [norms, crc, bytearray(1)]) != norms.nbytes + CRC_BYTES:
            return None
        check(norms, crc)
    except Exception:  # whatever the reason: the norms can be computed from the activations instead
        return None
    return norms


def _compute(store: ActivationStore, scheduler: str) -> StoreStatistics:
    guess = LIMIT_FACTOR * _sampled_median(store)
    sums, results = NormSums(store.context), {}
    with progress(f"statistics of layer {store.layer}", store.n_rows, unit="rows") as bar:
        shards = range(store.layout.shards_for(store.n_rows))
        for result in _map_shards(store, shards, guess, scheduler):
            sums.add(result.norms_BT, result.flags_BT)
            _keep_norms(store, result)
            results[result.shard] = _without_arrays(result)
            bar.advance(len(result.norms_BT))
        limit = LIMIT_FACTOR * sums.median()
        changed = [n for n in shards if not results[n].near[0] <= limit < results[n].near[1]]
        for result in _map_shards(store, changed, limit, scheduler):
            results[result.shard] = _without_arrays(result)
    return _assemble(store, sums, [results[n] for n in shards], limit)


def _assemble(store: ActivationStore, sums: NormSums, parts: Sequence[_ShardResult], limit: float) -> StoreStatistics:
    moments = merge((part.moments for part in parts), store.d_model)
    n = max(moments.n, 1)
    return StoreStatistics(
        rows=store.n_rows,
        n_tokens=moments.n,
        mean_D=moments.mean_D,
        variance=moments.m2 / n,
        mean_square_norm=math.fsum(part.square_norms for part in parts) / n,
        median_norm=limit / LIMIT_FACTOR,
        norm_limit=limit,
        n_over_norm=sum(part.n_over for part in parts),
        n_special=sums.n_special,
        special_mean_norm=sums.special_sum / sums.n_special if sums.n_special else None,
        mean_norm_by_position_T=sums.mean_by_position(),
        n_nonfinite=sums.n_nonfinite,
    )


def _sampled_median(store: ActivationStore) -> float:
    """Median norm over a few chunks, evenly spaced in the store."""
    sums = NormSums(store.context)
    for chunk in sorted(set(np.linspace(0, store.n_chunks - 1, _SAMPLE_CHUNKS).astype(int).tolist())):
        rows = store.chunk_range(chunk)
        sums.add(token_norms(store.read_chunks([chunk])), store.flags(rows.start, rows.stop))
    return sums.median()


def _map_shards(store: ActivationStore, shards: Sequence[int], limit: float, scheduler: str) -> Iterator[_ShardResult]:
    path = os.path.abspath(store.path) if store.place.local else store.path  # workers have other working folders
    task = partial(_shard_task, type(store).open, path, limit)
    if scheduler in ("threads", "synchronous", "sync"):
        with ThreadPoolExecutor(os.cpu_count() if scheduler == "threads" else 1) as pool:
            for at in range(0, len(shards), _SHARDS_PER_CALL):
                yield from pool.map(task, shards[at : at + _SHARDS_PER_CALL])
        return
    with connected(
        scheduler, instead="leave --scheduler out", then="nothing is kept of the statistics; ask again"
    ) as client:
        from dask.delayed import delayed

        tasks = [delayed(task, pure=False)(shard) for shard in shards]
        groups = [tasks[at : at + _SHARDS_PER_CALL] for at in range(0, len(tasks), _SHARDS_PER_CALL)]
        for group in groups:
            yield from cast(list[_ShardResult], client.gather(client.compute(group)))


def _shard_task(open_store: Callable[..., ActivationStore], path: str, limit: float, shard: int) -> _ShardResult:
    """Process one shard, chunk by chunk, in a worker that can reach the store."""
    store = open_store(path, allow_unfinished=True)
    rows = store.layout.rows_of(shard, store.n_rows)
    flags = store.flags(rows.start, rows.stop)
    norms, moments = [], []
    for chunk in range(rows.start // store.chunk_rows, -(-rows.stop // store.chunk_rows)):
        x = store.read_chunks([chunk])
        here = store.chunk_range(chunk)
        norms.append(token_norms(x))
        mask = counted(norms[-1], flags[here.start - rows.start : here.stop - rows.start], limit)
        moments.append(Moments.of(x.flatten(0, 1)[mask.reshape(-1).nonzero()[0]]))
    store.close()
    return _shard_result(shard, np.concatenate(norms), flags, merge(moments, store.d_model), limit)


def _shard_result(shard: int, norms: np.ndarray, flags: np.ndarray, moments: Moments, limit: float) -> _ShardResult:
    mask, ordinary = counted(norms, flags, limit), counted(norms, flags, math.inf) & np.isfinite(norms)
    beyond = norms[ordinary & ~mask]
    inside = norms[mask]
    near = (float(inside.max(initial=0.0)), float(beyond.min(initial=math.inf)))
    return _ShardResult(shard, norms, flags, moments, len(beyond), float((inside.astype(np.float64) ** 2).sum()), near)


def _without_arrays(result: _ShardResult) -> _ShardResult:
    empty = np.empty((0, 0), np.float32)
    return _ShardResult(result.shard, empty, empty, result.moments, result.n_over, result.square_norms, result.near)


def _keep_norms(store: ActivationStore, result: _ShardResult) -> None:
    norms = np.ascontiguousarray(result.norms_BT, "<f4")
    try:
        store.place.replace(norms_key(result.shard), norms.tobytes() + checksum_bytes(norms))
    except (OSError, TcsaeError):
        return  # a read-only store: store_statistics reports it once
