"""A new SAE without what repeats: near-duplicate features merged into one, position-locked features replaced by their
mean.

Shapes: F features before, K features after, D model width, N tokens.

Merging. Features are compared where their decoder rows have unit norm, so that a feature and its rescaled copy are one.
A group becomes one feature: encoder, bias, threshold and direction are averages weighted by energy, Σ_t z² ‖W_dec‖²,
which is how much each member did. Whether members used to fire together (their sum is wanted) or in turn (their mean
is) the data decides: one gain per merged feature, fitted by least squares so that the new contribution comes closest to
the members' joint one, stretches the decoder row. Otherwise the merged feature keeps the scale of its most energetic
member, the group's leader, so that a top-k competition is not tilted. Features that stand alone keep their weights to
the bit.

Dropping. What a position-locked feature adds on average is kept: its mean activation times its decoder row moves into
the decoder's bias, and where the encoder subtracts that bias, the encoder's bias takes back what the shift would
change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...train.sae.temporal_sae import TemporalSAE
from ..metrics.redundancy import duplicate_groups


@dataclass(frozen=True)
class Elimination:
    """Which features go where."""

    leader_F: Tensor  # int64: the feature a feature is merged into; itself where it stays or is dropped
    dropped_F: Tensor  # bool
    share_F: Tensor  # float64: of the energy of the feature's group
    kept_K: Tensor  # int64: the old numbers of the features that remain, ascending
    member_F: Tensor  # int64: the place in the new SAE of every feature, −1 for a dropped one
    merged_K: Tensor  # bool: stands for several

    @property
    def n_merged(self) -> int:
        """Features that disappear into another."""
        return len(self.leader_F) - int(self.dropped_F.sum()) - len(self.kept_K)


def plan_elimination(W_dec: Tensor, energy_F: Tensor, dropped_F: Tensor, *, min_cosine: float) -> Elimination:
    """Group what remains after dropping; a ``min_cosine`` above 1 merges nothing."""
    rows = torch.where(dropped_F[:, None], 0.0, W_dec)  # zero rows are like nothing
    leader_F = duplicate_groups(rows, energy_F, min_cosine=min_cosine)
    leads_F = leader_F == torch.arange(len(leader_F), device=leader_F.device)
    kept_K = (leads_F & ~dropped_F).nonzero().squeeze(1)
    place_F = torch.full_like(leader_F, -1)
    place_F[kept_K] = torch.arange(len(kept_K), device=place_F.device)
    member_F = torch.where(dropped_F, -1, place_F[leader_F])
    stays = member_F >= 0
    total_K = torch.zeros(len(kept_K), dtype=torch.float64, device=place_F.device)
    total_K.index_add_(0, member_F[stays], energy_F[stays])
    group_total_F = torch.where(stays, total_K[member_F.clamp(min=0)], 1.0)
    # Of a group that never fired the leader is as good as any.
    share_F = torch.where(group_total_F > 0, energy_F / group_total_F.clamp(min=1e-300), leads_F.double())
    merged_K = torch.bincount(member_F[stays], minlength=len(kept_K)) > 1
    return Elimination(leader_F, dropped_F, share_F, kept_K, member_F, merged_K)


@torch.no_grad()
def eliminate(sae: TemporalSAE, plan: Elimination, mean_F: Tensor) -> TemporalSAE:
    """The new SAE before gains are fitted. ``mean_F``: mean activations, for the features dropped."""
    kept_K, norm_F = plan.kept_K, sae.W_dec.double().norm(dim=1)
    norm_K = norm_F[kept_K].clamp(min=1e-30)

    def merge(values: Tensor, scale_F: Tensor, scale_K: Tensor) -> Tensor:
        """Values [F] or [F, D] times ``scale_F``, averaged by energy, over ``scale_K``; single ones unchanged."""
        stays, column = plan.member_F >= 0, (slice(None), *[None] * (values.dim() - 1))
        mean = torch.zeros((len(kept_K), *values.shape[1:]), dtype=torch.float64, device=values.device)
        mean.index_add_(0, plan.member_F[stays], ((plan.share_F * scale_F)[column] * values)[stays])
        return torch.where(plan.merged_K[column], (mean / scale_K[column]).float(), values[kept_K])

    directions_KD = merge(sae.W_dec, 1 / norm_F.clamp(min=1e-30), torch.ones_like(norm_K))
    stretch_K = torch.where(plan.merged_K, norm_K / directions_KD.double().norm(dim=1).clamp(min=1e-30), 1.0)
    activation = sae.activation
    if activation.k is not None:
        activation = replace(activation, k=min(activation.k, len(kept_K)))
    settings = {"subtract_b_dec": sae.subtract_b_dec, "metadata": sae.metadata}
    new = TemporalSAE(sae.d_model, len(kept_K), activation, **settings).to(sae.W_dec.device)
    new.W_dec.copy_(torch.where(plan.merged_K[:, None], directions_KD * stretch_K[:, None], directions_KD))
    new.W_enc.copy_(merge(sae.W_enc.T, norm_F, norm_K).T)
    new.b_enc.copy_(merge(sae.b_enc, norm_F, norm_K))
    if sae.threshold is not None and new.threshold is not None:
        new.threshold.copy_(merge(sae.threshold, norm_F, norm_K) if sae.threshold.dim() else sae.threshold)
    moved_D = (torch.where(plan.dropped_F, mean_F, 0.0) @ sae.W_dec.double()).float()
    new.b_dec.copy_(sae.b_dec + moved_D)
    if sae.subtract_b_dec:
        new.b_enc.add_(moved_D @ new.W_enc)
    return new.eval()


class GainFit:
    """Least-squares gains of the new features against the joint contribution of their members."""

    def __init__(self, old: TemporalSAE, new: TemporalSAE, plan: Elimination):
        self._new, self._member_F, self._merged_K = new, plan.member_F, plan.merged_K
        place_F = self._member_F.clamp(min=0)
        self._mine_F = (self._member_F >= 0) & self._merged_K[place_F]
        # What a member adds along the new feature's row, per unit of its activation, in units of that row.
        rows_FD = new.W_dec.detach().double()[place_F]
        self._along_F = (old.W_dec.detach().double() * rows_FD).sum(1) / rows_FD.square().sum(1).clamp(min=1e-300)
        self._top_K = torch.zeros(new.n_features, dtype=torch.float64, device=old.W_dec.device)
        self._bottom_K = torch.zeros_like(self._top_K)

    def update(self, old_z_NF: Tensor, new_z_NK: Tensor) -> None:
        """Take in the codes of the same tokens before and after."""
        members = self._mine_F.nonzero().squeeze(1)
        joint_NK = torch.zeros(new_z_NK.shape, dtype=torch.float64, device=new_z_NK.device)
        joint_NK.index_add_(1, self._member_F[members], old_z_NF[:, members].double() * self._along_F[members])
        self._top_K += (joint_NK * new_z_NK).sum(0)
        self._bottom_K += (new_z_NK.double() ** 2).sum(0)

    @torch.no_grad()
    def apply(self) -> None:
        """Stretch the decoder rows of merged features by their gains; one that never fires keeps its length."""
        fitted = self._merged_K & (self._bottom_K > 0)
        gain_K = torch.where(fitted, self._top_K / self._bottom_K.clamp(min=1e-300), 1.0)
        self._new.W_dec.mul_(gain_K[:, None].float())
