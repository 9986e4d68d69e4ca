"""One row of the table while it is measured, and as it is kept on disk so that an evaluation that stops goes on.

A kept row holds sums per unit of text, not quotients: scores against references, intervals and paired differences are
computed from whatever rows there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..console import warn
from ..sites import RESIDUAL, Location
from ..system.atomic_files import write_file
from ..system.checksums import content_hash
from ..system.untrusted_files import open_regular, reason
from ..train.sae.protocol import RowTokens, SparseCoder
from .intervals.jackknife import Jackknifed
from .metrics.active_entries import ActiveEntries
from .metrics.fidelity import OUTLIERS, SPARSITY, Fidelity
from .metrics.saebench import SAEBenchSums
from .model.heldout_text import Survey
from .model.reference_rows import replacement
from .protocol import Findings, State, TokenBatch, UnitSums
from .results import Curve, Definition, FeatureCard, Metric, Role, SAEFacts
from .subjects import Subject

MADE_OF = {"zero_sae": "zero"}
"""A reference whose row is that of another one but for its L0: see :func:`row_of_zero_sae`."""


@dataclass
class MeasuredRow:
    """Everything measured of one SAE or reference at one layer and site."""

    name: str
    kind: Literal["sae", "reference"]
    layer: int
    role: Role | None = None
    pair: str | None = None
    facts: SAEFacts | None = None
    sums: dict[str, UnitSums] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    cards: list[FeatureCard] = field(default_factory=list)
    definitions: dict[str, Definition] = field(default_factory=dict)
    compat: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    site: str = RESIDUAL
    subject_notes: list[str] = field(default_factory=list)
    """What is noted of the SAE itself rather than found on the text; not kept on disk."""
    documents_U: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """int64 [U]: the document that each unit of the text belongs to."""
    file: str = ""
    """Where it is kept, seen from the report's folder; not kept on disk."""
    codes: str = ""
    """Where its codes on the text are, seen from the report's folder; empty: they were not kept. Not kept on disk."""

    @property
    def location(self) -> Location:
        """Layer and site."""
        return Location(self.layer, self.site)

    def described_by(self, subject: Subject) -> MeasuredRow:
        """The same row with all that is known of its SAE apart from measurements."""
        self.name, self.role, self.pair, self.facts = subject.name, subject.role, subject.pair, subject.facts
        self.subject_notes = list(subject.notes)
        return self

    def take(self, findings: Findings) -> None:
        """Add what an accumulator found."""
        self.sums |= findings.sums
        self.metrics |= findings.metrics
        self.curves |= findings.curves
        self.notes += [note for note in findings.notes if note not in self.notes]

    def save(self, path: Path) -> None:
        """Write the row whole or not at all."""
        plain: dict[str, Any] = {
            "row": {key: getattr(self, key) for key in _PLAIN},
            "facts": self.facts.model_dump() if self.facts else None,
            "cards": [card.model_dump() for card in self.cards],
            "sums": {name: {key: getattr(one, key) for key in _ABOUT} for name, one in self.sums.items()},
        } | {key: {name: one.model_dump() for name, one in getattr(self, key).items()} for key in _MODELS}
        arrays = {f"{name}:{side}": getattr(one, f"{side}_U") for name, one in self.sums.items() for side in _SIDES}
        arrays |= {"plain": np.array(json.dumps(plain)), "documents": self.documents_U}
        check = np.array(array_hash(arrays))
        write_file(path, lambda file: np.savez_compressed(file, allow_pickle=False, check=check, **arrays))

    @classmethod
    def load(cls, path: Path) -> MeasuredRow | None:
        """The row kept at ``path``; None where there is none, or one that this version cannot read.

        A damaged one is named, and measured again.
        """
        if not path.exists():
            return None
        try:
            with open_regular(path) as file, np.load(file, allow_pickle=False) as kept:
                arrays = {name: kept[name] for name in kept.files}
            if str(arrays.pop("check")) != array_hash(arrays):
                raise ValueError("it does not have the hash it says")
            plain = json.loads(str(arrays["plain"]))
            sums = {
                name: UnitSums(**(about | {f"{side}_U": arrays[f"{name}:{side}"] for side in _SIDES}))
                for name, about in plain["sums"].items()
            }
            models: dict[str, Any] = {
                key: {name: kind(**one) for name, one in plain[key].items()} for key, kind in _MODELS.items()
            }
            facts = SAEFacts(**plain["facts"]) if plain["facts"] else None
            cards = [FeatureCard.model_validate(card) for card in plain["cards"]]
            row: dict[str, Any] = plain["row"] | models
            return cls(**row, facts=facts, cards=cards, sums=sums, documents_U=arrays["documents"])
        except Exception as failure:  # damaged archives raise errors of many kinds, and each means the same here
            warn(f"{path} cannot be used ({reason(failure)}): the row is measured again")
            return None


def array_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """Of the names, types and bytes of arrays."""
    parts = {name: [str(array.dtype), xxhash.xxh3_128_hexdigest(array.tobytes())] for name, array in arrays.items()}
    return content_hash(parts)


def _metric(**kept: Any) -> Metric:
    return Jackknifed(**kept) if "left_out" in kept else Metric(**kept)


