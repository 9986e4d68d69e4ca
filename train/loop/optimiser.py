"""Adam and AdamW of torch, called without torch's compiler.

Every method of an optimiser that torch wraps for its compiler imports that compiler (``torch._dynamo``, sympy, triton)
at the first call, though nothing here is compiled: two seconds of every start. The methods below it are the same.
"""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch
from torch.optim import Adam, AdamW, Optimizer


class _WithoutCompiler(Optimizer):
    """What torch's optimisers do, each method called as it is written."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.add_param_group`."""
        unwrap(Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`."""
        unwrap(Optimizer.zero_grad)(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`."""
        return unwrap(Optimizer.state_dict)(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.load_state_dict`."""
        unwrap(Optimizer.load_state_dict)(self, state_dict)


class PlainAdam(_WithoutCompiler, Adam):
    """:class:`torch.optim.Adam`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As :meth:`torch.optim.Adam.step`, never differentiable."""
        return unwrap(Adam.step)(self, closure)


class PlainAdamW(_WithoutCompiler, AdamW):
    """:class:`torch.optim.AdamW`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As :meth:`torch.optim.AdamW.step`, never differentiable."""
        return unwrap(AdamW.step)(self, closure)
