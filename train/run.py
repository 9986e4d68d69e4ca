"""Stage two as one function: a store and a configuration become run folders.

The members of a sweep and their twins train side by side on one stream; what memory cannot hold at once is split into
passes over the same stream. A run folder is complete when its record says so, and the record is written last.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cache.storage.local_cache import DEFAULT_FOLDER, LocalCache
from ..cache.store import ActivationStore
from ..console import format_count, format_duration
from ..errors import RunError, UsageError
from ..plugins import load_plugins
from ..system.device import DTYPES, resolve_device, resolve_dtype
from .config import TrainConfig
from .loop.diagnostics import Metrics
from .loop.distributed import joined
from .loop.inputs import Inputs
from .loop.warm_start import check_sources
from .passes import train_members
from .plan import plan_together, tokens_per_step
from .run_folder.member_folders import locked, member_folders
from .run_folder.metrics_log import check_loggers
from .siblings import with_siblings

_OF_A_PASS = (
    *("out", "device", "dtype", "log", "log_every", "checkpoint_every", "checkpoint_minutes"),
    *("local_cache", "cache_dir"),
)


@dataclass(frozen=True)
class TrainSummary:
    """What :func:`train` did."""

    runs: list[Path]  # every run folder asked for that is finished now
    skipped: list[Path]  # those of them that were finished before
    steps: int  # of each run
    tokens: int  # each run has seen
    seconds: float
    metrics: dict[str, Metrics]  # the last ones of every run trained now, by folder name
    failures: dict[str, str] = field(default_factory=dict)  # sentences of those that failed, by folder name

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the closing summary: plain values for machines, words for people."""
        if as_json:
            return asdict(self) | {"runs": list(map(str, self.runs)), "skipped": list(map(str, self.skipped))}
        facts: dict[str, Any] = {path.name: _in_words(self.metrics.get(path.name)) for path in self.runs}
        facts |= {name: f"failed: {sentence}" for name, sentence in self.failures.items()}
        facts |= {"steps": self.steps, "tokens": format_count(self.tokens), "time": format_duration(self.seconds)}
        return facts | {"folder": self.runs[0].parent}


def train(
    configs: TrainConfig | Sequence[TrainConfig],
    *,
    sweep: Mapping[str, Sequence[str]] | None = None,
    fresh: bool = False,
    only: Collection[str] | None = None,
) -> TrainSummary:
    """Train an SAE, its twin with λ2 = 0, and every other point of a sweep; go on with what was begun, keep what is
    finished. Several configurations train side by side on one stream, as far as they agree in its order and scale.

    An SAE whose training fails is left out, and the others go on from the last checkpoint, as they would without it.

    Args:
        configs: the base configuration, or several (:func:`.presets.rivals_of`, say); ``data.store`` names the store.
        sweep: dotted field → values; every combination is trained of every configuration.
        fresh: replace what is there.
        only: names of the runs that are trained now; what all of them share of the stream depends on all.

    Raises:
        StoreError, UsageError, RunError, ResourceError: see the modules that check; also if no run succeeds.
        KeyboardInterrupt: Ctrl-C; checkpoints are written, and its message says how to go on.

    """
    began = time.perf_counter()
    several = [configs] if isinstance(configs, TrainConfig) else list(configs)
    config = _common(several)
    check_loggers(config.run.log)
    for each in several:
        load_plugins(each.run.plugins)
    device = resolve_device(config.run.device)
    dtype = DTYPES[resolve_dtype(config.run.dtype, device)]
    store = ActivationStore.open(config.data.store, cache=_cache(config))
    statistics = store.statistics()
    about = {"layer": store.layer, "site": store.location.site, "d_model": store.d_model}
    members = plan_together(several, sweep or {}, **about, n_tokens=statistics.n_tokens)
    members = [plan for plan in with_siblings(members, store.context) if only is None or plan.name in only]
    with joined(device) as world, ExitStack() as mine:
        folders = member_folders(
            members, store, fresh=fresh, default_length=not (config.run.steps or config.run.tokens)
        )
        check_sources([each.plan for each in folders if not each.settled and not each.has_checkpoint], store)
        failures = {each.plan.name: each.failure for each in folders if each.failure}
        mine.enter_context(locked(folders if world.writes else []))
        metrics, failed = train_members(
            folders, store, lambda each: Inputs.of(each.plan.config.data, statistics), device, dtype, world
        )
        failures |= failed
    if len(failures) == len(folders):
        raise RunError(next(iter(failures.values())))
    first = folders[0].plan.config
    return TrainSummary(
        runs=[each.folder for each in folders if each.plan.name not in failures],
        skipped=[each.folder for each in folders if each.done],
        steps=first.run.steps,
        tokens=first.run.steps * tokens_per_step(first),
        seconds=time.perf_counter() - began,
        metrics=metrics,
        failures=failures,
    )


def _cache(config: TrainConfig) -> LocalCache | None:
    run = config.run
    return LocalCache(round(run.local_cache * 1e9), run.cache_dir or DEFAULT_FOLDER) if run.local_cache else None


def _common(configs: Sequence[TrainConfig]) -> TrainConfig:
    """The first configuration, whose store, folder, device, dtype and logging are those of all.

    Raises:
        UsageError: they are not, or no store is named.

    """
    first = configs[0]
    if not first.data.store:
        raise UsageError("no store was named: give --store, such as --store cache/l12.zarr")
    for group, key in (("data", "store"), *(("run", key) for key in _OF_A_PASS)):
        values = list(dict.fromkeys(str(getattr(getattr(config, group), key)) for config in configs))
        if len(values) > 1:
            raise UsageError(f"{group}.{key} is the same for all that train together, not {' and '.join(values)}")
    return first


def _in_words(metrics: Metrics | None) -> str:
    if not metrics:
        return "was finished before"
    shown = {
        "explained": "explained_variance",
        "L0": "l0",
        "temporal variation": "temporal_variation",
        "dead": "dead_share",
    }
    return ", ".join(f"{name} {value:.3g}" for name, key in shown.items() if (value := metrics.get(key)) is not None)
