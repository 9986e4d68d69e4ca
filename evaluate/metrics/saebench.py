"""SAEBench's conventions where they differ from ours, for comparison with its published tables.

Facts of SAEBench 0.6.0, ``evals/core``: a position counts when its *input* token is not special (the target may be, and
may belong to another document; KL also counts a row's last position); ``mse`` divides the squared error by the batch's
token count once more; ``explained_variance`` takes E‖x‖² − (E x²)² as the variance, with E x² over tokens *and*
dimensions; the legacy variance is a mean of per-token ratios about the batch's mean; L1 is Σ z; ablation is to zero at
every position; variance and reconstruction bias weigh batches equally.

Shapes: B rows, T positions, D model width, F features, N counted positions.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..protocol import TokenBatch


class SAEBenchSums:
    """The sums of one record by SAEBench's conventions."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._tokens = 0
        self._batches = 0

    def add_losses(self, has_target_N: Tensor, ce_clean_N: Tensor, ce_N: Tensor, kl_N: Tensor) -> None:
        """Losses at all positions whose input counts; ``has_target_N`` is false at a row's last position."""
        for name, values, mask in (
            ("ce_loss_without_sae", ce_clean_N, has_target_N),
            ("ce_loss_with_sae", ce_N, has_target_N),
            ("kl_div_with_sae", kl_N, torch.ones_like(has_target_N)),
        ):
            self._sums[name] += float(values[mask].double().sum())
            self._sums[name + ":n"] += int(mask.sum())

    @torch.no_grad()
    def add_reconstruction(self, batch: TokenBatch, x_hat_BTD: Tensor, z_BTF: Tensor | None) -> None:
        """Errors of one batch."""
        x_ND, x_hat_ND = batch.x_BTD[batch.real_BT], x_hat_BTD[batch.real_BT]
        n = len(x_ND)
        if not n:
            return
        error_N = (x_ND - x_hat_ND).square().sum(-1)
        norm_N, norm_hat_N, dot_N = x_ND.norm(dim=-1), x_hat_ND.norm(dim=-1), (x_ND * x_hat_ND).sum(-1)
        per_token = {
            "l2_norm_in": norm_N,
            "l2_norm_out": norm_hat_N,
            "l2_ratio": norm_hat_N / torch.where(norm_N < 1e-4, 1, norm_N),
            "mse": error_N / n,
            "explained_variance_legacy": 1 - error_N / (x_ND - x_ND.mean(0)).square().sum(-1),
            "cossim": dot_N / (norm_N * norm_hat_N),
        }
        if z_BTF is not None:
            z_NF = z_BTF[batch.real_BT]
            per_token |= {"l0": (z_NF != 0).sum(-1), "l1": z_NF.sum(-1)}
        per_batch = {
            "relative_reconstruction_bias": norm_hat_N.square().mean() / dot_N.mean(),
            "square": x_ND.square().sum(-1).mean(),
            "element": x_ND.square().mean(),
            "error": error_N.mean(),
        }
        for name, values in per_token.items():
            self._sums[name] += float(values.double().sum())
        for name, value in per_batch.items():
            self._sums["batch:" + name] += float(value)
        self._tokens += n
        self._batches += 1

    def result(self, zero_all: SAEBenchSums | None) -> dict[str, float | None]:
        """The block, by SAEBench's names; ``zero_all`` is the record of that reference at the same layer."""
        if not self._tokens:
            return {}
        tokenwise = ("l2_norm_in", "l2_norm_out", "l2_ratio", "l0", "l1", "explained_variance_legacy", "mse", "cossim")
        block: dict[str, float | None] = {
            name: self._sums[name] / self._tokens for name in tokenwise if name in self._sums
        }  # fmt: skip
        mean = {name: self._sums["batch:" + name] / self._batches for name in ("square", "element", "error")}
        block["explained_variance"] = _ratio(
            mean["square"] - mean["element"] ** 2 - mean["error"], mean["square"] - mean["element"] ** 2
        )
        block["relative_reconstruction_bias"] = self._sums["batch:relative_reconstruction_bias"] / self._batches
        block |= {name: self._loss(name) for name in ("ce_loss_without_sae", "ce_loss_with_sae", "kl_div_with_sae")}
        if zero_all is not None:
            ce, kl = zero_all._loss("ce_loss_with_sae"), zero_all._loss("kl_div_with_sae")
            block |= {"ce_loss_with_ablation": ce, "kl_div_with_ablation": kl}
            block["ce_loss_score"] = _score(ce, block["ce_loss_with_sae"], block["ce_loss_without_sae"])
            block["kl_div_score"] = _score(kl, block["kl_div_with_sae"], 0.0)
        return block

    def _loss(self, name: str) -> float | None:
        return _ratio(self._sums[name], self._sums[name + ":n"])

    @property
    def n_losses(self) -> int:
        """Positions whose losses were summed."""
        return int(self._sums["kl_div_with_sae:n"])

    def state(self) -> dict[str, float]:
        """Plain numbers, to be kept with a finished record."""
        return dict(self._sums) | {"tokens:n": self._tokens, "batches:n": self._batches}

    def merge(self, later: dict[str, float]) -> None:
        """Take in the state of other batches."""
        more = SAEBenchSums.from_state(later)
        for name, value in more._sums.items():
            self._sums[name] += value
        self._tokens, self._batches = self._tokens + more._tokens, self._batches + more._batches

    @classmethod
    def from_state(cls, state: dict[str, float]) -> SAEBenchSums:
        """What :meth:`state` gave."""
        sums = cls()
        kept = dict(state)
        sums._tokens, sums._batches = int(kept.pop("tokens:n")), int(kept.pop("batches:n"))
        sums._sums.update(kept)
        return sums


def _ratio(above: float, below: float) -> float | None:
    return None if below == 0 else above / below


def _score(ablated: float | None, spliced: float | None, clean: float | None) -> float | None:
    if ablated is None or spliced is None or clean is None:
        return None
    return _ratio(ablated - spliced, ablated - clean)
