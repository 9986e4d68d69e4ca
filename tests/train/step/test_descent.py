"""Between gradients and new weights: torch's own functions, one tensor at a time, are the slow twins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tcsae.train.loop.optimiser import PlainAdam, PlainAdamW
from tcsae.train.sae import unit_rows
from tcsae.train.sae.unit_rows import drop_radial, make_unit
from tcsae.train.step.descent import clip, descend, lies_transposed
from torch import nn


def a_weight(seed: int = 0) -> nn.Parameter:
    """[30, 40] that is [40, 30] in memory."""
    return nn.Parameter(torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)).t())


def with_gradient(weight: nn.Parameter, seed: int) -> None:
    weight.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)).t()


@pytest.mark.parametrize("kind", [PlainAdam, PlainAdamW])
@pytest.mark.parametrize("turned_from", [0, 2])
def test_a_matrix_given_as_it_lies_moves_as_ever(kind, turned_from: int) -> None:
    """Bit for bit, also where earlier steps, of a checkpoint say, were made with it the other way round."""
    one, other = a_weight(), a_weight()
    plain, turned = (kind([weight], lr=1e-2, fused=True) for weight in (one, other))
    assert lies_transposed(other)
    for step in range(4):
        for weight in (one, other):
            with_gradient(weight, step)
        plain.step()
        descend(turned, [other] if step >= turned_from else [])
        assert other.shape == (30, 40)
        assert other.grad is not None
        assert torch.equal(one, other)


def test_what_lies_transposed() -> None:
    assert not lies_transposed(torch.zeros(3, 4))
    assert lies_transposed(torch.zeros(3, 4).t())
    assert not lies_transposed(torch.zeros(3))
    assert not lies_transposed(torch.zeros(6, 8)[::2, ::2])


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4),
    st.sampled_from([0.0, 1e-2, 1.0, 1e6]),
)
def test_every_member_is_clipped_as_torch_does(scales: list[float], limit: float) -> None:
    members, twins = [], []
    for seed, scale in enumerate(scales):
        generator = torch.Generator().manual_seed(seed)
        both = [[nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(5))] for _ in range(2)]
        for one, twin in zip(*both, strict=True):
            one.grad = torch.randn(one.shape, generator=generator) * scale
            twin.grad = one.grad.clone()
        members.append(both[0])
        twins.append(both[1])
    norms = clip(members, limit)
    for own, twin, norm in zip(members, twins, norms, strict=True):
        wanted = torch.nn.utils.clip_grad_norm_(twin, limit or math.inf)
        torch.testing.assert_close(norm, wanted)
        for one, other in zip(own, twin, strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_a_norm_that_is_not_finite_is_told() -> None:
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, math.nan, 0.0])
    (norm,) = clip([[weight]], 1.0)
    assert math.isnan(norm)


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5), (1, 5), (2, 1, 5), (0, 5)])
@pytest.mark.parametrize("block", [1, 11, 1 << 18])
def test_blocks_of_rows_are_rows(shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_rows, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    rows, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rows[..., -1:, :] *= 0 if rows.numel() and rows.shape[-2] > 1 else 1  # a row that is zero stays so
    wanted = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    make_unit(rows)
    torch.testing.assert_close(rows, wanted)
    wanted = gradient - (gradient * rows).sum(-1, keepdim=True) * rows
    drop_radial(gradient, rows)
    torch.testing.assert_close(gradient, wanted)
    assert float((gradient * rows).sum(-1).abs().sum()) < 1e-12
