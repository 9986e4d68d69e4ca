"""Where the temporal term sees only the first part of the dictionary: the same metrics for that part and for the rest.

Temporal SAE (arXiv 2511.05541) calls the two high-level and low-level features; its Table 1 gives S of the high ones
alone. A twin is split where its TC-SAE is, so that their difference is that of the same feature numbers from the same
start.

Shapes: B rows, T positions, D model width, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..protocol import Findings, SparseCoder, TokenBatch
from ..results import Definition
from .active_entries import ActiveEntries
from .all import AllMetrics
from .fidelity import Fidelity
from .fidelity import definitions as fidelity_definitions
from .registry import MetricFamily

PARTS = {
    "high": "of the features that the temporal term sees (the first `temporal.scope` of the dictionary), or of the "
    "first of nested groups (`sae.groups`)",
    "low": "of the features that the temporal term does not see (beyond the first `temporal.scope` of the dictionary), "
    "or of all nested groups but the first",
}
_FIDELITY = ("explained_variance", "cosine", "l0", "l1")


@dataclass(frozen=True)
class _Part:
    """Some of an SAE's features, in what the metrics ask of an SAE."""

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    d_model: int
    n_features: int


class ByScope:
    """The metrics of the first ``inside`` features and of the others, each under its own name.

    Args:
        sae: all of it.
        chosen: the families of which parts are measured; each says which of its metrics.
        context: positions of a row.
        seed: of samples and nulls.
        inside: how many features, from the first, the temporal term sees.

    """

    def __init__(self, sae: SparseCoder, chosen: Mapping[str, MetricFamily], *, context: int, seed: int, inside: int):
        self._sae = sae
        self._slices = {"high": slice(0, inside), "low": slice(inside, sae.n_features)}
        families = {name: family for name, family in chosen.items() if family.by_part}
        self._keys = [*_FIDELITY, *(key for family in families.values() for key in family.by_part)]
        self._metrics: dict[str, AllMetrics] = {}
        self._fidelity: dict[str, Fidelity] = {}
        for name, part in self._slices.items():
            rows = sae.W_dec[part]
            view: Any = _Part(sae.W_enc[:, part], rows, sae.b_dec, sae.d_model, len(rows))
            self._metrics[name] = AllMetrics(view, families, context=context, seed=seed)
            self._fidelity[name] = Fidelity(sae.b_dec.detach().float(), rows.detach().norm(dim=1))
        known = fidelity_definitions() | self._metrics["high"].definitions
        self.definitions = {f"{key}_{name}": _of_part(known[key], name) for key in self._keys for name in PARTS}

    @torch.no_grad()
    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:  # noqa: ARG002 - an accumulator
        """Take one batch in. Each part's reconstruction is what its features alone, and the bias, would give."""
        for name, part in self._slices.items():
            alone_BTF = torch.zeros_like(active.z_BTF)
            alone_BTF[..., part] = active.z_BTF[..., part]
            x_part_BTD = self._sae.decode(alone_BTF)
            z_part_BTF = active.z_BTF[..., part].contiguous()
            self._fidelity[name].add_reconstruction(batch, x_part_BTD, z_part_BTF)
            self._metrics[name].update(batch, ActiveEntries.from_dense(z_part_BTF, batch.valid_BT), x_part_BTD)

    def result(self) -> Findings:
        """The chosen metrics of both parts; no curves and nothing per feature, which the whole has."""
        found = Findings()
        for name in PARTS:
            measured = self._metrics[name].result()
            sums = self._fidelity[name].sums() | measured.sums
            for key in self._keys:
                new = f"{key}_{name}"
                if key in sums:
                    found.sums[new] = replace(sums[key], definition=new)
                elif key in measured.metrics:
                    found.metrics[new] = measured.metrics[key].model_copy(update={"definition": new})
        inside = self._slices["high"].stop
        found.notes.append(
            f"metrics ending in _high are of its first {inside:,} features, in _low of the other "
            f"{self._sae.n_features - inside:,}"
        )
        return found


def _of_part(whole: Definition, name: str) -> Definition:
    label = f"{whole.label}, {name}" if whole.label else ""
    return whole.model_copy(update={"text": f"{whole.text}; {PARTS[name]} alone", "label": label, "group": ""})
