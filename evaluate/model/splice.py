"""Replacing one tensor of a model without running the layers below it again.

The clean pass runs once per batch and keeps the tensor at every location asked for, and the residual stream before the
block it lies in. A spliced pass then replaces the lower blocks by stand-ins (all but the last hand on what they get,
the last gives the residual stream that was kept, or the spliced one) and calls the model as ever, so that transformers
itself builds masks, rotary embeddings, layer types and the final norm; inside the block of a location a hook replaces
the tensor. Whatever the embedding makes of the tokens is thrown away by the stand-ins, so that architectures which
scale it or add positions to it need no special care.

Shapes: B rows, T positions, D model width, V vocabulary, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...extract.model.hooks import hook_of
from ...extract.model.module_hook import ModuleHook, with_first
from ...extract.model.placement import weights_in_memory
from ...sites import Location
from ...system.dense_product import linear
from .heldout_text import HeldOutText
from .token_text import token_text

if TYPE_CHECKING:
    from ...extract.model.load import LanguageModel

# How far the two paths may differ, relative to the largest final state. They do the same operations on the same numbers
# and are bit-equal wherever kernels are deterministic; the slack is for kernels that choose their order of summation by
# themselves.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class CleanPass:
    """What one ordinary pass leaves behind."""

    at: dict[Location, Tensor]
    """The tensor [B, T, D] at every location asked for."""
    before: dict[int, Tensor]
    """The residual stream [B, T, D] before every block inside which one of them lies, but the first."""
    final_BTD: Tensor
    """After the model's last norm: what its head multiplies."""

    def rows(self, chosen: Tensor) -> CleanPass:
        """Of some of its rows, by their number in it."""
        chosen = chosen.to(self.final_BTD.device)
        at = {key: x_BTD[chosen] for key, x_BTD in self.at.items()}
        before = {key: x_BTD[chosen] for key, x_BTD in self.before.items()}
        return CleanPass(at, before, self.final_BTD[chosen])


