"""Which pre-activations are kept: the k largest of every token or of a batch, and where a mask is true.

Shapes: R rows (tokens of one member after another), F features, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest(pre_RF: Tensor, k: int, *, over_batch: bool, n_members: int = 1) -> tuple[Tensor, Tensor]:
    """The positive ones among the k largest of every row, or among the k·N largest of all N rows of a member.

    The maxima of 4k groups per row bound the k-th largest from below: k groups have a maximum at least that large. Only
    what passes this bound, little more than k per row, is looked at again. Among equal values torch.topk keeps an
    arbitrary one, and so does this.

    Returns:
        A mask [R, F], and the positions r·F + f that it marks, ascending.

    """
    n_rows, n_features = pre_RF.shape
    n_groups = 4 * k
    kept, races = (k * (n_rows // n_members), n_members) if over_batch else (k, n_rows)
    if n_groups * 2 > n_features:
        bound = pre_RF.new_zeros(())
    else:
        groups = pre_RF[:, : n_features // n_groups * n_groups].unflatten(1, (-1, n_groups)).amax(1)
        bound = groups.view(races, -1).topk(kept, sorted=False).values.amin(1, keepdim=True)
    smallest = torch.finfo(pre_RF.dtype).smallest_normal
    mask = (pre_RF.view(races, -1) >= bound.clamp(min=smallest)).view(n_rows, n_features)
    flat = true_positions(mask)
    surplus = _surplus(pre_RF.view(-1).index_select(0, flat), flat // (n_features * n_rows // races), races, kept)
    mask.view(-1)[flat[surplus]] = False
    return mask, flat[~surplus]


def _surplus(values_C: Tensor, races_C: Tensor, n_races: int, kept: int) -> Tensor:
    """Which of the candidates, given with their ascending races, are not among the ``kept`` largest of theirs: a mask
    [C].
    """
    counts = torch.bincount(races_C, minlength=n_races)
    widest = int(counts.max()) if n_races else 0
    if widest <= kept:
        return torch.zeros_like(races_C, dtype=torch.bool)
    starts = counts.cumsum(0) - counts
    place = races_C * widest + torch.arange(races_C.numel(), device=races_C.device) - starts.index_select(0, races_C)
    padded = values_C.new_full((n_races * widest,), -torch.inf).index_copy_(0, place, values_C).view(n_races, widest)
    surplus = torch.ones(n_races, widest, dtype=torch.bool, device=values_C.device)
    surplus.scatter_(1, padded.topk(kept, sorted=False).indices, value=False)
    return surplus.view(-1).index_select(0, place)


def count_true(mask: Tensor) -> int:
    """How often a contiguous mask is true."""
    flat = mask.view(-1)
    whole = flat.numel() // 1024 * 1024
    if flat.is_cuda or not whole:
        return int(flat.count_nonzero())
    # Eight flags at a time: the bytes of 128 words of flags add up to 128 at most. Four times faster than asking torch.
    bytes_ = flat[:whole].view(torch.int64).view(-1, 128).sum(1).view(torch.uint8)
    return int(bytes_.sum() + flat[whole:].sum())


def true_positions(mask: Tensor, n_true: int = 0) -> Tensor:
    """Where a contiguous mask is true, as ascending positions in its flat form; ``n_true`` is how often, if known."""
    flat = mask.view(-1)
    if flat.is_cuda or flat.numel() % 8 or n_true > flat.numel() // 32:
        return flat.nonzero().view(-1)
    # Eight flags at a time: in a sparse mask most words are zero. Measured three times faster than nonzero at a density
    # of 1 %.
    words = flat.view(torch.int64).nonzero().view(-1)
    if words.numel() > flat.numel() // 32:
        return flat.nonzero().view(-1)
    inside = flat.view(-1, 8).index_select(0, words).view(-1).nonzero().view(-1)
    return words.index_select(0, inside >> 3).mul_(8).add_(inside & 7)
