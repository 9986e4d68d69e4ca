"""The loss of fine-tuning and its gradients: what the run was trained with, and the KL at the end of the model.

    (1 − s) · reconstruction + s · α · KL(clean ‖ spliced) + λ1 · sparsity + λ2 · temporal + auxiliary

Both continuations begin with the residuals of the store, so that no lower layer runs: the clean one with the residuals
themselves, the spliced one with reconstructions in the place of the tokens that count. α gives KL the size of the
reconstruction error (arXiv 2503.17272), so that λ1 and λ2 keep the meaning they had.

Shapes: N rows, T positions, D model width, F features, W window, K tokens that count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...cache.format.layout import of_role
from ...cache.pools import Pool, message_spans
from ...cache.store import ActivationStore
from ...cache.views import Pairs, TokenBatch, Windows
from ...errors import UsageError
from ...sites import Location
from ...train.loop.member import Member
from ...train.loss.objective import Objective, StepResult
from ...train.loss.partners import Batch, draw_partners, generator_of, neighbours_in_rows
from ...train.loss.terms import at_least_float32
from ...train.plan import view_of
from ...train.sae.protocol import RowTokens, SAEOutput, SparseAutoencoder
from ...train.step.autograd import autocast, step_result, weighted_terms
from ..metrics.fidelity import LOGIT_BYTES
from ..model.splice import Head, SplicedModel

Balance = Literal["step", "start"]
_TINY = 1e-12
_MATRICES = 8  # [tokens, V] in float32 at once, of KL and its gradient


@dataclass(frozen=True)
class RowBatch:
    """Whole rows, and what the temporal term compares in them."""

    batch: TokenBatch
    x_NTD: Tensor
    """Scaled, float32, on the device."""
    tokens_NT: Tensor
    rows: RowTokens
    compared_MW: Tensor | None
    """Windows or pairs as indices into the tokens that count; None where there are none, or whole rows are compared."""
    partner: Tensor | None
    """See :class:`~tcsae.train.loss.terms.Pairs`."""


class RowBatches:
    """Turns batches of whole rows into what a step needs, windows and partners as the run was trained with.

    Args:
        store: of the rows.
        member: what is trained.
        device: where tensors are wanted.

    """

    def __init__(self, store: ActivationStore, member: Member, device: torch.device):
        self._store, self._device = store, device
        self._term, self._data = member.objective.temporal, member.config.data
        self._whole_rows = member.sae.sees == "row"

    def of(self, batch: TokenBatch, x_NTD: Tensor, step: int) -> RowBatch:
        """One batch; what is drawn at random depends on the data's seed and the step alone."""
        assert batch.valid_NW is not None and batch.documents_NW is not None  # noqa: S101, PT018 - rows
        rows = RowTokens.of(batch.valid_NW, batch.documents_NW, self._device)
        numbers = batch.rows_N.tolist()
        tokens = np.concatenate([self._store.tokens(row, row + 1) for row in numbers]).astype(np.int64)
        tokens_NT = torch.from_numpy(tokens).to(self._device)
        compared, partner = None, None
        if self._term.active and self._whole_rows:
            partner = neighbours_in_rows(batch.valid_NW, batch.documents_NW, self._term.lag)
        elif self._term.active:
            compared, partner = self._compared(batch, numbers, step)
        moved = [None if each is None else each.to(self._device) for each in (compared, partner)]
        return RowBatch(batch, x_NTD, tokens_NT, rows, *moved)

    def _compared(self, batch: TokenBatch, numbers: list[int], step: int) -> tuple[Tensor | None, Tensor | None]:
        """Items of the run's own view, cut out of these rows alone, and their partners."""
        view = view_of(self._data)
        assert isinstance(view, Windows | Pairs)  # noqa: S101 - whole rows are not cut
        usable_NT, documents_NT = (np.asarray(each) for each in (batch.valid_NW, batch.documents_NW))
        spans_NT = documents_NT
        if self._data.only:
            flags_NT = np.concatenate([self._store.flags(row, row + 1) for row in numbers])
            spans_NT = message_spans(documents_NT, of_role(flags_NT, self._data.only))
        rows_N = batch.rows_N.numpy()
        pool = Pool(torch.empty(0), rows_N, np.arange(len(rows_N)), usable_NT, documents_NT, spans_NT)
        rng = np.random.default_rng([self._data.seed, step])
        try:
            cut = view.cut(pool, 1, pool.n_tokens, rng)
        except UsageError:  # these few rows hold no window, where the store does
            return None, None
        positions_MW = cut.start_N[:, None] + cut.offsets_NW
        within_NT = np.cumsum(usable_NT).reshape(usable_NT.shape) - 1
        compared = torch.from_numpy(within_NT[cut.local_N[:, None], positions_MW])
        documents_M = torch.from_numpy(documents_NT[cut.local_N, positions_MW[:, 0]].astype(np.int64))
        rows_M, starts_M = torch.from_numpy(rows_N[cut.local_N]), torch.from_numpy(positions_MW[:, 0])
        generator = generator_of(self._data.seed, step)
        known = Batch(documents_M, rows_M, starts_M, positions_MW.shape[1], generator, view.together)
        return compared, draw_partners(self._term.partner, known)


