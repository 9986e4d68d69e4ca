"""What a training run is made of: six small frozen groups. Their defaults are the ``modern`` preset.

Neither torch nor a store is needed to check or print a configuration; what depends on the store (width, steps) is
resolved by :mod:`.plan`, what the user wrote is laid over the presets by :mod:`.presets`.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import UsageError
from ..registry import Registry
from .loss.registry import PARTNERS, TERMS
from .sae.registry import ACTIVATIONS, ARCHITECTURES

Step = Literal["auto", "autograd", "fast"]


def _registered(registry: Registry[Any], name: str) -> str:
    try:
        return registry.check(name)
    except UsageError as unknown:
        raise ValueError(str(unknown)) from None  # pydantic adds the field's name


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Group):
    """Which tokens are seen, in what order, and how they are scaled."""

    store: str = ""
    """Activation store of one layer, such as cache/l12.zarr."""
    window: int = Field(default=5, ge=1)
    """Consecutive tokens per window (T of the paper); 2 where pairs are seen."""
    batch_size: int = Field(default=2048, ge=1)
    """Tokens per step; what is left over after whole windows is dropped (2048 tokens are 409 windows of 5)."""
    pool: int = Field(default=0, ge=0)
    """Tokens of the pool that windows are shuffled in; 0: sized by memory."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Order of the windows. Apart from run.seed, so that seeds of a sweep share one stream."""
    siblings: int = Field(default=0, ge=0)
    """Windows of one row and document that are side by side in a batch; 0 or 1: none are. Chosen by itself for the
    partners same_document (2) and shuffled (8, or as many as a row holds).
    """
    view: Literal["windows", "pairs", "rows"] = "windows"
    """windows: of consecutive tokens. pairs: an earlier token of the document and a token; chosen by itself for the
    partner earlier. rows: whole, in order; chosen by itself for architectures that see rows.
    """
    pair_draw: Literal["token", "batch"] = "token"
    """pairs: whether the earlier token is drawn for every token, or its position once for a whole batch."""
    pair_loss: Literal["both", "current"] = "both"
    """pairs: whether both tokens have all terms of the loss, or the current one alone, as in Temporal SAE: the earlier
    token is then encoded for the temporal term only, and a batch is of so many current tokens.
    """
    scale: Literal["rms", "none"] = "rms"
    """rms: inputs are multiplied so that E‖x‖² = d_model, and the factor is folded into the saved weights. none: raw.
    """
    norm_filter: float = Field(default=10.0, ge=0)
    """Tokens with a norm above so many times the median are left out; 0: none are."""

    only: Literal["", "system", "user", "assistant", "tool"] = ""
    """Of a store of conversations: only tokens in messages of this role are trained on; empty: all are."""

    @field_validator("siblings", mode="before")
    @classmethod
    def _were_two_or_none(cls, value: Any) -> Any:
        return 2 * value if isinstance(value, bool) else value  # as records of before have it


