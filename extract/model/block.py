"""One block of a model, taken apart: which tensors attention and MLP add to the residual stream.

A copy of the block runs in float32 on random input while every module inside is watched. The two branches are those
whose outputs, times a factor each, add up to what the block adds; the middle is the tensor that equals the input plus
the first of them. Then each is replaced by noise, and the sums must hold again. No name decides but one: attention is
the branch that comes from a module whose class says so.

Shapes: B rows, T positions, D model width.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...errors import ModelError
from .module_hook import ModuleHook, first_argument, first_tensor, with_first_argument
from .placement import why_not_whole

if TYPE_CHECKING:
    from .load import LanguageModel

_ROWS, _POSITIONS = 2, 7
_CLOSE = 1e-4  # relative: float32 rounding over a block stays below 1e-5
_ATTENTION = re.compile(r"attention|attn|(?<![a-z])mla(?![a-z])", re.IGNORECASE)
_MIXER = re.compile(r"mamba|ssm|recurrent|conv|mixer|delta|gla|rwkv|lstm|linear_?attn|retention", re.IGNORECASE)


@dataclass(frozen=True)
class _Call:
    """One call of a module inside the block: its place in time, and its first tensors where they are [B, T, D]."""

    name: str
    module: nn.Module
    started: int
    given: Tensor | None
    made: Tensor | None


@dataclass(frozen=True)
class _Structure:
    """The block's arithmetic: hooks by the names of modules inside the block."""

    attention: tuple[str, float] | None
    """Module and factor; None where the branch that mixes tokens is something else."""
    mlp: tuple[str, float]
    middle: tuple[str, str] | None
    """Module and side; None where both branches read the same input."""
    normed: bool = False
    """Norms stand on the residual stream itself (GPT-1), so that it is no sum of what is added."""


class Block:
    """Block ``layer`` of a loaded model, as hook points see it."""

    def __init__(self, blocks: Sequence[nn.Module] | nn.ModuleList, layer: int, architecture: str, call: Any):
        self._blocks, self.layer, self.architecture, self._call = blocks, layer, architecture, call

    @classmethod
    def of(cls, lm: LanguageModel, layer: int) -> Block:
        """Of a loaded model."""
        return cls(lm.blocks, layer, lm.identity.architecture, lambda: _call_of(lm, layer))

    @property
    def module(self) -> nn.Module:
        """The block itself."""
        return self._blocks[self.layer]

    @property
    def previous(self) -> nn.Module | None:
        """The block before it; None for the first."""
        return self._blocks[self.layer - 1] if self.layer else None

    def child(self, *names: str) -> nn.Module:
        """The first of these submodules that the block has (``mlp``, ``feed_forward`` …).

        Raises:
            ModelError: it has none of them; the sentence lists what it has.

        """
        for name in names:
            found = dict(self.module.named_modules()).get(name)
            if found is not None:
                return found
        there = ", ".join(name for name, _ in self.module.named_children())
        raise self._refusal(f"has no {' or '.join(names)}, only {there}")

    @property
    def attention(self) -> ModuleHook:
        """What attention adds to the residual stream.

        Raises:
            ModelError: the block has no such tensor, or it cannot be told.

        """
        found = self._structure.attention
        if found is None:
            raise self._refusal("mixes tokens by something else than attention, so that there is no attn_out")
        return ModuleHook(self.module.get_submodule(found[0]), "output", self._exact(found[1]))

    @property
    def mlp(self) -> ModuleHook:
        """What the MLP adds to the residual stream.

        Raises:
            ModelError: the block has no such tensor, or it cannot be told.

        """
        name, scale = self._structure.mlp
        return ModuleHook(self.module.get_submodule(name), "output", self._exact(scale))

    @property
    def middle(self) -> ModuleHook:
        """The residual stream between attention and MLP.

        Raises:
            ModelError: there is none, or it cannot be told.

        """
        if self._structure.middle is None:
            raise self._refusal("lets attention and MLP read the same input, so that there is no resid_mid")
        name, side = self._structure.middle
        # Read by the norm (or the MLP), and added to again later: replaced for both.
        return ModuleHook(
            self.module.get_submodule(name), "input" if side == "input" else "output", in_place=side == "input"
        )

    def _exact(self, scale: float) -> float:
        """The factor as the block has it (``residual_multiplier``), where it has one: ours is fitted in float32."""
        there = [value for value in vars(self.module).values() if isinstance(value, float)]
        return next((value for value in there if abs(value - scale) <= _CLOSE * scale), scale)

    def _refusal(self, what: str) -> ModelError:
        return ModelError(f"block {self.layer} of {self.architecture} {what}: choose another --site")

    @cached_property
    def _structure(self) -> _Structure:
        if (reason := why_not_whole(self.module)) is not None:
            raise self._refusal(reason)
        args, kwargs = self._call()
        watched = _Watched(self.module, args, kwargs)
        try:
            run = watched.run()
        except Exception as failure:
            raise self._refusal(f"cannot be run by itself ({type(failure).__name__}: {failure})") from failure
        found = _sums(run) or _normed_sums(run)
        if found is None:
            raise self._refusal("adds no two tensors of modules inside it to the residual stream")
        for part in ("attention", "mlp", "middle"):
            if not watched.holds(found, part):
                raise self._refusal(f"goes on otherwise when its {part} is replaced than the sum of its parts says")
        return found