class KLStep:
    """The step of :class:`~tcsae.train.loop.single.Single` through the upper layers.

    Args:
        model: verified at ``at``.
        head: verified.
        at: where the SAE belongs.
        scale: from raw activations to what the SAE sees while it trains.
        share: s, the part of KL in the sum of it and the reconstruction error.
        balance: whether α is of every batch (step), or stays as it was of the first one (start).

    Attributes:
        batch: what the next call is about.
        wanted: whether KL is to be known even where it has no share in the loss; without both, no layer runs.
        weight: α; None before the first step.
        kl: of the last step, in nats per token.

    """

    def __init__(self, model: SplicedModel, head: Head, at: Location, scale: float, share: float, balance: Balance):
        self.model, self.head, self.at, self.scale = model, head, at, scale
        self.share, self.balance = share, balance
        self.batch: RowBatch | None = None
        self.wanted = True
        self.weight: Tensor | None = None
        self.kl = torch.zeros(())

    def __call__(
        self,
        sae: SparseAutoencoder,
        x_NWD: Tensor,
        objective: Objective,
        *,
        partner_NP: Tensor | None = None,
        dead_F: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        rows: RowTokens | None = None,
    ) -> StepResult:
        """As :func:`~tcsae.train.step.autograd.autograd_step`."""
        batch = self.batch
        assert batch is not None and rows is not None  # noqa: S101, PT018 - set by who calls
        with autocast(x_NWD.device, compute_dtype):
            whole, out = _encoded(sae, x_NWD, rows)
        x_KD = rows.counted(x_NWD)
        compared = _compared(batch, whole, out, x_KD)
        total, found = weighted_terms(
            sae, x_KD, out, objective, dead_F=dead_F, compared=compared, partner_NP=partner_NP
        )
        kl = self.kl
        if self.share or self.wanted:
            with torch.set_grad_enabled(self.share > 0):
                kl = self.divergence(batch, at_least_float32(out.reconstruction) / self.scale)
        self.kl = kl.detach()
        if self.weight is None or self.balance == "step":
            self.weight = (found["reconstruction"].detach() / self.kl.clamp(min=_TINY)).float()
        if self.share:
            total = total + self.share * (self.weight * kl - found["reconstruction"])
        total.backward()
        sae.after_backward(out)
        return step_result(total, found, out)

    def divergence(self, batch: RowBatch, x_hat_KD: Tensor) -> Tensor:
        """Mean over the tokens that count of KL(clean ‖ spliced), in nats; with gradients to raw reconstructions.

        Every other position keeps its own activation.
        """
        valid_NT, raw_NTD = batch.rows.valid_NT, batch.batch.x_NWD.to(self.model.dtype)
        with torch.no_grad():
            clean_KD = self.model.continued(self.at, raw_NTD.clone(), batch.tokens_NT)[valid_NT]
        spliced_NTD = raw_NTD.masked_scatter(valid_NT[..., None], x_hat_KD.to(raw_NTD.dtype))
        final_KD = self.model.continued(self.at, spliced_NTD, batch.tokens_NT)[valid_NT]
        return mean_kl(final_KD, clean_KD, self.head)


def _encoded(sae: SparseAutoencoder, x_NTD: Tensor, rows: RowTokens) -> tuple[SAEOutput | None, SAEOutput]:
    """Of whole rows where the SAE sees them, and of the tokens that count."""
    if sae.sees != "row":
        return None, sae(rows.counted(x_NTD))
    whole = sae(x_NTD, rows)
    return whole, whole.each(rows.counted)


def _compared(batch: RowBatch, whole: SAEOutput | None, out: SAEOutput, x_KD: Tensor) -> tuple[Tensor, Tensor] | None:
    if whole is not None:
        return whole.features, batch.x_NTD
    at = batch.compared_MW
    return None if at is None else (out.features[at], x_KD[at])


def mean_kl(final_KD: Tensor, clean_KD: Tensor, head: Head, *, limit_bytes: int = LOGIT_BYTES) -> Tensor:
    """Mean of KL(softmax(head(clean)) ‖ softmax(head(final))), some tokens at a time: logits of all of them, and what
    autograd keeps of those, would be the largest tensors of a step by far.
    """
    at_once = max(1, limit_bytes // (4 * _MATRICES * head.vocab_size))
    return _MeanKL.apply(final_KD, clean_KD, head, at_once)  # type: ignore[return-value]


class _MeanKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, final_KD: Tensor, clean_KD: Tensor, head: Head, at_once: int) -> Tensor:
        gradient_KD = torch.empty_like(final_KD)
        total = torch.zeros((), dtype=torch.float64, device=final_KD.device)
        for start in range(0, len(final_KD), at_once):
            part = slice(start, start + at_once)
            clean_log = functional.log_softmax(head(clean_KD[part]), dim=-1)
            with torch.enable_grad():
                states = final_KD[part].detach().requires_grad_()
                spliced_log = functional.log_softmax(head.logits(states), dim=-1)
                kl = functional.kl_div(spliced_log, clean_log, reduction="sum", log_target=True)
                (gradient_KD[part],) = torch.autograd.grad(kl, states)
            total += kl.detach()
        ctx.save_for_backward(gradient_KD / max(1, len(final_KD)))
        return (total / max(1, len(final_KD))).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_KD,) = ctx.saved_tensors
        return grads[0] * gradient_KD, None, None, None
