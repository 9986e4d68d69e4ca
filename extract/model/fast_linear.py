"""Linear layers of a language model on a CPU by the better of torch's two libraries: most of what a pass takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...system.dense_product import linear, prefers_onednn


class FastLinear(nn.Linear):
    """:class:`torch.nn.Linear`, whose numbers these are up to rounding."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
        """As of a linear layer; where gradients are wanted, torch's own."""
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return super().forward(input)
        return linear(input, self.weight, self.bias)


def speed_up(model: nn.Module) -> None:
    """Make plain linear layers in float32 fast ones. They stay where and what they are to everybody else; on a GPU
    nothing changes.
    """
    if not prefers_onednn():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = FastLinear
            if "_old_forward" in vars(module):  # what accelerate calls once it has brought the weights into memory
                setattr(module, "_old_forward", FastLinear.forward.__get__(module))  # noqa: B010 - no attribute of torch's
