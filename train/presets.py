"""Presets, and the way of a configuration in and out of TOML: preset < file < flags.

``modern`` is what the groups of :mod:`.config` default to; ``paper`` is the TC-SAE paper taken literally, ``tsae``
Temporal SAE as published, ``tfa`` Temporal Feature Analysis as published, but for the inputs' scale (ours gives
E‖x‖² = d_model, and only biases know).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import RunError, UsageError
from ..plugins import load_plugins
from ..system.untrusted_files import read_bytes, reason
from .config import TrainConfig
from .loss.registry import PARTNERS, TERMS

_REMEDY = "name a TOML file with --config"

PAPER: dict[str, Any] = {
    "data.pool": 2048,
    "data.scale": "none",
    "data.norm_filter": 0.0,
    "sae.activation": "relu",
    "sae.expansion": 1.0,
    "sae.round_width": False,
    "sae.initial": "paper",
    "sae.decoder": "free",
    "sae.b_dec": "zero",
    "loss.l1": 0.04,
    "loss.decoder_norms": False,
    "loss.l1_warmup": 0.0,
    "loss.aux_weight": 0.0,
    "temporal.weight": 0.1,
    "optimiser.decay_decoder": True,
    "optimiser.warmup_share": 1.0,
    "optimiser.decay_share": 0.0,
}
TFA: dict[str, Any] = {  # Priors in Time (arXiv 2511.01836), the configuration for Gemma-2-2b
    "data.batch_size": 50_000,  # 100 rows of 500
    "data.norm_filter": 0.0,
    "sae.architecture": "tfa",
    "sae.activation": "topk",
    "sae.k": 192,
    "sae.expansion": 4.0,
    "sae.round_width": False,
    "sae.decoder": "free",
    "sae.b_dec": "zero",
    "loss.aux_weight": 0.0,
    "temporal.form": "none",
    "optimiser.lr": 1e-3,
    "optimiser.betas": (0.9, 0.95),
    "optimiser.weight_decay": 1e-4,
    "optimiser.decay_decoder": True,
    "optimiser.warmup": 200,
    "optimiser.warmup_share": 1.0,
    "optimiser.decay": "cosine",
    "optimiser.decay_share": 1.0,
    "optimiser.final_lr": 0.9,
}
TSAE: dict[str, Any] = {
    # Temporal SAE (arXiv 2511.05541): "train" is train_temporal.py of its repository (AI4LIFE-GROUP/temporal-saes) with
    # --contrastive, "trainer" TemporalMatryoshkaBatchTopKTrainer in trainers/temporal_sequence_top_k.py there, "buffer"
    # the ActivationBuffer. docs/METHOD.md says what differs.
    "data.batch_size": 8192,  # buffer: out_batch_size, of current tokens
    "data.scale": "none",  # trainSAE: normalize_activations is left at False
    "data.norm_filter": 0.0,  # buffer: none; BOS is dropped (remove_bos), as all special tokens are here
    "data.view": "pairs",
    "data.pair_draw": "token",  # train: --temporal r draws once per batch, which is "batch"
    "data.pair_loss": "current",  # trainer, loss: only x[:, 0] is reconstructed
    "sae.activation": "batchtopk",
    "sae.k": 20,  # train: --k
    "sae.width": 16384,  # train: dictionary_size
    "sae.groups": (0.2, 1.0),  # train: group_fractions .2 and .8
    "sae.group_weights": (0.2, 0.8),  # train: group_weights; trainer: their mean
    "sae.initial": "tied",  # trainer: W_enc is W_decᵀ, rows of norm 1
    "sae.decoder": "unit",  # trainer, update: remove_gradient_parallel…, set_decoder_norm_to_unit_norm
    "sae.b_dec": "geometric_median",  # trainer, update: at step 0
    "sae.threshold_rule": "running",  # trainer: threshold_beta .999, threshold_start_step 1000
    "loss.aux_weight": 1 / 32,  # trainer: auxk_alpha
    "loss.aux_k": 0,  # trainer: top_k_aux is half of d_model
    "loss.aux_normalised": True,  # trainer: get_auxiliary_loss
    "loss.dead_after": 10_000_000,  # trainer: dead_feature_threshold
    "temporal.form": "contrastive",  # train: --contrastive
    "temporal.partner": "earlier",  # train: --temporal r
    "temporal.weight": 0.1,  # train: --temp_alpha
    "temporal.weight_by_layer": {},
    "temporal.scope": 0.2,  # trainer: f_chunks[0]
    "temporal.similarity": "dot",  # trainer: logits are plain products …
    "temporal.temperature": 1.0,  # … without temperature
    "optimiser.name": "adam",  # trainer
    "optimiser.lr": 3e-4,  # train
    "optimiser.betas": (0.9, 0.999),  # trainer
    "optimiser.clip": 1.0,  # trainer, update
    "optimiser.warmup": 1000,  # train: warmup_steps
    "optimiser.warmup_share": 1.0,
    "optimiser.decay_share": 0.0,  # train: decay_start is left at None
}
PRESETS: dict[str, dict[str, Any]] = {"modern": {}, "paper": PAPER, "tfa": TFA, "tsae": TSAE}
# What members to be compared share: the sizes, the inputs, and a threshold that gives all of them the same L0.
_SHARED = {
    *("data.batch_size", "data.scale", "data.norm_filter", "sae.k", "sae.width", "sae.expansion", "sae.round_width"),
    *("sae.threshold_rule", "loss.dead_after", "optimiser.warmup_share"),
}


def _method(preset: Mapping[str, Any], *, as_plain: bool) -> dict[str, Any]:
    """What a preset says of its method, without what members to be compared must share.

    ``as_plain``: it begins and is optimised like the plain SAE. (Another beginning of b_dec takes a look at the store
    before it is read.)
    """
    kept = {field: value for field, value in preset.items() if field not in _SHARED}
    alike = ("optimiser.", "sae.b_dec")
    return {field: value for field, value in kept.items() if not (as_plain and field.startswith(alike))}


RIVALS: dict[str, dict[str, Any]] = {
    "plain": {"temporal.form": "none"},
    "TC-SAE": {},
    "T-SAE": _method(TSAE, as_plain=True),
    "TFA": _method(TFA, as_plain=False),  # its weights are of another size: decoder rows from N(0, 1), codes times λ
    "TXC": {"sae.architecture": "txc", "sae.k_of": "window", "temporal.form": "none"},
}
"""What ``--rivals`` trains, each as changes to the configuration: dictionaries that use time, and a plain one. A
crosscoder's k is of a window's code, so that a token's code has as many active features as everybody's.
"""


def rivals_of(config: TrainConfig) -> list[TrainConfig]:
    """Every rival (:data:`RIVALS`), laid over a configuration that says what they share: width, k, text, length."""
    return [changed(config, changes) for changes in RIVALS.values()]


def build_config(
    preset: str | None = None, file: str | Path | None = None, changes: Mapping[str, Any] | None = None
) -> TrainConfig:
    """A preset, a TOML file laid over it, and dotted changes (``{"sae.width": 4096}``) over both.

    Raises:
        UsageError: an unknown preset or key, a value that is not allowed, or a file that cannot be read.

    """
    written = read_toml(file) if file else {}
    # Before anything is checked, since what they register may be asked for.
    load_plugins((changes or {}).get("run.plugins") or written.get("run", {}).get("plugins", ()))
    chosen = preset or written.get("preset", "modern")
    if chosen not in PRESETS:
        raise UsageError(f"preset '{chosen}' is unknown: choose one of {', '.join(PRESETS)}")
    tree: dict[str, Any] = {"preset": chosen}
    flat = {f"{group}.{key}": value for group, key, value in _fields(written)}
    for name, value in {**PRESETS[chosen], **flat, **(changes or {})}.items():
        group, _, key = name.partition(".")
        tree.setdefault(group, {})[key] = value
    return validated(tree)


def validated(tree: Mapping[str, Any]) -> TrainConfig:
    """A configuration from nested plain values.

    Raises:
        UsageError: naming the first field that does not fit.

    """
    try:
        config = TrainConfig.model_validate(tree)
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}: {what} (got {first['input']!r})" if where else what) from failure
    _check_term(config)
    return config


def _check_term(config: TrainConfig) -> None:
    """Whether temporal term, partner and window go together; torch is imported only for what is not the default."""
    term, default, window = config.temporal, TrainConfig().temporal, config.data.window
    if term.form == "none" or (term.form, term.partner) == (default.form, default.partner):
        return
    form, partner = TERMS.get(term.form), PARTNERS.get(term.partner)
    if form.whole_windows and term.partner != "next":
        what = f"{term.form} compares the tokens of a window among themselves"
        raise UsageError(f"{what}, partner '{term.partner}' does not apply: use next")
    if partner.form is not None and term.form != "pairwise":
        what = f"partner {term.partner} is another form of pairwise ({partner.form})"
        raise UsageError(f"{what}: form '{term.form}' has none, use pairwise")
    if window < form.least_window:
        sizes = f"the temporal term '{term.form}' needs windows of at least {form.least_window} tokens"
        raise UsageError(f"{sizes}, data.window is {window}: give a larger --window")


def changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The same configuration with dotted ``changes``, checked again.

    Raises:
        UsageError: as :func:`validated`.

    """
    tree = config.model_dump()
    for name, value in changes.items():
        group, _, key = name.partition(".")
        tree.setdefault(group, {})[key] = value
    return validated(tree)