class SAEConfig(_Group):
    """The autoencoder."""

    architecture: str = "sae"
    """sae: encoder, activation, decoder. Others, plug-ins among them, as registered (docs/EXTENDING.md)."""
    activation: str = "topk"
    """What turns pre-activations into codes; of the architectures that let it be chosen."""
    k: int = Field(default=64, ge=1)
    """Active features per token (topk) or on average over the batch (batchtopk); unused by relu and jumprelu."""
    width: int = Field(default=0, ge=0)
    """Features; 0: expansion × d_model."""
    groups: tuple[float, ...] = (1.0,)
    """Nested groups (Matryoshka): fractions of the dictionary, rising to 1. Every prefix reconstructs by itself."""
    group_weights: tuple[float, ...] = ()
    """Weight of every prefix's error; the loss takes the mean of weight × error over the prefixes. Empty: 1 each."""
    expansion: float = Field(default=8.0, gt=0)
    """Features per input dimension where width is 0."""
    round_width: bool = True
    """Whether expansion × d_model is rounded to a power of two."""
    initial: Literal["tied", "paper"] = "tied"
    """tied: random unit decoder rows, the encoder their transpose. paper: Kaiming-uniform encoder, orthogonal decoder.
    """
    decoder: Literal["unit", "free"] = "unit"
    """unit: decoder rows keep norm 1. free: they do not, and sparsity counts their norms unless loss.decoder_norms says
    no.
    """
    b_dec: Literal["mean", "geometric_median", "zero"] = "mean"
    """Where the decoder's bias begins: the mean of the store's tokens, the geometric median of a sample of them, or
    zero.
    """
    bandwidth: float = Field(default=0.05, gt=0)
    """jumprelu: width of the straight-through derivative."""
    threshold: float = Field(default=0.01, ge=0)
    """jumprelu: where the thresholds begin."""
    threshold_rule: Literal["calibrated", "running"] = "calibrated"
    """batchtopk: the threshold outside training. calibrated: mean over fresh batches, with the final weights, of the
    smallest active code, so that L0 is k. running: moving average of it over the steps from 1001 on, with momentum
    .999, as Temporal SAE and dictionary_learning have it.
    """
    window: int = Field(default=0, ge=0)
    """txc: positions that one code is of; 0: data.window."""
    k_of: Literal["token", "window"] = "token"
    """txc: a window's code has k · W active features (token), as many as W separate codes, or k (window)."""
    heads: int = Field(default=4, ge=1)
    """tfa: of the attention."""
    bottleneck: int = Field(default=1, ge=1)
    """tfa: keys and queries are so many times narrower than the dictionary."""
    tied: bool = True
    """tfa: whether the encoder is the decoder's transpose."""

    @field_validator("architecture")
    @classmethod
    def _known_architecture(cls, name: str) -> str:
        return _registered(ARCHITECTURES, name)

    @field_validator("activation")
    @classmethod
    def _known_activation(cls, name: str) -> str:
        return _registered(ACTIVATIONS, name)

    @field_validator("groups", "group_weights", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return re.split("[,:]", value) if isinstance(value, str) else value

    @field_validator("groups")
    @classmethod
    def _rise_to_one(cls, groups: tuple[float, ...]) -> tuple[float, ...]:
        if not groups or groups[0] <= 0 or groups[-1] != 1 or any(b <= a for a, b in itertools.pairwise(groups)):
            raise ValueError("groups are fractions of the dictionary that rise to 1, such as 0.2,1")
        return groups

    @model_validator(mode="after")
    def _a_weight_for_every_group(self) -> SAEConfig:
        given = self.group_weights
        if given and (len(given) != len(self.groups) or min(given) < 0 or max(given) == 0):
            raise ValueError(
                f"there are {len(self.groups)} groups and {len(given)} sae.group_weights: give one weight ≥ 0 for each "
                "group, not all of them 0"
            )
        return self


class LossConfig(_Group):
    """Sparsity and dead features."""

    l1: float = Field(default=-1.0, ge=-1)
    """λ1 on Σ z (relu) or on L0 (jumprelu); −1: 1.5 for relu, 0.3 for jumprelu, 1 for its quadratic penalty. Unused by
    topk and batchtopk.
    """
    target_l0: float = Field(default=0.0, ge=0)
    """Active features per token that training ends at, by a controller on λ1 that begins at l1; 0: l1 stays as it is.
    """
    l0_penalty: Literal["linear", "quadratic"] = "linear"
    """jumprelu: λ1 weighs L0, or 2/L0* (L0 − L0*)² of every token, with the target for L0* (Gemma Scope 2)."""
    decoder_norms: bool = True
    """Whether Σ z weighs every feature with its decoder row's norm (only matters where rows are free)."""
    l1_warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the run over which λ1 grows from zero."""
    aux_weight: float = Field(default=1 / 32, ge=0)
    """Weight of AuxK, by which dead features learn the residual (arXiv 2406.04093, appendix A.2); topk and batchtopk
    only.
    """
    aux_k: int = Field(default=0, ge=0)
    """Dead features per token in AuxK; 0: half of d_model."""
    aux_normalised: bool = False
    """Whether AuxK is divided by the variance of the residual, as in dictionary_learning and Temporal SAE."""
    dead_after: int = Field(default=0, ge=0)
    """Tokens without firing after which a feature counts as dead; 0: 5 % of the run, at least 20 steps, at most 10M
    tokens.
    """


class TemporalConfig(_Group):
    """The temporal term, λ2 L_temp, and its controls."""

    form: str = "pairwise"
    """How two codes are compared; none: there is no temporal term."""
    weight: float = Field(default=0.03, ge=0)
    """λ2."""
    weight_by_layer: dict[int, float] = {}
    """λ2 of stores by their layer, instead of weight: {5 = 0.1, 12 = 0.03}. A layer that is missing is refused."""
    partner: str = "next"
    """Whom a token is compared with; everything but next is a control."""
    lag: int = Field(default=1, ge=1)
    """Distance for partner lag."""
    scope: float = Field(default=1.0, gt=0, le=1)
    """The first fraction of the dictionary that the term sees."""
    warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the run over which λ2 grows from zero."""
    per_feature: Literal["none", "autocorrelation", "density"] = "none"
    """Whether λ2 differs between features, by each one's own lag-1 correlation or density; the mean over active entries
    is λ2.
    """
    similarity: Literal["cosine", "dot"] = "cosine"
    """contrastive: how codes are compared."""
    temperature: float = Field(default=0.1, gt=0)
    """contrastive: divides the similarities."""

    @field_validator("form")
    @classmethod
    def _known_form(cls, name: str) -> str:
        return name if name == "none" else _registered(TERMS, name)

    @field_validator("partner")
    @classmethod
    def _known_partner(cls, name: str) -> str:
        return _registered(PARTNERS, name)

    @field_validator("weight_by_layer")
    @classmethod
    def _weights_of_layers(cls, weights: dict[int, float]) -> dict[int, float]:
        if any(layer < 0 or weight < 0 for layer, weight in weights.items()):
            raise ValueError("layers are counted from 0, and λ2 is at least 0")
        return weights


class OptimiserConfig(_Group):
    """Gradient descent."""

    name: Literal["adamw", "adam"] = "adamw"
    """adamw decays weights apart from the gradient; adam does not decay."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's averages of the gradient and of its square."""
    threshold_rate: float = Field(default=0.0, ge=0)
    """jumprelu: learning rate of the thresholds, in units of lr; 0: √d_model."""
    weight_decay: float = Field(default=0.01, ge=0)
    """adamw's decay (0.01 is its default)."""
    decay_decoder: bool = False
    """Whether the decoder is decayed too."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm over all weights; 0: no clipping."""
    warmup: int = Field(default=1000, ge=0)
    """Steps over which the learning rate grows from zero …"""
    warmup_share: float = Field(default=0.05, ge=0, le=1)
    """… but at most this share of the run."""
    decay_share: float = Field(default=0.2, ge=0, le=1)
    """Last share of the run over which the learning rate falls to its end; at most what the warm-up leaves."""
    decay: Literal["linear", "cosine"] = "linear"
    """How it falls."""
    final_lr: float = Field(default=0.0, ge=0, le=1)
    """Where it ends, as a share of its peak."""


class RunConfig(_Group):
    """How long, where, and what is written."""

    steps: int = Field(default=0, ge=0)
    """Optimiser steps; 0: as many as tokens says."""
    tokens: int = Field(default=0, ge=0)
    """Tokens to train on; 0: each counted token of the store once."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the initial weights."""
    init_from: str = ""
    """An SAE of any readable format, by path or hub id, whose weights training begins with; the twin's too."""
    out: str = "runs"
    """Folder of the run folders."""
    name: str = ""
    """Name of the run's folder; empty: made from the configuration."""
    baseline: bool = True
    """Whether the twin with λ2 = 0 trains on the same stream."""
    step: Step = "auto"
    """fast: by hand, on active entries alone. autograd: always possible. auto: by hand where that was derived."""
    plugins: tuple[str, ...] = ()
    """Python files that register something of the user's own; their hashes are kept in the record."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the products; weights stay float32. auto: bfloat16 where the hardware has it."""
    log: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    """Where metrics go beside metrics.jsonl, which is always written."""
    log_every: int = Field(default=50, ge=1)
    """Steps between two lines of metrics."""
    checkpoint_every: int = Field(default=1000, ge=1)
    """Steps between two checkpoints."""
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    """A checkpoint is also written after so many minutes; 0: it is not."""
    local_cache: float = Field(default=0.0, ge=0)
    """GB of the store that are kept on this machine's disk once they were read; 0: none."""
    cache_dir: str = ""
    """Their folder, which several processes may share; empty: ``~/.cache/tcsae``."""


class TrainConfig(_Group):
    """Everything about one SAE's training."""

    preset: Literal["modern", "paper", "tfa", "tsae"] = "modern"
    """Which preset the rest was laid over."""
    data: DataConfig = DataConfig()
    sae: SAEConfig = SAEConfig()
    loss: LossConfig = LossConfig()
    temporal: TemporalConfig = TemporalConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        form, partner = self.temporal.form, self.temporal.partner
        if form == "none":
            return self
        lag = self.temporal.lag if partner == "lag" else 1
        if self.data.window <= lag:
            raise ValueError(
                f"a window of {self.data.window} has no pairs at distance {lag}: make data.window at least {lag + 1}"
            )
        return self
