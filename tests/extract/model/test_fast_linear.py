"""Linear layers by oneDNN: torch's numbers up to rounding, torch's own path wherever that is asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from tcsae.extract.model import fast_linear
from tcsae.extract.model.fast_linear import FastLinear, speed_up
from tcsae.system import dense_product
from tcsae.system.dense_product import linear
from torch import nn

SHAPES = [(7, 5), (2, 3, 5), (1, 1, 5), (0, 5), (4, 0, 5), (5,)]


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    for module in (dense_product, fast_linear):
        monkeypatch.setattr(module, "prefers_onednn", lambda: request.param)
    return request.param


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_are_torchs(shape, dtype, bias):
    torch.manual_seed(0)
    x, W, b = torch.randn(shape, dtype=dtype), torch.randn(6, 5, dtype=dtype), torch.randn(6, dtype=dtype)
    found, wanted = linear(x, W, b if bias else None), nn.functional.linear(x, W, b if bias else None)
    assert found.shape == wanted.shape
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    spread = torch.randn(*shape[:-1], 10, dtype=dtype)[..., ::2]  # not contiguous
    torch.testing.assert_close(linear(spread, W), nn.functional.linear(spread, W), rtol=1e-5, atol=1e-5)


def test_a_model_keeps_its_layers_and_their_names(library):
    class Own(nn.Linear):
        """Somebody's own layer is left as it is."""

    model = nn.Sequential(nn.Linear(5, 4), Own(4, 4), nn.Linear(4, 3, dtype=torch.float64), nn.LayerNorm(4))
    before = {name: (type(module), copy.copy(module)) for name, module in model.named_modules()}
    x = torch.randn(3, 5)
    wanted = model[1](model[0](x))
    speed_up(model)
    kinds = [type(module) for module in model]
    assert kinds == [FastLinear if library else nn.Linear, Own, nn.Linear, nn.LayerNorm]
    assert isinstance(model[0], nn.Linear)
    assert list(before) == [name for name, _ in model.named_modules()]
    torch.testing.assert_close(model[1](model[0](x)), wanted)


@pytest.mark.usefixtures("library")
def test_gradients_are_there_where_they_are_wanted():
    model = nn.Sequential(nn.Linear(5, 4)).requires_grad_(False)
    x = torch.randn(3, 5, requires_grad=True)
    (wanted,) = torch.autograd.grad(model(x).square().sum(), x)
    speed_up(model)
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(found, wanted)
    weight = model[0].requires_grad_(True).weight
    (to_weight,) = torch.autograd.grad(model(x.detach()).square().sum(), weight)
    assert to_weight.shape == weight.shape
