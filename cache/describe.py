"""Facts about a store for the ``inspect`` command: a summary and a picture of the norms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..console import format_bytes, format_count
from ..errors import needs
from ..system.atomic_files import write_file
from .format.layout import PADDING, SPECIAL
from .statistics import StoreStatistics, cached_statistics, token_norms
from .store import ActivationStore

_SMALL = 4_000_000_000  # bytes of activations up to which statistics are computed without a request


def store_facts(
    store: ActivationStore, *, statistics: bool | None = None, scheduler: str = "threads"
) -> dict[str, Any]:
    """The facts of a store, name → value.

    Args:
        store: an opened store, finished or not.
        statistics: whether to compute the norms if the store does not hold them; None: only below 4 GB.
        scheduler: where to compute them: ``threads``, or the address of a Dask cluster.

    """
    manifest, layout = store.manifest, store.layout
    size = store.n_bytes
    facts: dict[str, Any] = {
        "path": store.path,
        "model": manifest.model.id + (f"@{manifest.model.revision}" if manifest.model.revision else ""),
        "layer": store.layer,
        "hook": manifest.hook_name,
        "text": f"{manifest.text.dataset} ({manifest.text.split}), {manifest.text.packing} packing",
        "rows": store.n_rows,
        "planned_rows": manifest.planned_rows,
        "finished": store.finished,
        "context": store.context,
        "d_model": store.d_model,
        "tokens": store.n_tokens,
        "bytes": size,
        "compression": layout.compression,
        "shards": layout.shards_for(store.n_rows),
        "chunk_rows": layout.chunk_rows,
        "fingerprint": store.fingerprint(),
        "created": manifest.created,
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
    }
    found = statistics_of(store, statistics, scheduler)
    return facts | (_norm_facts(found) if found else {})


def statistics_of(store: ActivationStore, wanted: bool | None, scheduler: str) -> StoreStatistics | None:
    """The statistics if the store holds them, if they are ``wanted``, or if the store is small; else None."""
    small = store.n_tokens * store.d_model * 2 <= _SMALL
    if not store.n_rows or wanted is False or (wanted is None and not small):
        return cached_statistics(store)
    return store.statistics(scheduler=scheduler)


def _norm_facts(found: StoreStatistics) -> dict[str, Any]:
    profile = found.mean_norm_by_position_T
    places = sorted({0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, len(profile) - 1} & set(range(len(profile))))
    return {
        "counted_tokens": found.n_tokens,
        "median_norm": found.median_norm,
        "rms_norm": math.sqrt(found.mean_square_norm),
        "variance": found.variance,
        "norm_limit": found.norm_limit,
        "tokens_over_limit": found.n_over_norm,
        "special_mean_norm": found.special_mean_norm,
        "rms_scale": found.rms_scale,
        "nonfinite_tokens": found.n_nonfinite,
        "norm_by_position": {t: round(float(profile[t]), 3) for t in places if math.isfinite(profile[t])},
    }


def readable(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts with numbers formatted for people."""
    shown = dict(facts)
    shown["tokens"], shown["bytes"] = format_count(facts["tokens"]), format_bytes(facts["bytes"])
    for name, value in facts.items():
        if isinstance(value, float):
            shown[name] = f"{value:.4g}"
    if "norm_by_position" in facts:
        shown["norm_by_position"] = "  ".join(f"{t}: {norm:.4g}" for t, norm in facts["norm_by_position"].items())
    return shown


def draw_norms(store: ActivationStore, file: Path, *, chunks: int = 64) -> None:
    """Draw the norms of a sample of chunks into ``file``.

    Left: histograms for ordinary and for special tokens. Right: the mean norm per position.
    """
    needs("matplotlib", extra="report", what="a picture")
    from matplotlib.figure import Figure

    norms, flags = _sampled_norms(store, chunks)
    token, special = flags & PADDING == 0, flags & SPECIAL != 0
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    top = max(float(norms[token].max(initial=1)), 1e-6)
    bins = np.geomspace(max(float(norms[token & (norms > 0)].min(initial=top)), top * 1e-6), top * 1.001, 60)
    for mask, label in ((token & ~special, "ordinary tokens"), (token & special, "special tokens")):
        left.hist(norms[mask], bins=bins.tolist(), alpha=0.7, label=f"{label} ({format_count(int(mask.sum()))})")
    left.set(xscale="log", yscale="log", xlabel="‖x‖", ylabel="tokens", title=f"layer {store.layer}")
    left.legend(frameon=False, fontsize="small")
    with np.errstate(invalid="ignore"):
        mean = np.where(token, norms, 0).sum(0) / token.sum(0)
    right.plot(np.arange(store.context), mean, marker=".", linewidth=1)
    right.set(yscale="log", xlabel="position", ylabel="mean ‖x‖", title="norm by position")
    write_file(file, lambda out: figure.savefig(out, format=file.suffix[1:] or "png", dpi=150))


def _sampled_norms(store: ActivationStore, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    norms, flags = [], []
    for chunk in sorted(set(np.linspace(0, store.n_chunks - 1, chunks).astype(int).tolist())):
        rows = store.chunk_range(chunk)
        norms.append(token_norms(store.read_chunks([chunk])))
        flags.append(store.flags(rows.start, rows.stop))
    return np.concatenate(norms), np.concatenate(flags)