class SplicedModel:
    """A language model in which the tensor at a location can be replaced.

    Final states [B, T, D] are those after the model's last norm: what its head multiplies.
    """

    def __init__(self, lm: LanguageModel):
        self.lm = lm
        self._by_hook: set[Location] = set()
        # An output of a block, for stand-ins to answer in kind: transformers 5 gives tensors, 4 tuples, GPT-1 lists.
        self._output: Any = torch.zeros(0)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its states."""
        return self.lm.dtype

    @property
    def bos_token_id(self) -> int | None:
        """What every row begins with."""
        return self.lm.bos_token_id

    def token_text(self, token: int) -> str:
        """A token as readers see it, its leading space kept."""
        return token_text(self.lm.tokenizer, token)

    def of_rows(
        self, text: HeldOutText, rows: slice | Sequence[int], locations: Sequence[Location]
    ) -> dict[Location, Tensor]:
        """The tensor [B, T, D] at every location, of some rows of the text."""
        return self.activations(text.tokens(rows, self.device), locations)

    @torch.no_grad()
    def clean(self, tokens_BT: Tensor, locations: Sequence[Location]) -> CleanPass:
        """One ordinary pass."""
        kept: dict[Location, Tensor] = {}
        before: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            hooks.enter_context(self._noting_outputs())
            for at in locations:
                hooks.enter_context(hook_of(self.lm, at).keep(kept, at))
            for layer in self.inside_blocks(locations):
                hooks.enter_context(ModuleHook(self.lm.blocks[layer], "input").keep(before, layer))
            final_BTD = self._run(tokens_BT)
        here = {at: _shaped(x, final_BTD).to(self.device) for at, x in kept.items()}
        return CleanPass(here, {at: x.to(self.device) for at, x in before.items()}, final_BTD)

    @torch.no_grad()
    def activations(self, tokens_BT: Tensor, locations: Sequence[Location]) -> dict[Location, Tensor]:
        """The tensor [B, T, D] at every location; no block above the highest runs (where stand-ins work)."""
        highest = max(at.layer for at in locations)
        if any(at in self._by_hook for at in locations):
            return self.clean(tokens_BT, locations).at
        with self._handing_on(range(highest + 1, len(self.lm.blocks))):
            return self.clean(tokens_BT, locations).at

    @torch.no_grad()
    def spliced(self, at: Location, x_BTD: Tensor, tokens_BT: Tensor, clean: CleanPass) -> Tensor:
        """Final states [B, T, D] when ``x_BTD`` (cast to the model's dtype) stands where the tensor was.

        ``clean``: of these tokens, with this location asked for.
        """
        if at in self._by_hook or self._after(at) is not None:
            return self.continued(at, x_BTD, tokens_BT)
        with ExitStack() as stack:
            if at.layer:
                stack.enter_context(self._handing_on(range(at.layer - 1)))
                stack.enter_context(self._replaced(at.layer - 1, clean.before[at.layer]))
            stack.enter_context(hook_of(self.lm, at).replace(x_BTD.to(self.lm.dtype)))
            return self._run(tokens_BT)

    def inside_blocks(self, locations: Sequence[Location]) -> set[int]:
        """The blocks, but the first, inside which some of the locations lie: what comes before them is kept, too."""
        return {at.layer for at in locations if at.layer and self._after(at) is None}

    def is_block_output(self, at: Location) -> bool:
        """Whether the tensor is all that the layers above it need: the residual stream between two blocks."""
        return self._after(at) is not None

    def continued(self, at: Location, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """As :meth:`spliced`, with gradients to ``x_BTD`` and without a clean pass of these tokens.

        For block outputs (:meth:`is_block_output`), where only the layers above run, and for what :meth:`verify` has
        found to need the hook. One clean pass, of any tokens, must have been made before: it shows what blocks put out.
        """
        x_BTD = x_BTD.to(self.lm.dtype)
        with ExitStack() as stack:
            if at in self._by_hook:
                stack.enter_context(hook_of(self.lm, at).replace(x_BTD))
            else:
                after = self._after(at)
                assert after is not None  # noqa: S101 - see above
                stack.enter_context(self._handing_on(range(after)))
                stack.enter_context(self._replaced(after, x_BTD))
            return self._run(tokens_BT)

    @torch.no_grad()
    def spliced_by_hook(self, at: Location, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """The same by running the whole model with a hook that replaces the tensor: slow, and right by construction."""
        with hook_of(self.lm, at).replace(x_BTD.to(self.lm.dtype)):
            return self._run(tokens_BT)

    def verify(self, tokens_BT: Tensor, locations: Sequence[Location]) -> list[str]:
        """Try the shared prefix on a few rows; a location where it disagrees with the hook uses the hook from here on.

        Two trials per location: the identity splice against the clean pass, and a visibly changed one against the hook
        (stand-ins that the model ignored would pass the first). Returns a sentence for every location that fell back.
        """
        clean = self.clean(tokens_BT, locations)
        notes = []
        for at in locations:
            x_BTD = clean.at[at]
            changed = x_BTD.flip(1) * 0.5
            try:
                same = self.spliced(at, x_BTD, tokens_BT, clean)
                moved = self.spliced(at, changed, tokens_BT, clean)
            except Exception as failure:
                reason = f"{type(failure).__name__}: {failure}"
            else:
                by_hook = self.spliced_by_hook(at, changed, tokens_BT)
                if self._agree(same, clean.final_BTD) and self._agree(moved, by_hook):
                    continue
                reason = "its result differs from a full run with a hook"
            self._by_hook.add(at)
            who = self.lm.identity.architecture
            notes.append(
                f"layer {at}: the shared prefix does not work for {who} ({reason}); the whole model is run with hooks"
            )
        return notes

    def _after(self, at: Location) -> int | None:
        """The block whose output the tensor is; None where it lies inside one."""
        tap = hook_of(self.lm, at)
        near = (at.layer - 1, at.layer) if at.layer else (0,)
        return next((n for n in near if tap.side == "output" and tap.module is self.lm.blocks[n]), None)

    @contextmanager
    def _noting_outputs(self) -> Iterator[None]:
        def note(_module: Any, _inputs: Any, output: Any) -> None:
            # As many parts as the model unpacks, but nothing of this pass.
            empty = type(output)([None] * len(output)) if isinstance(output, tuple | list) else output
            self._output = with_first(empty, torch.zeros(0))

        handle = self.lm.blocks[0].register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def _agree(self, a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= TOLERANCE[a.dtype] * b.abs().max())

    def _run(self, tokens_BT: Tensor) -> Tensor:
        # Without an attention mask on purpose: padding only ever follows the text, and attention is causal.
        return self.lm.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state.to(self.device)

    @contextmanager
    def _handing_on(self, skipped: range) -> Iterator[None]:
        with ExitStack() as stack:
            for at in skipped:
                stack.enter_context(self._replaced(at, None))
            yield

    @contextmanager
    def _replaced(self, at: int, x_BTD: Tensor | None) -> Iterator[None]:
        blocks, real = self.lm.blocks, self.lm.blocks[at]
        blocks[at] = _StandIn(real, x_BTD, self._output)
        try:
            yield
        finally:
            blocks[at] = real


def _shaped(x: Tensor, final_BTD: Tensor) -> Tensor:
    """OPT hands all tokens of a batch on in a row, [B·T, D]."""
    return x.reshape(final_BTD.shape) if x.numel() == final_BTD.numel() else x


class Head:
    """The model's output layer in fp32, whatever the model's dtype: final states [N, D] → logits [N, V].

    The matrix product, the softcap (Gemma) and logit scales (Cohere, Granite) are done here and compared once with the
    model's own logits; a model whose head does something else uses its own, in its own dtype, and :attr:`note` says so.
    """

    def __init__(self, lm: LanguageModel):
        self.lm = lm
        self.note: str | None = None
        self._own = False
        output: Any = lm.model.get_output_embeddings()
        with weights_in_memory(output):
            self._W_VD: Tensor = output.weight.detach().float().to(lm.device)
            bias = getattr(output, "bias", None)
            self._b_V: Tensor | None = None if bias is None else bias.detach().float().to(lm.device)
        config = lm.model.config.get_text_config()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def vocab_size(self) -> int:
        """How many logits there are."""
        return self._W_VD.shape[0]

    @property
    def is_product(self) -> bool:
        """Whether the logits are a product with a matrix, up to a scale and a softcap."""
        return not self._own

    @property
    def uniform_at_zero(self) -> bool:
        """Whether a zero state gives equal logits: true without a bias."""
        return self._b_V is None and not self._own

    def verify(self, tokens_BT: Tensor, final_BTD: Tensor) -> None:
        """Compare with the model's own logits for these rows."""
        own = self.lm.model(input_ids=tokens_BT, use_cache=False).logits.float().flatten(0, 1).to(self.lm.device)
        ours = self(final_BTD.flatten(0, 1))
        if (ours - own).abs().max() > TOLERANCE[final_BTD.dtype] * own.abs().max():
            self._own = True
            self.note = (
                f"the head of {self.lm.identity.architecture} is not a plain product; its own "
                f"is used, in {final_BTD.dtype}"
            )

    @torch.no_grad()
    def __call__(self, final_ND: Tensor) -> Tensor:
        """Logits [N, V] in fp32."""
        if self._own:
            return self._own_logits(final_ND)
        logits = linear(final_ND.float(), self._W_VD)
        if self._b_V is not None:
            logits.add_(self._b_V)
        if self._scale != 1.0:
            logits.mul_(self._scale)
        if self._softcap:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits

    def logits(self, final_ND: Tensor) -> Tensor:
        """The same with gradients to the states: no step of it overwrites what the backward pass needs."""
        if self._own:
            return self._own_logits(final_ND)
        logits = final_ND.float() @ self._W_VD.T
        if self._b_V is not None:
            logits = logits + self._b_V
        if self._scale != 1.0:
            logits = logits * self._scale
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    def product(self, states_ND: Tensor) -> Tensor:
        """The matrix product alone [N, V]."""
        return states_ND @ self._W_VD.T

    def _own_logits(self, final_ND: Tensor) -> Tensor:
        """The model's own forward with a base that answers these states at once."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        model = self.lm.model
        prefix, base = model.base_model_prefix, model.base_model
        answer = _Answer(BaseModelOutputWithPast(last_hidden_state=final_ND[None]))
        setattr(model, prefix, answer)
        try:
            return (
                model(input_ids=torch.zeros(1, len(final_ND), dtype=torch.long, device=final_ND.device))
                .logits[0]
                .float()
            )
        finally:
            setattr(model, prefix, base)


class _Answer(nn.Module):
    def __init__(self, answer: Any):
        super().__init__()
        self._answer = answer

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._answer


class _StandIn(nn.Module):
    """Takes a block's place: hands on the hidden state it gets, or gives another one, in an output of the same kind."""

    def __init__(self, block: nn.Module, x_BTD: Tensor | None, output: Any):
        super().__init__()
        # Past nn.Module's registration: the block's parameters stay the real model's business.
        self.__dict__.update(_block=block, _x=x_BTD, _output=output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)  # models read attention types and the like off their layers

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        given = hidden_states if self._x is None else self._x
        return with_first(self._output, given)