_PLAIN = ("name", "kind", "layer", "site", "role", "pair", "compat", "notes")
_MODELS: dict[str, Any] = {"metrics": _metric, "curves": Curve, "definitions": Definition}
_SIDES = ("numerator", "denominator")
_ABOUT = ("unit", "definition", "offset", "scale", "n")


class Candidate:
    """A row being measured: computes features and reconstruction of every batch and passes them to what sums them.

    Args:
        row: what is known of it beforehand.
        sae: on the device of the batches; None for a reference without features.
        survey: of its location.
        accumulators: what is measured of its features; empty for a reference.
        key: its name in the cache of rows.
        in_model: whether there is a language model that reconstructions are spliced into.
        seen_R: bool [R], the rows it sees at all; None: all.
        spliced_R: bool [R], the rows it is spliced into, among those that are spliced; None: all of them.
        fidelity: whether losses and errors are measured; L0 and L1 always are.

    """

    def __init__(
        self,
        row: MeasuredRow,
        sae: SparseCoder | None,
        survey: Survey,
        accumulators: Mapping[str, Any],
        key: str,
        *,
        in_model: bool = True,
        seen_R: np.ndarray | None = None,
        spliced_R: np.ndarray | None = None,
        fidelity: bool = True,
    ):
        self.row, self.sae, self.survey, self.key = row, sae, survey, key
        self.accumulators = dict(accumulators)
        self._in_model = in_model
        self.fidelity = Fidelity(survey.mean_D, None if sae is None else sae.W_dec.norm(dim=1))
        self.compat = SAEBenchSums()
        self._seen_R, self._spliced_R, self._fidelity = seen_R, spliced_R, fidelity

    def seen(self, rows: slice) -> Tensor:
        """Which of these rows it sees, by their number among them."""
        if self._seen_R is None:
            return torch.arange(rows.stop - rows.start)
        return torch.from_numpy(np.flatnonzero(self._seen_R[rows]))

    def spliced(self, rows: slice, spliced: Tensor) -> Tensor:
        """Which of the rows ``spliced`` it is spliced into."""
        return spliced if self._spliced_R is None else spliced[torch.from_numpy(self._spliced_R[rows])[spliced]]

    @torch.no_grad()
    def observe(self, batch: TokenBatch) -> Tensor:
        """Take a batch in; returns the reconstruction [B, T, D] in float32."""
        if self.sae is None:
            z_BTF, x_hat_BTD, parts = None, replacement(self.row.name, batch, self.survey.mean_D), {}
        else:
            # Windows and rows hold what training saw: no special tokens, no outliers, one document.
            out = self.sae.on_rows(batch.x_BTD, RowTokens.of(batch.valid_BT, batch.documents_BT))
            z_BTF, x_hat_BTD, parts = out.features, out.reconstruction, out.parts
        self.fidelity.add_reconstruction(batch, x_hat_BTD, z_BTF)
        self.compat.add_reconstruction(batch, x_hat_BTD, z_BTF)
        if self.accumulators:
            none_BT0 = batch.x_BTD[..., :0]  # the activations themselves have no features
            active = ActiveEntries.from_dense(none_BT0 if z_BTF is None else z_BTF, batch.valid_BT, parts)
            for accumulator in self.accumulators.values():
                accumulator.update(batch, active, x_hat_BTD)
        return x_hat_BTD

    def state(self) -> State:
        """What it holds of the rows that it has seen; what reads its features must be mergeable."""
        inside = {name: one.state() for name, one in self.accumulators.items()}
        return {"fidelity": self.fidelity.state(), "compat": self.compat.state(), "accumulators": inside}

    def merge(self, later: State) -> None:
        """Take in the state of the same row over later rows of the text."""
        self.fidelity.merge(later["fidelity"])
        self.compat.merge(later["compat"])
        for name, state in later["accumulators"].items():
            self.accumulators[name].merge(state)

    def finish(self) -> dict[str, np.ndarray]:
        """Complete the row; returns what is known per feature."""
        sums = self.fidelity.sums(spliced=self._in_model)
        if self._fidelity:
            self.row.compat = self.compat.state() if self._in_model else {}
        else:
            sums = {name: one for name, one in sums.items() if name.removesuffix(OUTLIERS) in SPARSITY}
        self.row.sums |= sums
        per_feature: dict[str, np.ndarray] = {}
        for accumulator in self.accumulators.values():
            found = accumulator.result()
            self.row.take(found)
            self.row.definitions |= accumulator.definitions
            per_feature |= found.per_feature
        return per_feature


def row_of(subject: Subject) -> MeasuredRow:
    """The row of an SAE before anything is measured."""
    return MeasuredRow(subject.name, "sae", subject.at.layer, site=subject.at.site).described_by(subject)


def row_of_zero_sae(zero: MeasuredRow) -> MeasuredRow:
    """The row of an SAE whose weights are all zero: its reconstruction is zero, and no feature is ever active."""
    sums = dict(zero.sums)
    for suffix in ("", OUTLIERS):
        tokens_U = zero.sums["mse_per_token" + suffix].denominator_U
        for name in (one + suffix for one in SPARSITY):
            sums[name] = replace(sums[name], numerator_U=np.zeros_like(tokens_U), denominator_U=tokens_U)
    compat = zero.compat and zero.compat | dict.fromkeys(SPARSITY, 0.0)  # none where there is no language model
    return replace(zero, name="zero_sae", sums=sums, compat=compat, file="")
