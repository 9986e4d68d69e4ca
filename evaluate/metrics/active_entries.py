"""The features of a batch that are not zero: the one representation that every metric of the features reads.

Shapes: B rows, T positions, N = B·T tokens (token n = row · T + position), F features, E active entries, L lags.

Active entries are sorted by feature, then by token. So the entries of one feature are in the order of the text, and
whatever of it was active in the L tokens before is among the L entries before. Rows do not continue one another, so
nothing has to be kept from batch to batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...errors import RunError


@dataclass(frozen=True)
class ActiveEntries:
    """The nonzero features at the tokens that count, and the dense features they were taken from."""

    z_BTF: Tensor  # float32, at every position
    n_rows: int
    context: int
    n_features: int
    valid_N: Tensor  # bool: neither special nor padding nor an outlier
    feature_E: Tensor  # int64, ascending
    token_E: Tensor  # int64, ascending within a feature
    value_E: Tensor  # float64
    parts: Mapping[str, Tensor] = field(default_factory=dict)  # what else the architecture says of every position

    @classmethod
    def from_dense(cls, z_BTF: Tensor, valid_BT: Tensor, parts: Mapping[str, Tensor] | None = None) -> ActiveEntries:
        """Take the nonzero entries out of dense features; ``parts`` are passed on.

        Raises:
            RunError: a feature is NaN or infinite at a token that counts; the message says where.

        """
        n_rows, context, n_features = z_BTF.shape
        flat_NF = z_BTF.flatten(0, 1)
        valid_N = valid_BT.reshape(-1)
        token, feature = flat_NF.nonzero(as_tuple=True)  # NaN counts as nonzero
        keep = valid_N[token]
        token, feature = token[keep], feature[keep]
        value = flat_NF[token, feature].double()
        if not bool(torch.isfinite(value).all()):
            first = int((~torch.isfinite(value)).nonzero()[0])
            where = f"row {int(token[first]) // context} of the batch, position {int(token[first]) % context}"
            raise RunError(
                f"feature {int(feature[first])} is {float(value[first])} at {where}: the SAE or its input is damaged"
            )
        order = torch.argsort(feature, stable=True)
        entries = feature[order], token[order], value[order]
        return cls(z_BTF, n_rows, context, n_features, valid_N, *entries, parts or {})

    @property
    def n_tokens(self) -> int:
        """Tokens of the batch, counted or not."""
        return self.n_rows * self.context

    def positions(self) -> Tensor:
        """Position of every entry within its row."""
        return self.token_E % self.context

    def rows(self) -> Tensor:
        """Row of every entry within the batch."""
        return self.token_E // self.context

    def per_feature(self, weight_E: Tensor | None = None) -> Tensor:
        """Sum of ``weight_E`` (ones) over the entries of each feature: float64 [F]."""
        return _sums(self.feature_E, weight_E, self.n_features)

    def per_group(self, group_N: Tensor, groups: int, weight_E: Tensor | None = None) -> Tensor:
        """The same by group of tokens: float64 [groups, F]."""
        place_E = group_N[self.token_E] * self.n_features + self.feature_E
        return _sums(place_E, weight_E, groups * self.n_features).view(groups, self.n_features)

    def per_token(self, weight_E: Tensor | None = None) -> Tensor:
        """Sum of ``weight_E`` (ones) over the entries of each token: float64 [N]."""
        return _sums(self.token_E, weight_E, self.n_tokens)


def _sums(index_E: Tensor, weight_E: Tensor | None, size: int) -> Tensor:
    weight = (
        torch.ones(len(index_E), dtype=torch.float64, device=index_E.device) if weight_E is None else weight_E.double()
    )
    return torch.zeros(size, dtype=torch.float64, device=index_E.device).index_add_(0, index_E, weight)


@dataclass(frozen=True)
class PairMasks:
    """Which pairs (t, t + lag) of a batch are valid. Index 0 of the first axis is unused."""

    later_LN: Tensor  # bool [lags + 1, N]: a pair of this lag ends here
    earlier_LN: Tensor  # bool [lags + 1, N]: a pair of this lag begins here


def pair_masks(valid_BT: Tensor, documents_BT: Tensor, lags: int) -> PairMasks:
    """Pairs within one row and one document whose two ends both count, for lags 1 … ``lags``."""
    rows, context = valid_BT.shape
    later = torch.zeros(lags + 1, rows, context, dtype=torch.bool, device=valid_BT.device)
    earlier = torch.zeros_like(later)
    for lag in range(1, min(lags, context - 1) + 1):
        both = valid_BT[:, lag:] & valid_BT[:, :-lag] & (documents_BT[:, lag:] == documents_BT[:, :-lag])
        later[lag, :, lag:] = both
        earlier[lag, :, :-lag] = both
    return PairMasks(later.reshape(lags + 1, -1), earlier.reshape(lags + 1, -1))


@dataclass(frozen=True)
class Matches:
    """Entries of the same feature that are both active at the two ends of a valid pair."""

    lag_M: Tensor
    earlier_M: Tensor  # index into the entries
    later_M: Tensor


def matches(active: ActiveEntries, masks: PairMasks) -> Matches:
    """All of them, for every lag of ``masks``.

    Two entries ``lag`` tokens apart are at most ``lag`` places apart in the sorted list: so many shifted comparisons
    find all.
    """
    lags = masks.later_LN.shape[0] - 1
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for shift in range(1, lags + 1):
        gap = active.token_E[shift:] - active.token_E[:-shift]
        near = (active.feature_E[shift:] == active.feature_E[:-shift]) & (gap <= lags)
        earlier = near.nonzero().squeeze(1)
        lag, later = gap[earlier], earlier + shift
        keep = masks.later_LN[lag, active.token_E[later]]
        found.append((lag[keep], earlier[keep], later[keep]))
    lag, earlier, later = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Matches(lag, earlier, later)


def uniform_hash(seed: int, *numbers: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that depend on nothing but the seed and the integers given (splitmix64's finaliser)."""
    state = np.full(np.broadcast_shapes(*(n.shape for n in numbers)), seed, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            state = state * np.uint64(0x9E3779B97F4A7C15) + number.astype(np.uint64) + np.uint64(0x632BE59BD9B4E019)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
