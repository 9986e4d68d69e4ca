"""Alarms: numbers that are not finite, a diverging loss and a collapsed dictionary.

The first two end the training of an SAE, and of all if the store's activations are the reason; the last is reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...cache.views import TokenBatch
from ...errors import RunError
from .member import Member, Update

_TERMS = ("reconstruction", "sparsity", "temporal", "auxiliary")
_DIVERGED, _COLLAPSED, _DEAD, _ALIKE = 100.0, 0.5, 0.9, 0.5
_NAMED_ROWS = 5
_REMEDY = "use a smaller --lr and begin anew with --fresh"  # resuming with another --lr is refused


class MemberError(RunError):
    """The training of one SAE cannot go on; that of the others in its pass can."""


class MembersFailedError(RunError):
    """SAEs of a pass that failed in one step."""

    def __init__(self, sentences: Mapping[str, str]):
        super().__init__("; ".join(sentences.values()))
        self.sentences = dict(sentences)
        """Name of the run → why."""


def check_finite(member: Member, update: Update, batch: TokenBatch) -> None:
    """Stop a run whose loss or gradient is not finite; on a CPU this happens before the weights are changed.

    Raises:
        MemberError: it names the run, the step and the term.
        RunError: the inputs are not finite; it also names the rows of the store.

    """
    result = update.result
    if math.isfinite(result.total) and math.isfinite(update.grad_norm):
        return
    bad = [name for name in _TERMS if not math.isfinite(getattr(result, name))]
    what = f"the {bad[0]} term" if bad else "the total loss" if not math.isfinite(result.total) else "a gradient"
    rows = _rows(batch, ~torch.isfinite(batch.x_NWD).flatten(1).all(1).cpu())
    where = f"{what} of {member.plan.name} is not finite at step {member.step}"
    if rows:
        raise RunError(f"{where}: rows {rows} of the store hold NaN or infinity, run 'pipeline verify' on it")
    raise MemberError(f"{where} (rows {_rows(batch, None)} of the store, all finite): {_REMEDY}")


def check_weights(member: Member) -> None:
    """Stop a run whose weights are not finite, before they are saved in a checkpoint.

    It is needed on CUDA, where losses are checked only from time to time.

    Raises:
        MemberError: it names the run and the step.

    """
    if not all(bool(torch.isfinite(parameter).all()) for parameter in member.sae.parameters()):
        where = f"the weights of {member.plan.name} are not finite at step {member.step}"
        raise MemberError(f"{where}: {_REMEDY}")


def check_divergence(member: Member, reconstruction: float, spread: float) -> None:
    """Stop a run whose error is many times the error of predicting the mean.

    Args:
        member: the member after its step.
        reconstruction: mean squared error per token.
        spread: mean squared distance of a token from the mean.

    Raises:
        MemberError: the run diverged.

    """
    if member.step > 100 and spread > 0 and reconstruction > _DIVERGED * spread:
        ratio = f"{reconstruction / spread:.0f} times that of predicting the mean"
        raise MemberError(f"{member.plan.name} diverged: at step {member.step} its error is {ratio}: {_REMEDY}")


def collapse(metrics: dict[str, float | None], steps: int, step: int) -> str | None:
    """A sentence if almost no feature is active, most features are dead, or most are near-duplicates; else None."""
    dead, alike, l0 = metrics.get("dead_share") or 0.0, metrics.get("near_duplicates") or 0.0, metrics.get("l0")
    if l0 is not None and l0 < _COLLAPSED:
        return f"collapse at step {step}: {l0:.2g} features are active per token; λ1 or λ2 is too large"
    if dead > _DEAD and step > steps // 10:
        return f"collapse at step {step}: {dead:.0%} of the features are dead"
    if alike > _ALIKE:
        return (
            f"collapse at step {step}: {alike:.0%} of the decoder's rows are near-duplicates of "
            "another; λ2 may be too large"
        )
    return None


def _rows(batch: TokenBatch, mask_N: Tensor | None) -> str:
    rows = sorted(set((batch.rows_N if mask_N is None else batch.rows_N[mask_N]).tolist()))
    shown = ", ".join(map(str, rows[:_NAMED_ROWS]))
    return f"{shown} …" if len(rows) > _NAMED_ROWS else shown
