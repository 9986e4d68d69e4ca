"""What the trainer and the evaluator ask of every architecture, and what most of them can leave as it is.

Shapes: N windows, W positions, D model width, F features. Weights are float32. While training, activations are scaled
so that E‖x‖² = D; the scale is folded into the weights before they are saved, so that whatever is loaded takes and
gives raw activations.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from ...cache.storage.hub import upload
from ...errors import RunError, UsageError
from ..formats.locate import read_sae
from ..formats.registry import FORMATS
from ..loss import terms
from ..loss.terms import at_least_float32
from .unit_rows import drop_radial, make_unit

PREFIX_SIZES = "matryoshka_widths"  # in the metadata; SAELens' word

if TYPE_CHECKING:
    from ..config import SAEConfig, TrainConfig
    from ..loss.objective import Objective


@dataclass(frozen=True)
class SAEOutput:
    """What an SAE says of activations ``x`` [.., D]: its reconstruction, its codes and the codes before the activation.

    ``parts`` holds whatever else an architecture computes on the way and its own loss needs.
    """

    reconstruction: Tensor  # [.., D], in the units of x
    features: Tensor  # [.., F], ≥ 0 (what Temporal Feature Analysis predicts may be negative)
    pre_activations: Tensor  # [.., F]
    parts: dict[str, Tensor] = field(default_factory=dict)
    sparse: Tensor | None = None  # [.., F], the part of the codes that is sparse, where not all of them are

    @property
    def counted(self) -> Tensor:
        """The codes [.., F] whose L0 the configuration sets."""
        return self.features if self.sparse is None else self.sparse

    def at(self, mask: Tensor) -> SAEOutput:
        """The same of some tokens [N] of those it was computed for."""
        return self.each(lambda value: value[mask])

    def each(self, change: Callable[[Tensor], Tensor]) -> SAEOutput:
        """The same with every tensor changed."""
        return SAEOutput(
            change(self.reconstruction),
            change(self.features),
            change(self.pre_activations),
            {name: change(value) for name, value in self.parts.items()},
            None if self.sparse is None else change(self.sparse),
        )


@dataclass(frozen=True)
class RowTokens:
    """Which tokens of a batch of whole rows count, and whose document each is of. N rows, T positions.

    Attributes:
        valid_NT: bool; the others are not looked at by tokens that count.
        documents_NT: running document numbers.
        n_tokens: how many count.
        one_run_from: where in every row all that counts is of one document and without gaps, and begins at this
            position in all of them or later; None where not.

    """

    valid_NT: Tensor
    documents_NT: Tensor
    n_tokens: int
    one_run_from: int | None

    @classmethod
    def of(cls, valid_NT: Tensor, documents_NT: Tensor, device: torch.device | None = None) -> RowTokens:
        """From mask and documents; best on the CPU, and then moved to ``device``."""
        used = valid_NT.any(0).nonzero()
        start = int(used[0]) if len(used) else 0
        valid, documents = valid_NT[:, start:], documents_NT[:, start:]
        follows = valid[:, 1:] & (~valid[:, :-1] | (documents[:, 1:] != documents[:, :-1]))
        n_tokens, plain = int(valid_NT.sum()), not bool(follows.any())
        device = device or valid_NT.device
        return cls(valid_NT.to(device), documents_NT.to(device), n_tokens, start if plain else None)

    @classmethod
    def whole(cls, x_NTD: Tensor) -> RowTokens:
        """Of rows that hold nothing but tokens of one document."""
        valid = torch.ones(x_NTD.shape[:2], dtype=torch.bool, device=x_NTD.device)
        return cls(valid, torch.zeros_like(valid, dtype=torch.int64), valid.numel(), 0)

    def counted(self, value_NTX: Tensor) -> Tensor:
        """What belongs to the tokens that count, row by row [n_tokens, X]."""
        start = self.one_run_from
        if start is not None and self.n_tokens == value_NTX.shape[0] * (value_NTX.shape[1] - start):
            return value_NTX[:, start:].flatten(0, 1)  # no gather, and no scatter in the backward pass
        return value_NTX[self.valid_NT]

    def at(self, rows: slice) -> RowTokens:
        """Of some of the rows."""
        return RowTokens.of(self.valid_NT[rows], self.documents_NT[rows])


class SparseCoder(Protocol):
    """An SAE as something that gives every token of a row its own code and reconstruction, on raw activations."""

    @property
    def W_enc(self) -> Tensor:  # noqa: N802 - as everybody calls it
        """[D, F]."""
        ...

    @property
    def W_dec(self) -> Tensor:  # noqa: N802 - as everybody calls it
        """[F, D], a feature's direction in the space of one token."""
        ...

    @property
    def b_dec(self) -> Tensor:
        """[D]."""
        ...

    @property
    def d_model(self) -> int:
        """D."""
        ...

    @property
    def n_features(self) -> int:
        """F."""
        ...

    @property
    def sees(self) -> Literal["token", "window", "row"]:
        """What a code is computed from."""
        ...

    @property
    def summands(self) -> tuple[str, ...]:
        """The names of those of its parts whose sum its codes are; empty where they are none."""
        ...

    def decode(self, z: Tensor, /) -> Tensor:
        """Codes [.., F] → reconstruction [.., D]."""
        ...

    def on_rows(self, x_NTD: Tensor, rows: RowTokens, /) -> SAEOutput:
        """Every token's own code and reconstruction."""
        ...


