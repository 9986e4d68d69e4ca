"""The temporal terms and the partners that can be chosen, by name. Names are known without importing torch.

A term is one function of the codes and of the pairs that are compared; registering it is all that training needs, since
autograd finds its gradient. A partner says whom a token is compared with; everything but ``next`` is a control.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from .partners import Batch
    from .terms import Pairs

    Function = Callable[[Tensor, Pairs], Tensor]
    Draw = Callable[[Batch], Tensor | None]


@dataclass(frozen=True)
class TemporalForm:
    """A registered temporal term; see :func:`temporal_term` for its fields."""

    function: Function
    whole_windows: bool = False
    least_window: int = 2
    mean_over_windows: bool = True
    degree: int | None = None


@dataclass(frozen=True)
class Partner:
    """A registered partner; see :func:`partner` for its fields."""

    draw: Draw
    siblings: int = 0
    drawn: bool = True
    form: str | None = None
    pairs: bool = False


TERMS: Registry[TemporalForm] = Registry(
    "temporal term",
    dict.fromkeys(
        ("pairwise", "window_mean", "normalised", "cosine", "l1", "contrastive", "squared_norms"), "train.loss.terms"
    ),
)
PARTNERS: Registry[Partner] = Registry(
    "partner",
    dict.fromkeys(
        ("next", "lag", "earlier", "same_document", "other_document", "shuffled", "l2"), "train.loss.partners"
    ),
)


def temporal_term(
    name: str,
    *,
    whole_windows: bool = False,
    least_window: int = 2,
    mean_over_windows: bool = True,
    degree: int | None = None,
) -> Callable[[Function], Function]:
    """Register a function ``(z_NWF, pairs) → scalar`` as the temporal term ``name``.

    ``z_NWF`` [N windows, W positions, F features] are codes of consecutive, valid tokens of one document per window,
    ``pairs`` (:class:`~tcsae.train.loss.terms.Pairs`) says which tokens are compared. The scalar, times λ2, is
    minimised.

    Args:
        name: as ``--temporal`` takes it.
        whole_windows: the term compares the tokens of a window among themselves, and no partner applies.
        least_window: the shortest window it can be computed on.
        mean_over_windows: it is a mean over windows (or pairs), so that several processes can each take a share of a
            batch. Where it is not, such a run says that its result is not exactly that of one process.
        degree: where it is a sum over features of something homogeneous of this degree in the feature's codes (2 for
            squares, 1 for absolute values). Only then can λ2 differ between features (``temporal.per_feature``).

    """

    def add(function: Function) -> Function:
        TERMS.add(name, TemporalForm(function, whole_windows, least_window, mean_over_windows, degree))
        return function

    return add


def partner(
    name: str, *, siblings: int = 0, drawn: bool = True, form: str | None = None, pairs: bool = False
) -> Callable[[Draw], Draw]:
    """Register a function that draws partners: ``(batch) → index_NP``, or None for the next token.

    ``index_NP`` [N, W − 1] holds, for the tokens 0 … W − 2 of every window, the flat index n·W + t of the token of the
    batch that it is compared with, −1 for none. ``batch`` (:class:`~tcsae.train.loss.partners.Batch`) knows documents,
    rows and positions, and has the generator to draw from.

    Args:
        name: as ``--temporal-partner`` takes it.
        siblings: so many windows of one row and document are to be side by side in a batch, where a row holds them;
            ``batch.siblings`` says how many there are, at least two.
        drawn: partners are drawn from the batch, so that several processes that share it draw others than one.
        form: the term that takes the place of ``pairwise``; other terms are then refused.
        pairs: batches hold pairs of an earlier token and a token instead of windows (W = 2, the earlier one first).

    """

    def add(draw: Draw) -> Draw:
        PARTNERS.add(name, Partner(draw, int(siblings), drawn, form, pairs))
        return draw

    return add
