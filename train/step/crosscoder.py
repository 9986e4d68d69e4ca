"""The temporal crosscoder's step by hand: that of a plain SAE on the activations of each window side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ..loss.objective import Objective, StepResult
from ..sae.protocol import RowTokens, SparseAutoencoder
from ..sae.temporal_sae import TemporalSAE
from ..sae.txc import TemporalCrosscoder
from .by_hand import sparse_step
from .registry import STEPS, HandWritten


def crosscoder_step(
    sae: SparseAutoencoder,
    x_NWD: Tensor,
    objective: Objective,
    *,
    partner_NP: Tensor | None = None,
    dead_F: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    rows: RowTokens | None = None,  # noqa: ARG001 - a step's arguments; windows are not rows
) -> StepResult:
    """See :func:`.autograd.autograd_step`, whose numbers these are.

    To a plain SAE a window is one token, W times as wide: its means are over windows, and become means over tokens by
    the weights of the terms.
    """
    w = cast(TemporalCrosscoder, sae).window
    groups = tuple((size, weight / w) for size, weight in objective.groups or ((sae.n_features, 1.0),))
    aux_w = 1 if objective.aux_normalised else w  # its ratio is the same for windows as for tokens
    of_windows = replace(objective, groups=groups, aux_weight=objective.aux_weight / aux_w)
    options = {"partner_NP": partner_NP, "dead_F": dead_F, "compute_dtype": compute_dtype}
    result = sparse_step(cast(TemporalSAE, sae), x_NWD.flatten(1).unsqueeze(1), of_windows, **options)
    return replace(result, error=result.error / w, auxiliary=result.auxiliary / aux_w)


STEPS.add("txc", HandWritten(activations=("topk",), step=crosscoder_step))
