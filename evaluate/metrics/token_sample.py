"""A bounded uniform sample of tokens with their codes and activations, for what compares tokens that lie far apart.

Shapes: M tokens of the sample, N tokens of a batch, D model width, E active entries, K features active in the sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..intervals.jackknife import group_of
from ..protocol import TokenBatch
from .active_entries import ActiveEntries, uniform_hash


class TokenSample:
    """The ``size`` counted tokens with the smallest hash of (seed, row, position), in whatever batches."""

    def __init__(self, size: int, d_model: int, seed: int, device: torch.device):
        self._size, self._seed = size, seed

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty((0, *shape), dtype=dtype, device=device)

        self._priority_M = empty(torch.float64)
        self.x_MD = empty(torch.float32, d_model)
        self.document_M, self.token_M, self.position_M, self.row_M, self.group_M = (
            empty(torch.int64) for _ in range(5)
        )
        self.slot_E, self.feature_E, self.value_E = empty(torch.int64), empty(torch.int64), empty(torch.float64)

    def __len__(self) -> int:
        return len(self._priority_M)

    def update(self, batch: TokenBatch, active: ActiveEntries) -> None:
        """Take one batch in."""
        rows = batch.rows_B.cpu().numpy()[:, None]
        positions = torch.arange(active.context).numpy()[None]
        priority_N = torch.from_numpy(uniform_hash(self._seed, rows, positions)).reshape(-1).to(batch.x_BTD.device)
        limit = float(self._priority_M.max()) if len(self) == self._size else 1.0
        new = (active.valid_N & (priority_N < limit)).nonzero().squeeze(1)
        if not len(new):
            return
        slot_N = torch.full((active.n_tokens,), -1, dtype=torch.int64, device=new.device)
        slot_N[new] = torch.arange(len(new), device=new.device) + len(self)
        mine = slot_N[active.token_E] >= 0
        self._priority_M = torch.cat([self._priority_M, priority_N[new]])
        self.x_MD = torch.cat([self.x_MD, batch.x_BTD.reshape(active.n_tokens, -1)[new].float()])
        self.document_M = torch.cat([self.document_M, batch.documents_BT.reshape(-1)[new].long()])
        self.token_M = torch.cat([self.token_M, batch.tokens_BT.reshape(-1)[new].long()])
        self.position_M = torch.cat([self.position_M, new % active.context])
        self.row_M = torch.cat([self.row_M, batch.rows_B[new // active.context].long()])
        self.group_M = torch.cat([self.group_M, group_of(batch.units_BT)[new]])
        self.slot_E = torch.cat([self.slot_E, slot_N[active.token_E[mine]]])
        self.feature_E = torch.cat([self.feature_E, active.feature_E[mine]])
        self.value_E = torch.cat([self.value_E, active.value_E[mine]])
        if len(self) > self._size:
            self._keep(torch.topk(self._priority_M, self._size, largest=False).indices)

    def _keep(self, kept: Tensor) -> None:
        slot_M = torch.full((len(self),), -1, dtype=torch.int64, device=kept.device)
        slot_M[kept] = torch.arange(len(kept), device=kept.device)
        slot_E = slot_M[self.slot_E]
        stays = slot_E >= 0
        self.slot_E, self.feature_E, self.value_E = slot_E[stays], self.feature_E[stays], self.value_E[stays]
        for name in ("_priority_M", "x_MD", "document_M", "token_M", "position_M", "row_M", "group_M"):
            setattr(self, name, getattr(self, name)[kept])

    def dense(self) -> tuple[Tensor, Tensor]:
        """Codes of the sample at the features active in it: float32 [M, K], and which features these are, [K]."""
        features, column = torch.unique(self.feature_E, return_inverse=True)
        z_MK = torch.zeros(len(self), len(features), device=self.value_E.device)
        z_MK[self.slot_E, column] = self.value_E.float()
        return z_MK, features
