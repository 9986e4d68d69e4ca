"""One tensor of a running model, kept and replaced by hooks.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, is_tensor, nn

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class ModuleHook:
    """The output of a module, or its input: of several tensors the first.

    Args:
        module: of the running model.
        side: which of the two.
        scale: what the model multiplies the tensor with before it is used; what is kept and replaced is the product.
        in_place: the tensor is also used by others than the module (a residual stream that is read by a norm and added
            to later): it is replaced where it lies.

    """

    module: nn.Module
    side: Literal["output", "input"] = "output"
    scale: float = 1.0
    in_place: bool = False

    @contextmanager
    def keep(self, into: MutableMapping[Key, Tensor], key: Key) -> Iterator[None]:
        """While entered, every pass puts a copy of the tensor into a mapping.

        A copy, since some models go on writing into it (Falcon adds its attention to its MLP's output in place).
        """

        def see(x: Tensor) -> None:
            into[key] = x.detach().clone() if self.scale == 1.0 else x.detach() * self.scale

        def output_hook(_module: nn.Module, _args: Any, output: Any) -> None:
            see(first_tensor(output))

        def input_hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            see(first_argument(args, kwargs))

        with self._hook(output_hook, input_hook):
            yield

    @contextmanager
    def replace(self, x: Tensor) -> Iterator[None]:
        """While entered, ``x`` [B, T, D] (in the model's dtype) stands in the tensor's place."""

        def output_hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            return with_first(output, self._given(x, first_tensor(output)))

        def input_hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            there = first_argument(args, kwargs)
            if self.in_place:
                there.copy_(self._given(x, there))
                return None
            return with_first_argument(args, kwargs, self._given(x, there))

        with self._hook(output_hook, input_hook):
            yield

    def _given(self, x: Tensor, there: Tensor) -> Tensor:
        """What stands in the place of ``there``; OPT hands all tokens of a batch on in a row, [B·T, D]."""
        return (x.clone() if self.scale == 1.0 else x / self.scale).reshape(there.shape).to(there.device)

    @contextmanager
    def _hook(self, output_hook: Any, input_hook: Any) -> Iterator[None]:
        if self.side == "output":
            handle = self.module.register_forward_hook(output_hook)
        else:
            handle = self.module.register_forward_pre_hook(input_hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def first_tensor(output: Any) -> Any:
    """The tensor of a module's output: itself, or the first of a tuple, a list (GPT-1) or an output record."""
    return output if is_tensor(output) else output[0]


def with_first(output: Any, x: Tensor) -> Any:
    """An output of the same kind with another first tensor."""
    if is_tensor(output):
        return x
    if isinstance(output, tuple | list):
        return type(output)((x, *output[1:]))
    changed = type(output)(**output)  # a transformers ModelOutput
    changed[next(iter(output))] = x
    return changed


def first_argument(args: Any, kwargs: Any) -> Tensor:
    """The first tensor that a module was called with, positional arguments first."""
    return next(value for value in (*args, *kwargs.values()) if is_tensor(value))


def with_first_argument(args: Any, kwargs: Any, x: Tensor) -> tuple[Any, Any]:
    """The same call with another first tensor."""
    for at, value in enumerate(args):
        if is_tensor(value):
            return (*args[:at], x, *args[at + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if is_tensor(value))
    return args, {**kwargs, name: x}
