"""Temporal SAEs whose term sees only the first part of the dictionary: the same metrics for that part and for the rest.

Temporal SAE (arXiv 2511.05541) calls the two high-level and low-level features; its Table 1 gives S of the high ones
alone. A twin is split where its TC-SAE is, so that their difference is that of the same feature numbers from the same
start.

Shapes: B rows, T positions, D model width, F features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..protocol import Findings, SparseCoder, TokenBatch
from ..results import Definition
from .all import Measures
from .fidelity import Fidelity
from .fidelity import definitions as fidelity_definitions

PARTS = {
    "high": "of the features that the temporal term sees (the first `temporal.scope` of the dictionary)",
    "low": "of the features that the temporal term does not see (beyond the first `temporal.scope` of the dictionary)",
}
_FIDELITY = ("explained_variance", "cosine", "l0", "l1")
_MEASURES = (
    *("alive", "share_dense_1pct", "share_dense_10pct", "near_duplicate_share"),
    *("temporal_variation", "temporal_variation_refit", "lag1_autocorrelation", "adjacent_cosine", "adjacent_jaccard"),
    *("run_length", "run_length_excess", "smoothness", "same_token"),
    *("eta_squared", "position_mutual_information", "position_specific_share", "position_locked_share"),
)


@dataclass(frozen=True)
class _Part:
    """Some of an SAE's features, in what the measures ask of an SAE."""

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    d_model: int
    n_features: int


class SplitMeasures:
    """The measures of the first ``inside`` features and of the others, each under its own name.

    Args:
        sae: all of it.
        context: positions of a row.
        seed: of samples and nulls.
        inside: how many features, from the first, the temporal term sees.

    """

    def __init__(self, sae: SparseCoder, *, context: int, seed: int, inside: int):
        self._sae = sae
        self._slices = {"high": slice(0, inside), "low": slice(inside, sae.n_features)}
        self._measures: dict[str, Measures] = {}
        self._fidelity: dict[str, Fidelity] = {}
        for name, part in self._slices.items():
            rows = sae.W_dec[part]
            view: Any = _Part(sae.W_enc[:, part], rows, sae.b_dec, sae.d_model, len(rows))
            self._measures[name] = Measures(view, context=context, seed=seed)
            self._fidelity[name] = Fidelity(sae.b_dec.detach().float(), rows.detach().norm(dim=1))
        known = fidelity_definitions() | self._measures["high"].definitions
        self.definitions = {
            f"{key}_{name}": _of_part(known[key], name) for key in (*_FIDELITY, *_MEASURES) for name in PARTS
        }

    @torch.no_grad()
    def update(self, batch: TokenBatch, z_BTF: Tensor, x_hat_BTD: Tensor) -> None:  # noqa: ARG002 - the accumulators' signature
        """Take one batch in. Each part's reconstruction is what its features alone, and the bias, would give."""
        for name, part in self._slices.items():
            alone_BTF = torch.zeros_like(z_BTF)
            alone_BTF[..., part] = z_BTF[..., part]
            x_part_BTD = self._sae.decode(alone_BTF)
            z_part_BTF = z_BTF[..., part].contiguous()
            self._fidelity[name].add_reconstruction(batch, x_part_BTD, z_part_BTF)
            self._measures[name].update(batch, z_part_BTF, x_part_BTD)

    def result(self) -> Findings:
        """The chosen metrics of both parts; no curves and nothing per feature, which the whole has."""
        found = Findings()
        for name in PARTS:
            measured = self._measures[name].result()
            sums = {key: one for key, one in self._fidelity[name].sums().items() if key in _FIDELITY}
            sums |= {key: one for key, one in measured.sums.items() if key in _MEASURES}
            metrics = {key: one for key, one in measured.metrics.items() if key in _MEASURES}
            found.sums |= {f"{key}_{name}": replace(one, definition=f"{key}_{name}") for key, one in sums.items()}
            found.metrics |= {
                f"{key}_{name}": one.model_copy(update={"definition": f"{key}_{name}"}) for key, one in metrics.items()
            }
        inside = self._slices["high"].stop
        found.notes.append(
            f"metrics ending in _high are of its first {inside:,} features, in _low of the other "
            f"{self._sae.n_features - inside:,}"
        )
        return found


def _of_part(whole: Definition, name: str) -> Definition:
    label = f"{whole.label}, {name}" if whole.label else ""
    return whole.model_copy(update={"text": f"{whole.text}; {PARTS[name]} alone", "label": label})
