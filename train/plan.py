"""From a configuration and a sweep to the members that will train: names, twins, widths, steps. Pure; touches no disk.

A member is one SAE. Members with the same data configuration share one stream; every member is exactly what the same
configuration trained alone would be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cache.views import Pairs, Rows, View, Windows
from ..console import parse_count
from ..errors import UsageError
from ..sites import RESIDUAL, Location
from ..system.untrusted_files import folder_name
from .config import DataConfig, SAEConfig, TrainConfig
from .loss.objective import group_sizes, objective_of
from .loss.registry import PARTNERS, TERMS
from .presets import changed
from .run_folder.record import EXTENSION
from .sae.registry import ACTIVATIONS, ARCHITECTURES

# What `--sweep` and the flags call the fields of the configuration.
OPTIONS = {
    "store": "data.store",
    "window": "data.window",
    "batch-size": "data.batch_size",
    "pool": "data.pool",
    "scale": "data.scale",
    "norm-filter": "data.norm_filter",
    "data-seed": "data.seed",
    "only": "data.only",
    "architecture": "sae.architecture",
    "width": "sae.width",
    "activation": "sae.activation",
    "k": "sae.k",
    "groups": "sae.groups",
    "decoder": "sae.decoder",
    "l1": "loss.l1",
    "target-l0": "loss.target_l0",
    "temporal": "temporal.form",
    "temporal-weight": "temporal.weight",
    "temporal-partner": "temporal.partner",
    "temporal-lag": "temporal.lag",
    "temporal-scope": "temporal.scope",
    "temporal-per-feature": "temporal.per_feature",
    "steps": "run.steps",
    "tokens": "run.tokens",
    "lr": "optimiser.lr",
    "warmup": "optimiser.warmup",
    "seed": "run.seed",
    "init-from": "run.init_from",
    "out": "run.out",
    "name": "run.name",
    "baseline": "run.baseline",
    "device": "run.device",
    "dtype": "run.dtype",
    "step": "run.step",
    "plugin": "run.plugins",
    "log": "run.log",
    "log-every": "run.log_every",
    "checkpoint-every": "run.checkpoint_every",
    "checkpoint-minutes": "run.checkpoint_minutes",
    "local-cache": "run.local_cache",
    "cache-dir": "run.cache_dir",
}
_COUNTS = {"sae.width", "run.steps", "run.tokens", "data.batch_size", "data.pool", "sae.k"}
_AUTOMATIC = {  # what 0 stands for in a configuration, and auto on the command line
    "sae.width": "8 × d_model",
    "run.steps": "as many as there are tokens for",
    "run.tokens": "each token of the store once",
}
_NAMED = {"sae.architecture", "sae.activation", "sae.k", "loss.l1", "run.seed"}  # always part of a run's name
_SWEPT_GROUPS = ("data", "sae", "loss", "temporal", "optimiser")
_NOT_SWEPT = {"data.store", "temporal.weight_by_layer"}
RUNNING_FROM = 1000  # steps before the moving average of a threshold begins, as published


@dataclass(frozen=True)
class MemberPlan:
    """One SAE to be trained: its folder's name, full configuration with width and steps resolved, role, and its other
    half.
    """

    name: str
    config: TrainConfig
    role: str
    twin: str | None
    d_model: int
    begun_at: int = 0
    """Steps of a finished run that goes on with this; the configuration's steps are all of them together."""

    @property
    def folder(self) -> Path:
        """Where it is trained: the run's folder, or that of its extension."""
        run = Path(self.config.run.out) / folder_name(self.name, "--name")
        return run / EXTENSION if self.begun_at else run

    @property
    def n_parameters(self) -> int:
        """Numbers that are trained."""
        with torch.device("meta"):
            sae = ARCHITECTURES.get(self.config.sae.architecture).build(self.config.sae, self.d_model)
        return sum(parameter.numel() for parameter in sae.parameters())


