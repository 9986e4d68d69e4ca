"""What a step minimises, resolved to numbers, and what it reports. Shared by the dense and the sparse step.

total = reconstruction + λ1 · sparsity + λ2 · temporal + α · auxiliary        eq 7 of the TC-SAE paper, and AuxK
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from ..config import SAEConfig, TrainConfig
from ..sae.registry import ARCHITECTURES
from .registry import PARTNERS


@dataclass(frozen=True)
class TemporalTerm:
    """λ2 L_temp: its form, weight λ2, partner, and the first ``n_features`` of the dictionary that it sees."""

    form: str = "none"
    weight: float = 0.0
    partner: str = "next"
    lag: int = 1
    n_features: int = 0
    similarity: str = "cosine"
    temperature: float = 0.1
    feature_weights: Tensor | None = field(default=None, compare=False, repr=False)
    """λ2 of every feature [F], in units of ``weight``; None: 1 each."""

    @property
    def active(self) -> bool:
        """Whether the term contributes at all."""
        return self.form != "none" and self.weight > 0


@dataclass(frozen=True)
class Objective:
    """Weights of every term.

    ``decoder_norms``: Σ z_i ‖W_dec,i‖ instead of Σ z_i. ``aux_k``: dead features per token in AuxK. ``groups``: size
    and weight of every prefix of the dictionary that reconstructs by itself; empty: the whole, with weight 1.
    ``l0_aim``: jumprelu's penalty is 2/aim (L0 − aim)² of every token; 0: it is L0. ``aux_normalised``: AuxK is divided
    by the variance of what it reconstructs. ``current_only``: of pairs of an earlier token and a token, the earlier one
    has no term of its own.
    """

    sparsity_weight: float = 0.0
    decoder_norms: bool = False
    temporal: TemporalTerm = field(default_factory=TemporalTerm)
    aux_k: int = 0
    aux_weight: float = 0.0
    groups: tuple[tuple[int, float], ...] = ()
    l0_aim: float = 0.0
    aux_normalised: bool = False
    current_only: bool = False

    def warmed(self, sparsity: float, temporal: float) -> Objective:
        """The same with λ1 and λ2 multiplied by their warm-up's factors."""
        if sparsity == temporal == 1.0:
            return self
        term = replace(self.temporal, weight=self.temporal.weight * temporal)
        return replace(self, sparsity_weight=self.sparsity_weight * sparsity, temporal=term)

    def steered(self, factor: float) -> Objective:
        """The same with sparsity ``factor`` times as strict: λ1 times that, or the aim for L0 divided by it."""
        if self.l0_aim:
            return replace(self, l0_aim=self.l0_aim / factor)
        return replace(self, sparsity_weight=self.sparsity_weight * factor)


@dataclass(frozen=True)
class StepResult:
    """Terms of one batch, detached 0-d float32 and unweighted (``total`` is the weighted sum), and who fired.

    ``error`` is the mean over tokens of Σ_d (x − x̂)² of the whole dictionary: the same as ``reconstruction``, unless
    the prefixes of a nested dictionary have their part in that.

    ``fired_F`` [F] int64 counts the tokens of the batch on which each feature was active.
    """

    total: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    temporal: Tensor
    auxiliary: Tensor
    error: Tensor
    fired_F: Tensor


def objective_of(config: TrainConfig, d_model: int, n_features: int) -> Objective:
    """The objective of a configuration for an SAE of these widths."""
    sae, loss = config.sae, config.loss
    kind = ARCHITECTURES.get(sae.architecture)
    fixed = kind.fixes_sparsity(sae)
    aim = loss.target_l0 if loss.l0_penalty == "quadratic" else 0.0
    l1 = (1.0 if aim else kind.default_l1(sae)) if loss.l1 < 0 else loss.l1
    return Objective(
        sparsity_weight=0.0 if fixed else l1,
        decoder_norms=loss.decoder_norms and sae.decoder == "free" and not fixed,
        temporal=_term_of(config, n_features),
        aux_k=(loss.aux_k or max(1, d_model // 2)) if fixed else 0,
        aux_weight=kind.auxiliary_weight(sae, loss.aux_weight),
        groups=_groups_of(sae, n_features),
        l0_aim=aim,
        aux_normalised=loss.aux_normalised,
        current_only=config.data.view == "pairs" and config.data.pair_loss == "current",
    )


def group_sizes(sae: SAEConfig, n_features: int) -> tuple[int, ...]:
    """Features in every prefix of a dictionary with nested groups; the last is the whole."""
    return tuple(max(1, round(fraction * n_features)) for fraction in sae.groups)


def _groups_of(sae: SAEConfig, n_features: int) -> tuple[tuple[int, float], ...]:
    """Size and weight of every prefix; the published loss is the mean of weight × error over the prefixes."""
    sizes = group_sizes(sae, n_features)
    weights = sae.group_weights or (1.0,) * len(sizes)
    groups = tuple((size, weight / len(sizes)) for size, weight in zip(sizes, weights, strict=True))
    return () if groups == ((n_features, 1.0),) else groups


def _term_of(config: TrainConfig, n_features: int) -> TemporalTerm:
    temporal = config.temporal
    if temporal.form == "none":
        return TemporalTerm(n_features=max(1, round(temporal.scope * n_features)))
    form = PARTNERS.get(temporal.partner).form  # which some partners replace
    return TemporalTerm(
        form=form or temporal.form,
        weight=temporal.weight,
        partner=temporal.partner,
        lag=temporal.lag if temporal.partner == "lag" else 1,
        n_features=max(1, round(temporal.scope * n_features)),
        similarity=temporal.similarity,
        temperature=temporal.temperature,
    )
