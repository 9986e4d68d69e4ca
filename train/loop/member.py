"""A member: one SAE with its optimiser, schedule and dead-feature counters; what a checkpoint keeps of it.

Members know nothing of each other, of the disk, or of how batches come about; :mod:`.stack` steps them, alone or
together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..loss.objective import Objective, StepResult, objective_of
from ..plan import RUNNING_FROM, MemberPlan, tokens_per_step
from ..sae.protocol import SparseAutoencoder
from ..sae.registry import ARCHITECTURES
from .distributed import World
from .feature_weights import EVERY, WINDOWS, FeatureWeights, neighbour_sums
from .optimiser import PlainAdam, PlainAdamW
from .schedule import warmup_factor
from .sparsity_target import SparsityTarget

_MOST_DEAD_AFTER, _FEWEST_DEAD_STEPS, _DEAD_SHARE = 10_000_000, 20, 0.05


@dataclass(frozen=True)
class Update:
    """What a step did: its terms, the weights they had (warm-ups included), the gradient's norm before clipping, the
    rate.
    """

    result: StepResult
    objective: Objective
    grad_norm: Tensor
    lr: float

    @property
    def is_finite(self) -> bool:
        """Whether the loss and the gradient are finite; waits for the device."""
        return math.isfinite(self.result.total) and math.isfinite(self.grad_norm)


class Member:
    """One SAE in training.

    Args:
        plan: what it is.
        mean_D: mean of the scaled inputs, for the decoder's bias.
        device: where it trains.
        compute_dtype: of the products.
        world: the processes that share every batch.

    """

    def __init__(
        self,
        plan: MemberPlan,
        mean_D: Tensor,
        device: torch.device,
        compute_dtype: torch.dtype,
        world: World = World(),  # noqa: B008
    ):
        self.plan, self.config, self.world = plan, plan.config, world
        self.compute_dtype = compute_dtype
        self.sae = _new_sae(plan, mean_D).to(device).train()
        self.objective = objective_of(self.config, plan.d_model, self.sae.n_features)
        self.optimiser = _new_optimiser(self.sae, self.config)
        self.idle_F = torch.zeros(
            self.sae.n_features, dtype=torch.int64, device=device
        )  # tokens since each feature fired
        self.dead_after = dead_after(self.config)
        target = self.config.loss.target_l0
        self.target = SparsityTarget(target, device) if target else None
        rule = self.config.temporal.per_feature
        weighs = rule != "none" and self.objective.temporal.active
        self.feature_weights = FeatureWeights(rule, self.sae.n_features, device) if weighs else None
        self.step = plan.begun_at

    @property
    def place(self) -> tuple[int, int]:
        """Which step of how many this is, of the part of the run that is trained now."""
        return self.step - self.plan.begun_at, self.config.run.steps - self.plan.begun_at

    def _warmed(self, share: float) -> float:
        """The factor of a weight that grows over a share of the run; an extension begins with all of it."""
        return 1.0 if self.plan.begun_at else warmup_factor(self.step, self.config.run.steps, share)

    @property
    def dead(self) -> Tensor:
        """Bool [F]: features that have not fired for ``dead_after`` tokens."""
        return self.idle_F >= self.dead_after

    def current_objective(self) -> Objective:
        """The terms of this step and their weights, warm-ups included."""
        config = self.config
        warmed = self.objective.warmed(self._warmed(config.loss.l1_warmup), self._warmed(config.temporal.warmup))
        if self.feature_weights is not None:
            term = replace(warmed.temporal, feature_weights=self.feature_weights.value_F)
            warmed = replace(warmed, temporal=term)
        return warmed if self.target is None else warmed.steered(self.target.factor)

    def after_step(self, result: StepResult, x_NWD: Tensor, n_tokens: int, share: float) -> None:
        """What follows from a step that changed the weights.

        Args:
            result: of the whole batch.
            x_NWD: this process's share of it.
            n_tokens: of the whole batch.
            share: of its tokens that this process has.

        """
        if self.feature_weights is not None:
            self._look_at_features(self.feature_weights, result, x_NWD, n_tokens, share)
        warm = self._warmed(self.config.loss.l1_warmup) == 1.0
        if self.target is not None and warm:
            self.target.observe(result.fired_F, n_tokens)
        threshold = self.sae.running_threshold
        if threshold is not None and self.config.sae.threshold_rule == "running" and self.step == RUNNING_FROM:
            threshold.fill_(-1.0)  # it begins anew with the next step
        self.step += 1

    @torch.no_grad()
    def _look_at_features(
        self, weights: FeatureWeights, result: StepResult, x_NWD: Tensor, n_tokens: int, share: float
    ) -> None:
        weights.count(result.fired_F, n_tokens)
        if self.step % EVERY:
            return
        if weights.rule == "autocorrelation":
            sums_SF = neighbour_sums(self.sae.encode(x_NWD[:WINDOWS]))
            weights.compare(self.world.mean(sums_SF, share))
        weights.settle()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed member needs to go on bit for bit."""
        weights = {name: _alone(tensor) for name, tensor in self.sae.state_dict().items()}
        state = {"sae": weights, "optimiser": self.optimiser.state_dict(), "idle": _alone(self.idle_F)}
        if self.target is not None:
            state["target"] = self.target.state_dict()
        if self.feature_weights is not None:
            state["feature_weights"] = self.feature_weights.state_dict()
        return state | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self.sae.load_state_dict(state["sae"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.idle_F.copy_(state["idle"])
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        if self.feature_weights is not None:
            self.feature_weights.load_state_dict(state["feature_weights"])
        self.step = state["step"]


def _alone(tensor: Tensor) -> Tensor:
    """Out of the stack it may be a part of: a file that holds a view holds all that is viewed."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def dead_after(config: TrainConfig) -> int:
    """Tokens without firing after which a feature counts as dead."""
    per_step = tokens_per_step(config)
    share = max(_FEWEST_DEAD_STEPS * per_step, round(_DEAD_SHARE * config.run.steps * per_step))
    return config.loss.dead_after or min(_MOST_DEAD_AFTER, share)


def _new_sae(plan: MemberPlan, mean_D: Tensor) -> SparseAutoencoder:
    sae = ARCHITECTURES.get(plan.config.sae.architecture).build(plan.config.sae, plan.d_model)
    sae.initialise(plan.config.sae, plan.config.run.seed, mean_D)
    return sae


def _new_optimiser(sae: SparseAutoencoder, config: TrainConfig) -> torch.optim.Optimizer:
    chosen = config.optimiser
    kept, fast = sae.decoder_parameters(), sae.fast_parameters()
    apart = {id(parameter) for parameter in (*kept, *fast)}
    decayed = [parameter for parameter in sae.parameters() if id(parameter) not in apart]
    if chosen.decay_decoder:
        decayed, kept = decayed + kept, []
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": chosen.weight_decay}]
    groups += [{"params": kept, "weight_decay": 0.0}]
    if fast:
        # Thresholds are of the size of pre-activations, 1, and weights of 1/√D: at one rate they would take √D times as
        # long.
        times = chosen.threshold_rate or math.sqrt(sae.d_model)
        groups.append({"params": fast, "weight_decay": 0.0, "times": times})
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {"lr": chosen.lr, "betas": chosen.betas, "fused": True}
    if chosen.name == "adam":
        return PlainAdam([group | {"weight_decay": 0.0} for group in groups], **common)
    return PlainAdamW(groups, **common)