def _call_of(lm: LanguageModel, layer: int) -> tuple[Any, Any]:
    """How the model calls its block: arguments of one small pass, all blocks at once, kept with the model."""
    if not lm.block_calls:
        tokens_BT = torch.arange(_ROWS * _POSITIONS, device=lm.device).reshape(_ROWS, _POSITIONS) % lm.vocab_size
        with ExitStack() as hooks, torch.no_grad():
            for at, block in enumerate(lm.blocks):
                hooks.enter_context(_arguments(block, lm.block_calls, at))
            lm.decoder(input_ids=tokens_BT, use_cache=False)
    return lm.block_calls[layer]


@contextmanager
def _arguments(block: nn.Module, into: dict[int, Any], at: int) -> Iterator[None]:
    handle = block.register_forward_pre_hook(
        lambda _module, args, kwargs: into.__setitem__(at, (args, kwargs)), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Run:
    """What one run of the copy showed."""

    before: Tensor
    after: Tensor
    calls: list[_Call]

    @cached_property
    def outputs(self) -> list[_Call]:
        """The different tensors that modules put out, each with the outermost module that does."""
        found: list[_Call] = []
        for call in sorted(self.calls, key=lambda one: (one.name.count("."), one.started)):
            same = call.made is None or _same(call.made, self.before) or _same(call.made, self.after)
            if not same and not any(_same(call.made, other.made) for other in found):
                found.append(call)
        return sorted(found, key=lambda one: one.started)

    def call(self, name: str) -> _Call:
        """The last call of a module."""
        return [one for one in self.calls if one.name == name][-1]


class _Watched:
    """A float32 copy of a block, and the call it is run with."""

    def __init__(self, block: nn.Module, args: Any, kwargs: Any):
        self.copy = copy.deepcopy(block).float()
        self.args, self.kwargs = tree_map(_in_float32, (tuple(args), dict(kwargs)))
        like = first_argument(self.args, self.kwargs)
        self.draw = torch.Generator().manual_seed(0)
        self.x_BTD = self.noise(like)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers of that shape."""
        return torch.randn(like.shape, generator=self.draw).to(like.device)

    @torch.no_grad()
    def run(self, replaced: ModuleHook | None = None, by: Tensor | None = None) -> _Run:
        """Run the copy, with one tensor replaced if wanted."""
        calls: list[_Call] = []
        shape, clock = self.x_BTD.shape, iter(range(10**9))
        open_: dict[str, list[tuple[int, Tensor | None]]] = {}

        def opened(name: str) -> Any:
            def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
                given = next((one for one in (*args, *kwargs.values()) if torch.is_tensor(one)), None)
                open_.setdefault(name, []).append((next(clock), _copied(given, shape)))

            return hook

        def closed(name: str) -> Any:
            def hook(module: nn.Module, _args: Any, output: Any) -> None:
                started, given = open_[name].pop()
                made = first_tensor(output) if torch.is_tensor(output) or output else None
                calls.append(_Call(name, module, started, given, _copied(made, shape)))

            return hook

        # Hooks run in the order they are registered: what is watched is what a replacement left.
        with replaced.replace(by) if replaced is not None and by is not None else nullcontext(), ExitStack() as hooks:
            for name, module in self.copy.named_modules():
                if name:
                    handle = module.register_forward_pre_hook(opened(name), with_kwargs=True)
                    hooks.callback(handle.remove)
                    hooks.callback(module.register_forward_hook(closed(name)).remove)
            args, kwargs = with_first_argument(self.args, self.kwargs, self.x_BTD.clone())
            after = first_tensor(self.copy(*args, **kwargs))
        return _Run(self.x_BTD, after, calls)

    def holds(self, found: _Structure, part: str) -> bool:
        """Whether the sums hold when one part is replaced by noise."""
        where = getattr(found, part)
        if where is None:
            return True
        module = self.copy.get_submodule(where[0])
        if part == "middle":
            tap = ModuleHook(module, where[1], in_place=where[1] == "input")
        else:
            tap = ModuleHook(module, "output", where[1])
        noise = self.noise(self.x_BTD)
        run = self.run(tap, noise)
        if found.normed:
            return not _same(run.after, self.run().after)
        name, scale = found.mlp
        added = noise if part == "mlp" else scale * _made(run, name)
        if part == "middle":
            return _same(run.after, noise + added)
        if found.attention is None:
            return part != "mlp" or _close(run.after - added, self.run().after - scale * _made(self.run(), name))
        name, scale = found.attention
        return _same(run.after, run.before + (noise if part == "attention" else scale * _made(run, name)) + added)


def _made(run: _Run, name: str) -> Tensor:
    made = run.call(name).made
    if made is None:
        raise KeyError(name)
    return made


def _in_float32(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


def _copied(value: Any, shape: torch.Size) -> Tensor | None:
    """A copy as [B, T, D]; some models (OPT) hand their MLP all tokens in a row. None for what has another size."""
    if torch.is_tensor(value) and (value.shape == shape or value.shape == (shape[0] * shape[1], shape[2])):
        return value.detach().clone().reshape(shape)
    return None


def _close(a: Tensor, b: Tensor, relative: float = _CLOSE) -> bool:
    return bool((a - b).abs().max() <= relative * b.abs().max())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and _close(a, b)


def _sums(run: _Run) -> _Structure | None:
    """Two branches: after = before + s·a + t·m."""
    added = (run.after - run.before).flatten()
    for first, second in combinations(run.outputs, 2):
        parts = torch.stack([_flat(first), _flat(second)], dim=1).double()
        factors = torch.linalg.lstsq(parts, added.double()[:, None]).solution[:, 0]
        rest = (parts @ factors - added.double()).norm()
        shares = (parts * factors).norm(dim=0)
        if rest <= _CLOSE * added.norm() and bool((factors > 0).all()) and shares.min() > 1e-3 * added.norm():
            return _told_apart(run, (first, float(factors[0])), (second, float(factors[1])))
    return None


def _flat(call: _Call) -> Tensor:
    assert call.made is not None  # noqa: S101 - of `outputs`, for the type checker
    return call.made.flatten()


def _told_apart(run: _Run, first: tuple[_Call, float], second: tuple[_Call, float]) -> _Structure | None:
    if _comes_from(run, second[0], _ATTENTION):
        first, second = second, first
    mixes = _comes_from(run, first[0], _ATTENTION)
    if _comes_from(run, second[0], _ATTENTION) or not (mixes or _comes_from(run, first[0], _MIXER)):
        return None
    module_hooks = [(call.name, 1.0 if abs(factor - 1) < _CLOSE else factor) for call, factor in (first, second)]
    into = first[1] * _made(run, first[0].name)
    reads = [call for call in run.calls if call.given is not None and _close(call.given - run.before, into, 1e-2)]
    outer = min(reads, key=lambda one: (one.started, one.name.count(".")), default=None)
    return _Structure(
        attention=module_hooks[0] if mixes else None,
        mlp=module_hooks[1],
        middle=None if outer is None else (outer.name, "input"),
    )


def _comes_from(run: _Run, call: _Call, kind: re.Pattern[str]) -> bool:
    """Whether a tensor is put out by a module of that kind, inside one, or by a norm or dropout that reads such one."""
    for _ in range(4):
        parents = [".".join(call.name.split(".")[: n + 1]) for n in range(call.name.count(".") + 1)]
        named = {one.name: one for one in run.calls}
        if any(_is(named[name], kind) for name in parents if name in named):
            return True
        if call.given is None or any(p.ndim > 1 for p in call.module.parameters()):
            return False
        before = [one for one in run.calls if one.started < call.started and _same(one.made, call.given)]
        if not before:
            return False
        call = min(before, key=lambda one: one.name.count("."))
    return False


def _is(call: _Call, kind: re.Pattern[str]) -> bool:
    """A module that computes with matrices, by its class or its name: no norm that is called after what it follows."""
    name = f"{type(call.module).__name__} {call.name.split('.')[-1]}"
    return bool(kind.search(name)) and any(p.ndim > 1 for p in call.module.parameters())


def _normed_sums(run: _Run) -> _Structure | None:
    """Norms on the stream itself: mid = norm(before + a), after = norm(mid + m)."""
    for last in [call for call in run.calls if _same(call.made, run.after) and call.given is not None]:
        for mid in [call for call in run.outputs if call.given is not None]:
            first = [c for c in run.outputs if _same(c.made, mid.given - run.before)]  # type: ignore[operator]
            second = [c for c in run.outputs if _same(c.made, last.given - mid.made)]  # type: ignore[operator]
            if not first or not second or not _comes_from(run, first[0], _ATTENTION):
                continue
            found = _told_apart(run, (first[0], 1.0), (second[0], 1.0))
            return None if found is None else replace(found, middle=(mid.name, "output"), normed=True)
    return None
