"""The same metrics for parts of a code: the features that the temporal term sees and the others, or the summands of
the code.

Temporal SAE (arXiv 2511.05541) calls the two high-level and low-level features; its Table 1 gives S of the high ones
alone. A twin is split where its TC-SAE is, so that their difference is that of the same feature numbers from the same
start. Of an architecture whose code is a sum (Temporal Feature Analysis: predicted + novel) every summand is a part.

Shapes: B rows, T positions, D model width, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...train.sae.protocol import SparseCoder
from ..protocol import Findings, State, TokenBatch
from ..results import Definition
from .active_entries import ActiveEntries
from .all import AllMetrics
from .fidelity import SPARSITY, Fidelity
from .fidelity import definitions as fidelity_definitions
from .registry import MetricFamily

PARTS = {
    "high": "of the features that the temporal term sees (the first `temporal.scope` of the dictionary), or of the "
    "first of nested groups (`sae.groups`)",
    "low": "of the features that the temporal term does not see (beyond the first `temporal.scope` of the dictionary), "
    "or of all nested groups but the first",
}
_FIDELITY = ("explained_variance", "cosine")


SUMMANDS = {
    "predicted": "of the part of the code that is predicted from the tokens before",
    "novel": "of the part of the code that is not predicted",
}


@dataclass(frozen=True)
class _Some:
    """Some of an SAE's features, in what the metrics ask of an SAE."""

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    d_model: int
    n_features: int


@dataclass(frozen=True)
class Part:
    """One part of a code.

    Attributes:
        text: what it is, for definitions.
        seen_as: the SAE as the metrics of this part see it.
        codes: its codes [B, T, features of ``seen_as``].
        alone: these codes as codes of the whole dictionary, zero elsewhere.

    """

    text: str
    seen_as: Any
    codes: Callable[[ActiveEntries], Tensor]
    alone: Callable[[ActiveEntries], Tensor]


class ByPart:
    """The metrics of every part, each under its own name.

    Args:
        sae: all of it.
        chosen: the families of which parts are measured; each says which of its metrics.
        parts: by the suffix of their metrics.
        context: positions of a row.
        seed: of samples and nulls.
        fidelity: whether the reconstruction of the parts is measured; L0 and L1 always are.
        note: what a reader must know of the suffixes.

    """

    def __init__(
        self,
        sae: SparseCoder,
        chosen: Mapping[str, MetricFamily],
        parts: Mapping[str, Part],
        *,
        context: int,
        seed: int,
        fidelity: bool = True,
        note: str,
    ):
        self._sae, self._parts, self._note = sae, dict(parts), note
        families = {name: family for name, family in chosen.items() if family.by_part}
        known_first = (*_FIDELITY, *SPARSITY) if fidelity else SPARSITY
        self._keys = [*known_first, *(key for family in families.values() for key in family.by_part)]
        self._metrics: dict[str, AllMetrics] = {}
        self._fidelity: dict[str, Fidelity] = {}
        known = dict(fidelity_definitions())
        for name, part in parts.items():
            self._metrics[name] = AllMetrics(part.seen_as, families, context=context, seed=seed)
            norms_F = part.seen_as.W_dec.detach().norm(dim=1)
            self._fidelity[name] = Fidelity(sae.b_dec.detach().float(), norms_F)
            known |= self._metrics[name].definitions
        self.definitions = {
            f"{key}_{name}": _of_part(known[key], name, part.text) for key in self._keys for name, part in parts.items()
        }

    @torch.no_grad()
    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:  # noqa: ARG002
        """Take one batch in. Each part's reconstruction is what its features alone, and the bias, would give."""
        for name, part in self._parts.items():
            x_part_BTD = self._sae.decode(part.alone(active))
            z_part_BTF = part.codes(active)
            self._fidelity[name].add_reconstruction(batch, x_part_BTD, z_part_BTF)
            self._metrics[name].update(batch, ActiveEntries.from_dense(z_part_BTF, batch.valid_BT), x_part_BTD)

    def state(self) -> State:
        """What it holds."""
        return {
            name: {"sums": self._fidelity[name].state(), "metrics": self._metrics[name].state()} for name in self._parts
        }

    def merge(self, later: State) -> None:
        """Take in the state of other rows."""
        for name in self._parts:
            self._fidelity[name].merge(later[name]["sums"])
            self._metrics[name].merge(later[name]["metrics"])

    def result(self) -> Findings:
        """The chosen metrics of all parts; no curves and nothing per feature, which the whole has."""
        found = Findings(notes=[self._note])
        for name in self._parts:
            measured = self._metrics[name].result()
            sums = self._fidelity[name].sums() | measured.sums
            for key in self._keys:
                new = f"{key}_{name}"
                if key in sums:
                    found.sums[new] = replace(sums[key], definition=new)
                elif key in measured.metrics:
                    found.metrics[new] = measured.metrics[key].model_copy(update={"definition": new})
        return found


class ByScope(ByPart):
    """The metrics of the first ``inside`` features, which the temporal term sees, and of the others."""

    def __init__(self, sae: SparseCoder, chosen: Mapping[str, MetricFamily], *, inside: int, **common: Any):
        parts = {"high": slice(0, inside), "low": slice(inside, sae.n_features)}
        note = (
            f"metrics ending in _high are of its first {inside:,} features, in _low of the other "
            f"{sae.n_features - inside:,}"
        )
        found = {name: self._part(sae, name, columns) for name, columns in parts.items()}
        super().__init__(sae, chosen, found, note=note, **common)

    @staticmethod
    def _part(sae: SparseCoder, name: str, columns: slice) -> Part:
        rows = sae.W_dec[columns]

        def alone(active: ActiveEntries) -> Tensor:
            z_BTF = torch.zeros_like(active.z_BTF)
            z_BTF[..., columns] = active.z_BTF[..., columns]
            return z_BTF

        view = _Some(sae.W_enc[:, columns], rows, sae.b_dec, sae.d_model, len(rows))
        return Part(PARTS[name], view, lambda active: active.z_BTF[..., columns].contiguous(), alone)


class BySummand(ByPart):
    """The metrics of every summand of an SAE's code."""

    def __init__(self, sae: SparseCoder, chosen: Mapping[str, MetricFamily], **common: Any):
        texts = {name: SUMMANDS.get(name, f"of the part of the code called {name}") for name in sae.summands}
        found = {name: self._part(sae, name, text) for name, text in texts.items()}
        endings = " and ".join(f"_{name}" for name in texts)
        note = f"its code is a sum: metrics ending in {endings} are of the summands"
        super().__init__(sae, chosen, found, note=note, **common)

    @staticmethod
    def _part(sae: SparseCoder, name: str, text: str) -> Part:
        return Part(text, sae, lambda active: active.parts[name], lambda active: active.parts[name])


def _of_part(whole: Definition, name: str, text: str) -> Definition:
    label = f"{whole.label}, {name}" if whole.label else ""
    return whole.model_copy(update={"text": f"{whole.text}; {text} alone", "label": label, "group": ""})
