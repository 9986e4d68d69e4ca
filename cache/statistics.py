"""What a store's activations are like: computed once over Dask, one task per shard, and kept beside the shards.

One pass, usually: each shard's moments are taken with a limit on the norm guessed from a sample, and taken again only for the
shards where the exact limit (10 × the median over the whole store) counts other tokens than the guess did.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..console import note, progress
from ..errors import StoreError, TcsaeError
from .cluster import connected
from .codecs import CRC_BYTES, check, checksum_bytes
from .manifest import checksum
from .moments import Moments, NormSums, counted, merge, token_norms

if TYPE_CHECKING:
    from .store import ActivationStore

STATISTICS = "activations/statistics.json"
LIMIT_FACTOR = 10  # massive activations: norms beyond this many medians (see docs/METHOD.md)
_SAMPLE_CHUNKS = 16
_GROUP = 64  # shards per call to Dask: bounds what the coordinator holds


@dataclass(frozen=True)
class StoreStatistics:
    """Statistics of the first ``rows`` rows. *Counted* tokens are neither special nor padding nor beyond ``norm_limit``."""

    rows: int
    n_tokens: int  # counted tokens
    mean_D: np.ndarray  # of counted tokens, float64
    variance: float  # Σ_d of the variance of counted tokens
    mean_square_norm: float  # E‖x‖² of counted tokens
    median_norm: float  # of tokens neither special nor padding
    norm_limit: float  # LIMIT_FACTOR × median_norm
    n_over_norm: int  # tokens neither special nor padding that lie beyond it
    n_special: int
    special_mean_norm: float | None  # of special tokens; None without any
    mean_norm_by_position_T: np.ndarray  # special tokens included; NaN where only padding lies
    n_nonfinite: int  # tokens that hold NaN or Inf: none, in a sound store

    @property
    def rms_scale(self) -> float:
        """The factor s with E‖s·x‖² = d_model over counted tokens; 1 for a store without any."""
        return math.sqrt(len(self.mean_D) / self.mean_square_norm) if self.mean_square_norm > 0 else 1.0

    @property
    def has_nonfinite(self) -> bool:
        """Whether NaN or Inf was found."""
        return self.n_nonfinite > 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; NaN positions become null."""
        record = asdict(self)
        record["mean_D"] = self.mean_D.tolist()
        record["mean_norm_by_position_T"] = [x if math.isfinite(x) else None for x in self.mean_norm_by_position_T.tolist()]
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> StoreStatistics:
        """The inverse of :meth:`to_json`."""
        profile = [math.nan if x is None else x for x in record["mean_norm_by_position_T"]]
        arrays = {"mean_D": np.array(record["mean_D"]), "mean_norm_by_position_T": np.array(profile)}
        return cls(**{**record, **arrays})


@dataclass(frozen=True)
class _ShardResult:
    """What a task sends back."""

    shard: int
    norms_BT: np.ndarray
    flags_BT: np.ndarray
    moments: Moments
    n_over: int
    square_norms: float
    near: tuple[float, float]  # the largest counted norm and the smallest beyond the limit: limits between them change nothing


def store_statistics(store: ActivationStore, *, scheduler: str = "threads") -> StoreStatistics:
    """Statistics of all rows: from the store if they were computed since it last grew, else computed and kept there.

    Raises:
        StoreError: damage, or no row at all. ResourceError: the Dask scheduler cannot be reached, or is lost.

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
    """The kept statistics if they are of exactly these rows and intact."""
    try:
        record = json.loads(store.place.read(STATISTICS))
        sound = record.pop("check") == checksum(record) and record["fingerprint"] == store.fingerprint()
        return StoreStatistics.from_json(record["statistics"]) if sound else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def norms_key(shard: int) -> str:
    """The file that keeps the norms of one shard: float32 ``[rows, T]`` and its CRC-32C, beside the shard."""
    return f"activations/norms.{shard}"


def kept_norms(store: ActivationStore, shard: int, rows: int) -> np.ndarray | None:
    """Norms ``[rows, T]`` of one shard as kept by the last statistics; None if there are none or they are altered."""
    norms, crc = np.empty((rows, store.context), "<f4"), bytearray(CRC_BYTES)
    try:
        if store.place.read_into(norms_key(shard), 0, [norms, crc, bytearray(1)]) != norms.nbytes + CRC_BYTES:
            return None
        check(norms, crc)
    except Exception:  # any way in which it cannot be read: it is only a shortcut
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
    """Median norm over a few chunks spread over the store."""
    sums = NormSums(store.context)
    for chunk in sorted(set(np.linspace(0, store.n_chunks - 1, _SAMPLE_CHUNKS).astype(int).tolist())):
        rows = store.chunk_range(chunk)
        sums.add(token_norms(store.read_chunks([chunk])), store.flags(rows.start, rows.stop))
    return sums.median()


def _map_shards(store: ActivationStore, shards: Sequence[int], limit: float, scheduler: str) -> Iterator[_ShardResult]:
    from dask.base import compute
    from dask.delayed import delayed

    path = os.path.abspath(store.path) if store.place.local else store.path  # workers have working folders of their own
    tasks = [delayed(_shard_task, pure=False)(path, shard, limit) for shard in shards]
    groups = [tasks[at : at + _GROUP] for at in range(0, len(tasks), _GROUP)]
    if scheduler in ("threads", "synchronous", "sync"):
        for group in groups:
            yield from compute(*group, scheduler=scheduler)
        return
    with connected(scheduler, instead="leave --scheduler out", then="nothing is kept of the statistics; ask again") as client:
        for group in groups:
            yield from cast(list[_ShardResult], client.gather(client.compute(group)))


def _shard_task(path: str, shard: int, limit: float) -> _ShardResult:
    """One shard, chunk by chunk, in a worker that can reach the store."""
    from .store import ActivationStore

    store = ActivationStore.open(path, allow_unfinished=True)
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
        return  # read-only: store_statistics says so once