def parse_sweep(settings: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """``["temporal-weight=0,0.1", "seed=0,1"]`` as dotted fields and their values, as written.

    Raises:
        UsageError: not of that form, an unknown key, or one that a sweep cannot vary.

    """
    grid: dict[str, tuple[str, ...]] = {}
    for setting in settings:
        key, equals, values = setting.partition("=")
        field = OPTIONS.get(key.strip(), key.strip())
        chosen = tuple(value.strip() for value in values.split(",") if value.strip())
        if not equals or not chosen:
            raise UsageError(
                f"'{setting}' is no sweep: write --sweep KEY=V1,V2, such as --sweep temporal-weight=0,0.03,0.1"
            )
        if field not in OPTIONS.values() and "." not in field:
            raise UsageError(f"'{key}' cannot be swept, there is no such option: choose one of {', '.join(OPTIONS)}")
        if field != "run.seed" and (field.split(".")[0] not in _SWEPT_GROUPS or field in _NOT_SWEPT):
            raise UsageError(f"'{key}' is the same for a whole sweep: run 'pipeline train' once for each of its values")
        grid[field] = chosen
    return grid


def as_count(field: str, value: Any) -> Any:
    """``200k`` as 200000 where the field counts something; any other value as it is.

    The configuration writes 0 for what is worked out from the store; who says it, says ``auto``.

    Raises:
        UsageError: no such count, or none at all where something must be counted.

    """
    if field not in _COUNTS:
        return value
    if field in _AUTOMATIC and str(value).strip() == "auto":
        return 0
    count = parse_count(value) if isinstance(value, str) else value
    if field in _AUTOMATIC and count == 0:
        name = next(option for option, of in OPTIONS.items() if of == field)
        raise UsageError(f"--{name} 0 is nothing to train: give a number, or auto for {_AUTOMATIC[field]}")
    return count


def plan_members(
    config: TrainConfig,
    grid: Mapping[str, Sequence[str]],
    *,
    layer: int,
    site: str = RESIDUAL,
    d_model: int,
    n_tokens: int,
) -> list[MemberPlan]:
    """All members of a run: every point of the grid and, where asked for, its twin with λ2 = 0; each only once.

    Args:
        config: the base configuration.
        grid: dotted field → values.
        layer: layer of the store, for the names.
        site: hook point of the store, likewise.
        d_model: width of the store.
        n_tokens: tokens of the store that count, for the default number of steps.

    Raises:
        UsageError: a combination that makes no sense, or two members of one name.

    """
    at = Location(layer, site)
    members: dict[str, MemberPlan] = {}
    for values in itertools.product(*grid.values()):
        point = changed(config, {field: as_count(field, value) for field, value in zip(grid, values, strict=True)})
        point = _with_weight_of_layer(point, layer, swept="temporal.weight" in grid)
        point = resolve(point, d_model=d_model, n_tokens=n_tokens)
        temporal, alone = _without_term(point), point.temporal.form == "none" or point.temporal.weight == 0
        if alone:
            _add(members, MemberPlan(_name(temporal, at, grid), temporal, "tc", None, d_model))
            continue
        name = _name(point, at, grid)
        twin = _name(temporal, at, grid, twin=True) if point.run.baseline else None
        _add(members, MemberPlan(name, point, "tc", twin, d_model))
        if twin:
            _add(members, MemberPlan(twin, temporal, "twin", name, d_model))
    return list(members.values())


def _with_weight_of_layer(config: TrainConfig, layer: int, *, swept: bool) -> TrainConfig:
    """The same with λ2 as one number, that of the store's layer.

    Raises:
        UsageError: other layers have one, this one has none; or it is swept as well.

    """
    weights = config.temporal.weight_by_layer
    if not weights:
        return config
    given = ", ".join(f"{of} = {weight:g}" for of, weight in sorted(weights.items()))
    if swept:
        raise UsageError(f"λ2 is swept and given by layer ({given}): give one of the two")
    if layer not in weights:
        raise UsageError(f"λ2 is given by layer ({given}), and the store is of layer {layer}: give it one too")
    return changed(config, {"temporal.weight": weights[layer], "temporal.weight_by_layer": {}})


def plan_together(configs: Iterable[TrainConfig], grid: Mapping[str, Sequence[str]], **about: Any) -> list[MemberPlan]:
    """The members of several configurations at every point of the grid, each only once; see :func:`plan_members`.

    Raises:
        UsageError: as there, or two different members have one name.

    """
    members: dict[str, MemberPlan] = {}
    for config in configs:
        for plan in plan_members(config, grid, **about):
            _add(members, plan)
    return list(members.values())


def resolve(config: TrainConfig, *, d_model: int, n_tokens: int) -> TrainConfig:
    """The same configuration with width and steps as numbers.

    Raises:
        UsageError: a batch smaller than a window, k larger than the dictionary, or an L0 that cannot be steered.

    """
    width = config.sae.width or default_width(config.sae, d_model)
    kind = ARCHITECTURES.get(config.sae.architecture)
    config = changed(config, {"data.view": _view_needed(config)})
    if kind.sees == "window":
        config = changed(config, {"sae.window": config.data.window})
    kind.check(config)
    _check_sparsity(config)
    _check_feature_weights(config)
    if kind.fixes_sparsity(config.sae) and (active := kind.active_features(config.sae)) > width:
        per_window = f" per window of {config.data.window}" if kind.sees == "window" else ""
        sizes = f"k is {active}{per_window}, the dictionary has {width} features"
        raise UsageError(f"{sizes}: give a smaller --k or a larger --width")
    sizes = group_sizes(config.sae, width)
    if len(set(sizes)) < len(sizes):
        groups = ", ".join(f"{fraction:g}" for fraction in config.sae.groups)
        what = f"groups {groups} of {width} features are prefixes of {', '.join(map(str, sizes))}"
        raise UsageError(f"{what}: give groups that differ by a feature or more")
    if config.data.batch_size < config.data.window:
        sizes = f"a batch of {config.data.batch_size} tokens holds no window of {config.data.window}"
        raise UsageError(f"{sizes}: give a larger --batch-size")
    # Of the batch's size, not of what its windows leave of it: members with different views take the same steps.
    steps = config.run.steps or max(1, (config.run.tokens or n_tokens) // config.data.batch_size)
    window = 2 if config.data.view == "pairs" else config.data.window
    resolved = changed(config, {"sae.width": width, "run.steps": steps, "data.window": window})
    _check_threshold(resolved)
    return resolved


def _check_threshold(config: TrainConfig) -> None:
    """Whether a moving average of the threshold has begun before training ends.

    Raises:
        UsageError: it has not.

    """
    sae, steps = config.sae, config.run.steps
    running = ACTIVATIONS.get(sae.activation).threshold == "running" and sae.threshold_rule == "running"
    if running and steps <= RUNNING_FROM:
        what = f"sae.threshold_rule 'running' averages over the steps after {RUNNING_FROM}, the run has {steps}"
        raise UsageError(f"{what}: train for more --steps, or use 'calibrated'")


def _check_sparsity(config: TrainConfig) -> None:
    """Whether the activation can have what is asked of L0.

    Raises:
        UsageError: no.

    """
    loss, sae = config.loss, config.sae
    if loss.l0_penalty == "quadratic":
        if not loss.target_l0:
            raise UsageError("loss.l0_penalty is quadratic around loss.target_l0, which is 0: give --target-l0")
        if sae.architecture != "sae" or ACTIVATIONS.get(sae.activation).threshold != "per_feature":
            what = f"moves jumprelu's thresholds, activation '{sae.activation}' of architecture '{sae.architecture}'"
            raise UsageError(f"loss.l0_penalty quadratic {what} has none: use linear")
    if loss.target_l0 and ARCHITECTURES.get(sae.architecture).fixes_sparsity(sae):
        kind = sae.activation if sae.architecture == "sae" else f"architecture {sae.architecture}"
        raise UsageError(f"{kind} has L0 = k by itself: give --k {loss.target_l0:.0f} instead of --target-l0")
    if loss.target_l0 and loss.l1 == 0:
        raise UsageError("a target for L0 is reached by changing λ1, and loss.l1 is 0: leave --l1 out")


def _check_feature_weights(config: TrainConfig) -> None:
    """Whether λ2 can differ between features.

    Raises:
        UsageError: the term is no sum over features, or no neighbours are seen whose correlation could be measured.

    """
    term = config.temporal
    if term.per_feature == "none" or term.form == "none":
        return
    form = PARTNERS.get(term.partner).form or term.form
    if TERMS.get(form).degree is None:
        sums = ", ".join(name for name in TERMS if TERMS.get(name).degree is not None)
        raise UsageError(
            f"λ2 per feature needs a term that is a sum over features, '{form}' is none: choose one of {sums}"
        )
    if term.per_feature == "autocorrelation" and config.data.view != "windows":
        seen = f"{config.data.view} are seen, no windows of neighbours"
        raise UsageError(f"the lag-1 correlation of a feature cannot be measured where {seen}: use density")


def _view_needed(config: TrainConfig) -> str:
    """What must be seen of the store: what the architecture's codes or the term's partners are computed from.

    Raises:
        UsageError: the two do not go together.

    """
    name, term, given = config.sae.architecture, config.temporal, config.data.view
    sees = ARCHITECTURES.get(name).sees
    if sees == "row":
        _check_term_on_rows(config)
        return "rows"
    if given == "rows" or (given == "pairs" and sees == "window"):
        raise UsageError(f"architecture '{name}' sees {sees}s, data.view = '{given}' shows it none: leave it out")
    partner = PARTNERS.get(term.partner)
    view = "pairs" if term.form != "none" and partner.pairs else given
    if view != "pairs" and config.data.pair_loss == "current":
        what = "data.pair_loss = 'current' is of pairs of an earlier token and a token"
        raise UsageError(f"{what}, and {view} are seen: use --temporal-partner earlier, or leave it out")
    if view == "pairs" and term.form != "none" and (term.partner in ("next", "lag") or partner.siblings):
        what = "data.view = 'pairs' shows an earlier token and a token, no neighbours"
        raise UsageError(f"{what}, which partner '{term.partner}' needs: use --temporal-partner earlier")
    return view


def _check_term_on_rows(config: TrainConfig) -> None:
    term, name = config.temporal, config.sae.architecture
    if term.form == "none":
        return
    if term.partner not in ("next", "lag"):
        raise UsageError(
            f"architecture '{name}' sees whole rows, where partner '{term.partner}' is not drawn: use next"
        )
    form = TERMS.get(term.form)
    if form.whole_windows or not form.mean_over_windows:
        what = f"'{term.form}' is no mean over pairs of tokens"
        raise UsageError(f"architecture '{name}' sees whole rows and {what}: use another --temporal")


def view_of(data: DataConfig) -> View:
    """What a data configuration shows of the store."""
    if data.view == "windows":
        return Windows(data.window, max(1, data.siblings))
    return Pairs(data.pair_draw, data.pair_loss == "current") if data.view == "pairs" else Rows()


def default_width(config: SAEConfig, d_model: int) -> int:
    """``expansion`` × ``d_model``, rounded to a power of two if the configuration says so."""
    width = config.expansion * d_model
    return 2 ** round(math.log2(width)) if config.round_width else max(1, round(width))


def tokens_per_step(config: TrainConfig) -> int:
    """Tokens of a batch after what fills no window (or pair) is dropped; of rows, so many on average."""
    return view_of(config.data).tokens_per_batch(config.data.batch_size)


def _without_term(config: TrainConfig) -> TrainConfig:
    fields = type(config.temporal)().model_dump()
    return changed(
        config, {f"temporal.{key}": value for key, value in (fields | {"form": "none", "weight": 0.0}).items()}
    )


def _add(members: dict[str, MemberPlan], plan: MemberPlan) -> None:
    known = members.get(plan.name)
    if known is None:
        members[plan.name] = plan
    elif known.config != plan.config:
        raise UsageError(f"two runs of this sweep would both be called {plan.name}: sweep fewer keys at once")
    elif plan.role == "twin" and known.twin is None:
        members[plan.name] = plan  # it stood alone in the grid, now it has another half


def _name(config: TrainConfig, at: Location, grid: Mapping[str, Sequence[str]], *, twin: bool = False) -> str:
    """``l12-topk64-pairwise0.1-w5-s0`` and whatever else was swept; ``run.name`` replaces it, or goes before it in a
    sweep.
    """
    temporal, sae = config.temporal, config.sae
    kind = sae.activation if sae.architecture == "sae" else sae.architecture
    fixed = ARCHITECTURES.get(sae.architecture).fixes_sparsity(sae)
    objective = objective_of(config, 1, 1)
    sparsity = f"{objective.sparsity_weight:g}"
    if config.loss.target_l0:
        sparsity = f"-l0-{config.loss.target_l0:g}" + ("-quadratic" if objective.l0_aim else "")
    parts = [at.short, f"{kind}{sae.k}" if fixed else f"{kind}{sparsity}"]
    shown = {*_NAMED, "sae.groups", "loss.target_l0", "loss.l0_penalty"}
    pairs = config.data.view == "pairs"
    parts += [f"groups{_value(config, 'sae.groups')}"] if len(sae.groups) > 1 else []
    if temporal.form == "none":
        windows = [f"w{config.data.window}"] if ARCHITECTURES.get(sae.architecture).sees == "window" else []
        parts += ["none", *(["pairs"] if pairs else windows)]
        shown |= {"data.window"} if windows else set()
        shown |= {field for field in grid if field.startswith("temporal.")}
    else:
        windows = [] if pairs else [f"w{config.data.window}"]
        parts += [f"{temporal.form}{temporal.weight:g}", *_variant(config), *windows]
        shown |= {
            "temporal.form",
            "temporal.weight",
            "temporal.partner",
            "temporal.lag",
            "temporal.scope",
            "temporal.per_feature",
            "data.window",
        }
    parts += [f"{field.split('.')[1]}{_value(config, field)}" for field in grid if field not in shown]
    own = "-".join([*parts, f"s{config.run.seed}"])
    if not config.run.name:
        return own
    if grid:
        return f"{config.run.name}-{own}"
    return f"{config.run.name}-twin" if twin else config.run.name


def _variant(config: TrainConfig) -> list[str]:
    temporal = config.temporal
    partner = {"next": [], "lag": [f"lag{temporal.lag}"]}.get(temporal.partner, [temporal.partner])
    partner += [f"scope{temporal.scope:g}"] if temporal.scope < 1 else []
    return partner + ([f"per-{temporal.per_feature}"] if temporal.per_feature != "none" else [])


def _value(config: TrainConfig, field: str) -> str:
    group, _, key = field.partition(".")
    value = getattr(getattr(config, group), key)
    if isinstance(value, tuple):
        return "-".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
