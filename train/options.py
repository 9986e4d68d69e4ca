"""The options of ``pipeline train`` by name: from the command line and from Python to a configuration and a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from .. import options
from ..errors import UsageError
from .config import TrainConfig
from .plan import OPTIONS, as_count, parse_sweep
from .presets import build_config


class TrainOptions(TypedDict, total=False):
    """The options under their names in Python; one that is None is left at its default.

    ``pipeline train --help`` and :class:`~tcsae.train.config.TrainConfig` say what each is.
    """

    store: str | Path | None
    architecture: str | None
    activation: str | None
    width: int | str | None
    k: int | str | None
    groups: str | Sequence[float] | None
    """Nested groups: fractions of the dictionary rising to 1, ``[0.2, 1]`` or ``0.2,1``."""
    decoder: Literal["unit", "free"] | None
    l1: float | None
    target_l0: float | None
    temporal: str | None
    temporal_weight: float | str | Mapping[int, float] | None
    """λ2, or that of every layer: ``{5: 0.1, 12: 0.03}`` or ``5=0.1,12=0.03``."""
    temporal_partner: str | None
    temporal_lag: int | None
    temporal_scope: float | None
    temporal_per_feature: Literal["none", "autocorrelation", "density"] | None
    window: int | None
    steps: int | str | None
    tokens: int | str | None
    batch_size: int | str | None
    lr: float | None
    warmup: int | None
    seed: int | None
    init_from: str | Path | None
    """An SAE of any readable format, whose weights training begins with."""
    baseline: bool | None
    pool: int | str | None
    scale: Literal["rms", "none"] | None
    norm_filter: float | None
    data_seed: int | None
    only: Literal["system", "user", "assistant", "tool"] | None
    """Of a store of conversations: only tokens in messages of this role."""
    preset: Literal["modern", "paper", "tfa", "tsae"] | None
    step: Literal["auto", "autograd", "fast"] | None
    plugin: str | Path | Sequence[str | Path] | None
    device: str | None
    dtype: str | None
    out: str | Path | None
    name: str | None
    log: str | Sequence[str] | None
    log_every: int | None
    checkpoint_every: int | None
    checkpoint_minutes: float | None
    local_cache: float | None
    """GB of a store on object storage that are kept on this machine."""
    cache_dir: str | Path | None


def train_config(config: str | Path | None = None, **asked: Unpack[TrainOptions]) -> TrainConfig:
    """The configuration that options mean: preset < file < options.

    Args:
        config: a TOML file with any field (``pipeline train --show-config`` prints one).
        asked: the options.

    Raises:
        UsageError: no such option, or a value that cannot be.

    """
    given = options.chosen(asked, TrainOptions, "train")
    preset = given.pop("preset", None)
    for name in ("log", "plugin"):
        if name in given:
            given[name] = options.several(given[name])
    weights = given.get("temporal_weight")
    by_layer = weights if isinstance(weights, Mapping) else _by_layer(weights)
    if by_layer is not None:
        del given["temporal_weight"]
    changes = {OPTIONS[name.replace("_", "-")]: value for name, value in given.items()}
    if weights is not None:  # one number, too, takes the place of a table in a file
        changes["temporal.weight_by_layer"] = dict(by_layer or {})
    return build_config(preset, config, {field: as_count(field, value) for field, value in changes.items()})


def extension(**asked: Unpack[TrainOptions]) -> dict[str, Any]:
    """What options mean for ``--extend``: ``steps``, ``tokens`` and ``changes``, dotted field → value.

    Raises:
        UsageError: an option that would make another run of it.

    """
    given = options.chosen(asked, TrainOptions, "train")
    far = {name: as_count(f"run.{name}", given.pop(name)) for name in ("steps", "tokens") if name in given}
    if len(far) == 2:
        raise UsageError("--steps and --tokens both say how far: give one of them")
    fields = {"log": "run.log", "plugin": "run.plugins"} | {name: OPTIONS[name.replace("_", "-")] for name in _ANYWHERE}
    if other := next((name for name in given if name not in fields), None):
        may = ", ".join(f"--{name.replace('_', '-')}" for name in ("steps", "tokens", *fields))
        raise UsageError(
            f"--extend goes on with the settings of the run: leave out --{other.replace('_', '-')}; it takes {may}"
        )
    lists = {name: options.several(given[name]) for name in ("log", "plugin") if name in given}
    return {**far, "changes": {fields[name]: value for name, value in (given | lists).items()}}


_ANYWHERE = ("store", "device", "log_every", "checkpoint_every", "checkpoint_minutes")
"""Options that do not change what is computed, only where, and what is written of it."""


def _by_layer(weights: Any) -> dict[str, str] | None:
    """``5=0.1,12=0.03`` as layer → λ2, which the configuration checks; None where it is a single number."""
    if not isinstance(weights, str) or "=" not in weights:
        return None
    parts = [part.partition("=") for part in weights.split(",")]
    found = {layer.strip(): value.strip() for layer, _, value in parts}
    if len(found) < len(parts):
        raise UsageError(f"--temporal-weight {weights} names a layer twice: give each one λ2")
    return found


def sweep_grid(sweep: Mapping[str, Iterable[Any]] | Iterable[str]) -> dict[str, tuple[str, ...]]:
    """A sweep as ``{"temporal_weight": [0, 0.1]}`` or ``["temporal-weight=0,0.1"]``: dotted fields → values.

    Raises:
        UsageError: as :func:`tcsae.train.plan.parse_sweep`.

    """
    if not isinstance(sweep, Mapping):
        return parse_sweep(sweep)
    names = {key: key if "." in key else key.replace("_", "-") for key in sweep}
    return parse_sweep(f"{names[key]}={','.join(map(_written, options.several(sweep[key])))}" for key in sweep)


def _written(value: Any) -> str:
    """A value as ``--sweep`` takes it; one that is a list itself with colons."""
    return ":".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
