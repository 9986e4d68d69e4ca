"""The optimisers are torch's, bit for bit, and do not start its compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tcsae.train.loop.optimiser import PlainAdam, PlainAdamW


def stepped(kind, resumed=None):
    """Parameters and state after five steps, the last two by a copy that loads the state."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(2)]
    gradients = torch.randn(5, 2, 5, 3, generator=generator)

    def new(which):
        groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
        return which(groups, lr=0.01, betas=(0.8, 0.95), fused=True)

    optimiser = new(kind)
    for at, step in enumerate(gradients):
        if at == 3:
            state = optimiser.state_dict()
            optimiser = new(resumed or kind)
            optimiser.load_state_dict(state)
        optimiser.zero_grad()
        for weight, gradient in zip(weights, step, strict=True):
            assert weight.grad is None
            weight.grad = gradient.clone()
        optimiser.step()
    return weights, optimiser.state_dict()


@pytest.mark.parametrize(("ours", "torchs"), [(PlainAdam, torch.optim.Adam), (PlainAdamW, torch.optim.AdamW)])
def test_steps_and_states_are_those_of_torch(ours, torchs):
    expected, state = stepped(torchs)
    for found, found_state in (stepped(ours), stepped(torchs, resumed=ours), stepped(ours, resumed=torchs)):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        assert found_state["param_groups"] == state["param_groups"]
        for at, of_parameter in state["state"].items():
            for name, value in of_parameter.items():
                assert torch.equal(found_state["state"][at][name], value), name


def test_a_step_does_not_import_the_compiler():
    script = """
import sys, torch
from tcsae.train.loop.optimiser import PlainAdamW
weight = torch.nn.Parameter(torch.ones(3))
optimiser = PlainAdamW([weight], lr=0.1, fused=True)
weight.grad = torch.ones(3)
optimiser.step()
optimiser.zero_grad()
optimiser.load_state_dict(optimiser.state_dict())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
