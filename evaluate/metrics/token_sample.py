"""A bounded uniform sample of tokens with their codes and activations, for what compares tokens that lie far apart.

Shapes: M tokens of the sample, N tokens of a batch, D model width, E active entries, K features.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate

import torch
from torch import Tensor

from ..intervals.jackknife import group_of
from ..protocol import State, TokenBatch
from .active_entries import ActiveEntries, uniform_hash


@dataclass(frozen=True)
class SampledTokens:
    """Some tokens and the features active there."""

    priority_M: Tensor  # float64, the hash that decides
    x_MD: Tensor  # float32; [M, 0] where activations are not kept
    document_M: Tensor  # int64, like all that follow
    token_M: Tensor
    position_M: Tensor
    row_M: Tensor
    group_M: Tensor
    unit_M: Tensor
    label_M: Tensor  # −1: none
    class_M: Tensor  # −1: not known
    slot_E: Tensor  # int32, which token
    feature_E: Tensor  # int32
    value_E: Tensor  # float32

    def __len__(self) -> int:
        return len(self.priority_M)

    def dense(self, features_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes float32 [M, K] of the features asked for, or of all that are active in the sample; and which, [K]."""
        features = torch.unique(self.feature_E).long() if features_K is None else features_K
        last = max([int(part.max()) for part in (features, self.feature_E) if len(part)], default=0)
        column_F = torch.full((last + 1,), -1, dtype=torch.int64, device=features.device)
        column_F[features] = torch.arange(len(features), device=features.device)
        column_E = column_F[self.feature_E.long()]
        asked = column_E >= 0
        z_MK = torch.zeros(len(self), len(features), device=self.value_E.device)
        z_MK[self.slot_E[asked].long(), column_E[asked]] = self.value_E[asked]
        return z_MK, features

    def keep(self, chosen: Tensor) -> SampledTokens:
        """These tokens in this order."""
        slot_M = torch.full((len(self),), -1, dtype=torch.int32, device=chosen.device)
        slot_M[chosen] = torch.arange(len(chosen), dtype=torch.int32, device=chosen.device)
        slot_E = slot_M[self.slot_E.long()]
        stays = slot_E >= 0
        of_tokens = {name: getattr(self, name)[chosen] for name in _OF_TOKENS}
        return SampledTokens(
            **of_tokens, slot_E=slot_E[stays], feature_E=self.feature_E[stays], value_E=self.value_E[stays]
        )

    @classmethod
    def join(cls, parts: list[SampledTokens]) -> SampledTokens:
        """One after the other."""
        firsts = accumulate((len(part) for part in parts[:-1]), initial=0)
        joined = {one.name: torch.cat([getattr(part, one.name) for part in parts]) for one in fields(cls)}
        joined["slot_E"] = torch.cat([part.slot_E + first for part, first in zip(parts, firsts, strict=True)])
        return cls(**joined)


_OF_TOKENS = [one.name for one in fields(SampledTokens) if not one.name.endswith("_E")]


class TokenSample:
    """The ``size`` counted tokens with the smallest hash of (seed, row, position), in whatever batches.

    Args:
        size: how many tokens; twice as many are held on the way.
        d_model: width of the activations that are kept; 0 keeps none.
        seed: of the hash.
        device: of the batches.

    """

    def __init__(self, size: int, d_model: int, seed: int, device: torch.device):
        self._size, self._d_model, self._seed = size, d_model, seed

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty((0, *shape), dtype=dtype, device=device)

        whole = {name: empty(torch.int64) for name in _OF_TOKENS}
        whole |= {"priority_M": empty(torch.float64), "x_MD": empty(torch.float32, d_model)}
        entries = {"slot_E": empty(torch.int32), "feature_E": empty(torch.int32), "value_E": empty(torch.float32)}
        self._parts = [SampledTokens(**whole, **entries)]
        self._limit = 1.0  # tokens whose hash is not below it are not of the sample

    def update(self, batch: TokenBatch, active: ActiveEntries) -> None:
        """Take one batch in."""
        rows = batch.rows_B.cpu().numpy()[:, None]
        positions = torch.arange(active.context).numpy()[None]
        priority_N = torch.from_numpy(uniform_hash(self._seed, rows, positions)).reshape(-1).to(batch.x_BTD.device)
        new = (active.valid_N & (priority_N < self._limit)).nonzero().squeeze(1)
        if not len(new):
            return
        slot_N = torch.full((active.n_tokens,), -1, dtype=torch.int32, device=new.device)
        slot_N[new] = torch.arange(len(new), dtype=torch.int32, device=new.device)
        slot_E = slot_N[active.token_E]
        mine = slot_E >= 0
        part = SampledTokens(
            priority_M=priority_N[new],
            x_MD=batch.x_BTD.reshape(active.n_tokens, -1)[new, : self._d_model].float(),
            document_M=batch.documents_BT.reshape(-1)[new].long(),
            token_M=batch.tokens_BT.reshape(-1)[new].long(),
            position_M=new % active.context,
            row_M=batch.rows_B[new // active.context].long(),
            group_M=group_of(batch.units_BT)[new],
            unit_M=batch.units_BT.reshape(-1)[new].long(),
            label_M=batch.labels_BT.reshape(-1)[new].long(),
            class_M=batch.classes_BT.reshape(-1)[new].long(),
            slot_E=slot_E[mine],
            feature_E=active.feature_E[mine].int(),
            value_E=active.value_E[mine].float(),
        )
        self._take(part)

    def _take(self, part: SampledTokens) -> None:
        self._parts.append(part)
        if sum(map(len, self._parts)) >= 2 * self._size:  # not after every batch: it copies all of the sample
            self.taken()

    def state(self) -> State:
        """What it holds: the sample of its rows."""
        sample = self.taken()
        return {one.name: getattr(sample, one.name).cpu().numpy() for one in fields(sample)}

    def merge(self, later: State) -> None:
        """Take in the sample of other rows: what is of the sample of all rows is of that of its own."""
        device = self._parts[0].priority_M.device
        self._take(SampledTokens(**{name: torch.from_numpy(array).to(device) for name, array in later.items()}))

    def taken(self) -> SampledTokens:
        """The sample as it is now, in the order of the text."""
        if len(self._parts) > 1:
            whole = SampledTokens.join(self._parts)
            chosen = torch.argsort(whole.priority_M)[: self._size]
            if len(chosen) == self._size:
                self._limit = float(whole.priority_M[chosen[-1]])
            by_position = torch.argsort(whole.position_M[chosen], stable=True)
            order = by_position[torch.argsort(whole.row_M[chosen][by_position], stable=True)]
            self._parts = [whole.keep(chosen[order])]
        return self._parts[0]
