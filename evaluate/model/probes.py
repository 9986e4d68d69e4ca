"""What is asked of model and text after the pass: a few rows encoded again, altered rows run, tokens as text.

Shapes: n rows asked for, T positions, D model width, F features, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from ...cache.format.layout import RowBlock
from ...sites import BUILT_IN, Location
from ...train.sae.protocol import RowTokens, SparseCoder
from .heldout_text import HeldOutText
from .logit_effects import LogitEffects
from .splice import SplicedModel
from .stored_vectors import StoredVectors

PROBE_ROWS = 256


@dataclass
class ProbedModel:
    """The model and the text, shared by all probes; keeps the activations of rows asked for more than once."""

    model: SplicedModel | StoredVectors
    text: HeldOutText
    effects: LogitEffects | None
    _kept: dict[tuple[Location, int], Tensor]
    _altered: dict[tuple[Location, bytes], Tensor]
    left_out: set[str] = field(default_factory=set)
    """Families of metrics that need a language model where there is none."""

    @classmethod
    def of(cls, model: SplicedModel | StoredVectors, effects: LogitEffects | None, text: HeldOutText) -> ProbedModel:
        """With nothing kept yet."""
        return cls(model, text, effects, {}, {})

    def run(self, tokens_BT: Tensor, at: Location) -> Tensor:
        """The tensor [B, T, D] at ``at`` for any tokens, in float32."""
        return self.model.activations(tokens_BT.to(self.model.device), [at])[at].float()

    def run_once(self, tokens_BT: Tensor, at: Location) -> Tensor:
        """The same, kept for the location's other SAEs: probes ask each of them about the same altered rows."""
        key = (at, sha256(tokens_BT.cpu().numpy().tobytes()).digest())
        if key not in self._altered:
            self._altered[key] = self.run(tokens_BT, at).to(self.model.dtype)
        return self._altered[key].float()

    def rows(self, rows: Sequence[int], at: Location) -> Tensor:
        """The same for rows of the text; each is run once."""
        missing = [row for row in rows if (at, row) not in self._kept]
        if missing:
            x_BTD = self.model.of_rows(self.text, missing, [at])[at].to(self.model.dtype)
            self._kept |= {(at, row): x_TD for row, x_TD in zip(missing, x_BTD, strict=True)}
        return torch.stack([self._kept[at, row] for row in rows]).float()

    def forget(self) -> None:
        """Drop the kept activations."""
        self._kept.clear()
        self._altered.clear()


@dataclass
class ProbeContext:
    """What is asked of model and text about one SAE, once the pass is over."""

    probed: ProbedModel
    sae: SparseCoder
    at: Location
    seed: int
    per_feature: Mapping[str, np.ndarray]
    norm_limit: float = math.inf
    """Norm beyond which a token does not count."""

    @property
    def text(self) -> HeldOutText:
        """The text that is evaluated on."""
        return self.probed.text

    @property
    def n_tokens(self) -> int:
        """Tokens of the text that are neither special nor padding."""
        return self.probed.text.n_tokens

    @property
    def bos_token_id(self) -> int | None:
        """What every row begins with."""
        return self.probed.model.bos_token_id

    @property
    def rows(self) -> list[RowBlock]:
        """Some hundred rows of the text, as one block."""
        text = self.probed.text
        part = slice(0, PROBE_ROWS)
        flags = np.where(text.real_RT[part], 0, 1).astype(np.uint8)
        return [RowBlock(text.tokens_RT[part].astype(np.int32), text.documents_RT[part].astype(np.int32), flags)]

    def run_rows(self, tokens_BT: Tensor) -> Tensor:
        """The tensor [B, T, D] that the SAE reconstructs, for any tokens."""
        return self.probed.run_once(tokens_BT, self.at)

    def tokens_of(self, rows: Sequence[int]) -> np.ndarray:
        """Token ids [n, T]."""
        return self.probed.text.tokens_RT[list(rows)]

    def documents_of(self, rows: Sequence[int]) -> np.ndarray:
        """Document numbers [n, T]."""
        return self.probed.text.documents_RT[list(rows)]

    @torch.no_grad()
    def encode_rows(self, rows: Sequence[int]) -> Tensor:
        """Features [n, T, F]."""
        x_nTD, text = self.probed.rows(rows, self.at), self.probed.text
        real_nT, documents_nT = (
            torch.from_numpy(each[list(rows)]).to(x_nTD.device) for each in (text.real_RT, text.documents_RT)
        )
        valid_nT = real_nT & (x_nTD.norm(dim=-1) <= self.norm_limit)
        return self.sae.on_rows(x_nTD, RowTokens.of(valid_nT, documents_nT)).features

    def token_text(self, token: int) -> str:
        """A token as readers see it, its leading space kept."""
        return self.probed.model.token_text(token)

    def logit_effects(self, directions_nD: Tensor) -> Tensor | None:
        """What adding each direction to the residual stream does to the logits [n, V].

        None where that is unknown, and where the SAE's directions are none of the residual stream.
        """
        if self.at.site not in BUILT_IN or self.probed.effects is None:
            return None
        return self.probed.effects(directions_nD.to(self.probed.model.device))