class SparseAutoencoder(nn.Module):
    """Base of all architectures.

    A new one overrides :meth:`build`, :meth:`initialise` and :meth:`forward`, and the terms of its loss where they
    differ; autograd does the rest.

    Attributes:
        W_enc: [d_model, n_features]. b_enc: [n_features].
        W_dec: [n_features, d_model], a feature's direction in the activations' space; b_dec: [d_model].
        metadata: where the SAE belongs (model_name, hook_name, layer …); saved with it.

    """

    architecture: ClassVar[str]
    """The name it is registered under."""
    sees: Literal["token", "window", "row"] = "token"
    """What a code is computed from. token: one activation [.., D]. window: ``sae.window`` of them [N, W, D], with one
    code [N, F] for all. row: those before it in its row: :meth:`forward` takes rows [N, T, D] and a :class:`RowTokens`.
    """

    summands: tuple[str, ...] = ()
    """The names of those of an output's parts whose sum its codes are."""

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, d_model: int, n_features: int, *, metadata: dict[str, Any] | None = None):
        super().__init__()
        self.d_model, self.n_features = d_model, n_features
        self.metadata = dict(metadata or {})

    @property
    def label(self) -> str:
        """What tables call it: its activation, or its architecture where that is more."""
        return self.architecture

    @property
    def prefix_sizes(self) -> tuple[int, ...]:
        """Features in each prefix that reconstructs by itself; only the whole dictionary without nested groups."""
        return tuple(self.metadata.get(PREFIX_SIZES) or (self.n_features,))

    # --- making one

    @classmethod
    def build(cls, config: SAEConfig, d_model: int) -> Self:
        """A new one as the configuration says, its weights not yet filled."""
        raise NotImplementedError

    def initialise(self, config: SAEConfig, seed: int, centre_D: Tensor | None = None) -> None:
        """Fill the weights from one generator of that seed; ``centre_D`` is where b_dec begins unless that is zero."""
        raise NotImplementedError

    @classmethod
    def fixes_sparsity(cls, config: SAEConfig) -> bool:
        """Whether L0 follows from the configuration's k: then no λ1 is needed, and AuxK revives dead features."""
        return False

    @classmethod
    def default_l1(cls, config: SAEConfig) -> float:
        """λ1 where the configuration leaves it open and :meth:`fixes_sparsity` is false."""
        return 1.5

    @classmethod
    def auxiliary_weight(cls, config: SAEConfig, aux_weight: float) -> float:
        """Weight of :meth:`auxiliary_loss`; ``aux_weight`` is the configuration's, which is that of AuxK."""
        return aux_weight if cls.fixes_sparsity(config) else 0.0

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Refuse what the configuration asks for and this architecture does not have.

        Raises:
            UsageError: it cannot be trained so.

        """
        if cls.sees == "window" and config.temporal.form != "none":
            what = f"{cls.architecture} has one code for a whole window"
            raise UsageError(f"{what}, so that there are no codes of neighbours to compare: use --temporal none")

    @classmethod
    def active_features(cls, config: SAEConfig) -> int:
        """Active features of a code, where :meth:`fixes_sparsity`."""
        return config.k

    @classmethod
    def step_bytes(cls, config: SAEConfig, d_model: int, n_tokens: int) -> int:
        """Bytes that one step through autograd takes for activations, codes and their gradients."""
        # pre-activations, codes, their gradient and one temporary, per token and feature
        residuals = 2 + 2 * len(config.groups)
        return n_tokens * 4 * (4 * config.width + residuals * d_model)

    # --- what it computes

    def forward(self, x: Tensor, rows: RowTokens | None = None) -> SAEOutput:
        """Everything about activations ``x`` [.., D]; ``rows`` are given to architectures that see rows."""
        raise NotImplementedError

    def token_coder(self) -> SparseCoder:
        """The SAE as what gives every token of a row its own code; itself, unless a code is of several tokens."""
        return self

    def on_rows(self, x_NTD: Tensor, rows: RowTokens) -> SAEOutput:
        """See :class:`SparseCoder`."""
        return self(x_NTD, rows) if self.sees == "row" else self(x_NTD)

    def forward_flops(self, context: int) -> float:
        """Floating-point operations per token, as :meth:`token_coder` in rows of ``context`` positions; dense."""
        return 2 * (self.W_enc.numel() + self.W_dec.numel())

    def encode(self, x: Tensor) -> Tensor:
        """Activations [.., D] → codes [.., F]."""
        return self.forward(x).features

    def decode(self, z: Tensor) -> Tensor:
        """Codes [.., F] → reconstruction [.., D] (eq 5)."""
        return z @ self.W_dec + self.b_dec

    # --- its loss; each term is a mean over tokens

    def reconstruction_loss(self, x: Tensor, out: SAEOutput, objective: Objective) -> Tensor:
        """Mean over tokens of Σ_d (x − x̂)²; with nested groups the weighted sum of that of every prefix."""
        groups = objective.groups or ((self.n_features, 1.0),)
        return sum((weight * self.prefix_error(x, out, size) for size, weight in groups), x.new_zeros(()))

    def prefix_error(self, x: Tensor, out: SAEOutput, n_features: int) -> Tensor:
        """Mean over tokens of Σ_d (x − x̂)² where only the first ``n_features`` of the dictionary reconstruct."""
        if n_features >= self.n_features:
            return terms.reconstruction(x, at_least_float32(out.reconstruction))
        # Whatever decode does with codes: those beyond the prefix are zero to it.
        kept = torch.arange(self.n_features, device=x.device) < n_features
        return terms.reconstruction(x, at_least_float32(self.decode(at_least_float32(out.features) * kept)))

    def sparsity_loss(self, out: SAEOutput, objective: Objective) -> Tensor:
        """What λ1 weighs: Σ z, times the norms of the decoder's rows where the objective says so."""
        return terms.l1(at_least_float32(out.features), self.W_dec.norm(dim=-1) if objective.decoder_norms else None)

    def auxiliary_loss(self, x: Tensor, out: SAEOutput, dead_F: Tensor | None, objective: Objective) -> Tensor | None:
        """What ``objective.aux_weight`` weighs: AuxK, where there are dead features; None where there is nothing."""
        if dead_F is None or not bool(dead_F.any()):
            return None
        residual = (x - at_least_float32(out.reconstruction)).detach().flatten(0, -2)
        pre = at_least_float32(out.pre_activations).flatten(0, -2)
        loss = terms.aux_k(residual, pre, self.W_dec, dead_F, objective.aux_k)
        return loss / terms.variance(residual) if objective.aux_normalised else loss

    # --- around a step

    def after_backward(self, out: SAEOutput) -> None:
        """Called once per step with what :meth:`forward` gave, gradients done: for running statistics."""

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The parameters that are not decayed unless ``optimiser.decay_decoder`` says so."""
        return [self.W_dec, self.b_dec]

    def fast_parameters(self) -> list[nn.Parameter]:
        """Parameters of the size of activations, not of weights: their learning rate is √D times as large."""
        return []

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove what would only be undone by :meth:`constrain`; called where decoder rows keep norm 1."""
        if self.W_dec.grad is not None:
            drop_radial(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def constrain(self) -> None:
        """Give decoder rows norm 1; called after a step where the configuration asks for it."""
        make_unit(self.W_dec)

    @property
    def running_threshold(self) -> Tensor | None:
        """The threshold [] used outside training, where there is one: after the last step it is set to the mean, over
        batches, of the smallest active code.
        """
        return None

    # --- keeping one

    def settings(self) -> dict[str, Any]:
        """What :meth:`from_settings` needs beside the widths; plain JSON values, kept in ``cfg.json``."""
        return {}

    @classmethod
    def from_settings(cls, d_model: int, n_features: int, settings: dict[str, Any], metadata: dict[str, Any]) -> Self:
        """One whose weights are about to be loaded."""
        return cls(d_model, n_features, metadata=metadata, **settings)

    @torch.no_grad()
    def rescaled(self, scale: float) -> Self:
        """The same SAE for raw activations, where this one takes ``scale`` times them: equal codes, x̂ / scale.

        This one fits whatever computes its codes from (x − b_dec) W_enc or x W_enc, and x̂ from z W_dec + b_dec.
        """
        raw = self.from_settings(self.d_model, self.n_features, self.settings(), self.metadata)
        raw.to(self.W_enc).train(self.training).load_state_dict(self.state_dict())
        raw.W_enc.mul_(scale)
        raw.W_dec.div_(scale)
        raw.b_dec.div_(scale)
        return raw

    def save(self, path: str | Path) -> None:
        """Write ``cfg.json`` and ``sae_weights.safetensors``, which SAELens opens where it knows the architecture.

        Raises:
            RunError, ResourceError: the folder cannot be written, or a batchtopk threshold was never measured.

        """
        FORMATS.get("saelens").write(self, Path(path))

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload it in SAELens' format, with a model card of what its metadata say; ``load(repository)`` reads it.

        The card of a run says more: ``pipeline export RUN --push-to-hub OWNER/NAME``.

        Args:
            repository: ``OWNER/NAME``, made if it is not there.
            private: whether a repository that is made now can be seen by its owner alone.

        Returns:
            The address of its page.

        Raises:
            RunError: the hub refuses or is out of reach.

        """
        from ..formats.model_card import CARD, plain_card

        with tempfile.TemporaryDirectory() as scratch:
            self.save(scratch)
            name = repository.split("/")[-1]
            card = plain_card(name, self.label, self.n_features, self.d_model, self.metadata)
            (Path(scratch) / CARD).write_text(card, encoding="utf-8")
            return upload(Path(scratch), repository, "model", private=private, failure=RunError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an SAE of any registered format, by path or hub id, in evaluation mode, on the CPU, for raw activations.

        Raises:
            RunError: there is none, it is damaged, or it is not of this class.

        """
        _, sae = read_sae(path)
        if not isinstance(sae, cls):
            what = f"{path} holds a {type(sae).__name__}, which is no {cls.__name__}"
            raise RunError(f"{what}: load it with {type(sae).__name__}.load or SparseAutoencoder.load")
        return sae