def read_toml(file: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UsageError: it is not there or is no TOML.

    """
    try:
        return tomllib.loads(
            read_bytes(file, most=1 << 20, missing=f"{file} is missing: {_REMEDY}", remedy=_REMEDY).decode()
        )
    except RunError as failure:
        raise UsageError(f"the configuration {failure}") from failure
    except RecursionError:
        raise UsageError(f"the configuration {file} is nested too deeply: write groups of fields") from None
    except ValueError as failure:
        raise UsageError(f"the configuration {file} is no TOML: {reason(failure)}") from failure


def show_toml(config: TrainConfig) -> str:
    """The configuration as TOML that :func:`build_config` reads back to the same."""
    tree = config.model_dump(mode="json")
    lines = [f"preset = {json.dumps(tree.pop('preset'))}"]
    for group, fields in tree.items():
        lines += ["", f"[{group}]", *(f"{key} = {_toml(value)}" for key, value in fields.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{ " + ", ".join(f"{key} = {json.dumps(each)}" for key, each in value.items()) + " }" if value else "{}"


def _fields(written: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for group, body in written.items():
        if group == "preset":
            continue
        if not isinstance(body, dict):
            groups = ", ".join(f"[{name}]" for name in TrainConfig.model_fields if name != "preset")
            raise UsageError(f"'{group}' is no table of the configuration: write one of {groups}")
        yield from ((group, key, value) for key, value in body.items())
