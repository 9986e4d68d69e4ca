"""The GPU that is not there refuses what a real one refuses, and computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_cuda import CUDA, HiddenCopyError, fake_cuda
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is at hand")

MASK, INDEX = torch.tensor([True, False, True]), torch.tensor([2, 0])
MIXED: dict[str, Callable[[torch.Tensor], object]] = {
    "sum": lambda x: x + torch.ones(3),
    "where": lambda x: torch.where(MASK, x, 0.0),
    "mask": lambda x: x[MASK],
    "index": lambda x: x[INDEX],
    "index_select": lambda x: x.index_select(0, INDEX),
    "assignment": lambda x: x.__setitem__(INDEX, 0.0),
    "cat": lambda x: torch.cat([x, torch.ones(3)]),
    "bincount": lambda x: torch.bincount(torch.tensor([0, 1, 1]), weights=x),
    "searchsorted": lambda x: torch.searchsorted(x, torch.ones(3)),
    "matmul": lambda x: x @ torch.ones(3, 2),
    "gradient": lambda x: torch.autograd.grad((x.requires_grad_() ** 2).sum(), x)[0] + torch.ones(3),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_are_refused(name: str) -> None:
    with fake_cuda(), pytest.raises((FakeTensorDeviceMismatchError, HiddenCopyError, RuntimeError), match=r"cpu|CPU"):
        MIXED[name](torch.ones(3, device=CUDA))


@pytest.mark.parametrize("name", MIXED)
def test_and_on_one_device_they_are_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda():
        monkeypatch.setitem(globals(), "MASK", MASK.to(CUDA))
        monkeypatch.setitem(globals(), "INDEX", INDEX.to(CUDA))
        with torch.device(CUDA):
            MIXED[name](torch.ones(3))


@pytest.mark.parametrize("index", [[2, 0], [1], (slice(None), [0])], ids=str)
def test_an_index_of_numbers_is_refused(index: object) -> None:
    """Torch puts such a list on the device by itself: its values are lost here, and a GPU would be waited for."""
    with fake_cuda():
        x = torch.ones(3, 2, device=CUDA)
        with pytest.raises(HiddenCopyError, match="a list of numbers on the CPU is an index"):
            x[index]
        with pytest.raises(HiddenCopyError, match="a list of numbers on the CPU is an index"):
            x[index] = 0.0


@pytest.mark.parametrize("index", [1, -1, slice(1, None), (slice(None), 0), (None, 2), (..., 1), (0, 1), True], ids=str)
def test_every_other_index_is_the_cpus(index: object) -> None:
    x = torch.arange(6.0).view(3, 2)
    with fake_cuda():
        mine = x.to(CUDA)
        found = mine[index].cpu()
        mine[index] = 7.0
        mine[index] += mine[index]
        changed = mine.cpu()
    torch.testing.assert_close(found, x[index])
    x[index] = 14.0
    torch.testing.assert_close(changed, x)


def test_it_computes_what_the_cpu_computes() -> None:
    def work(device: torch.device) -> tuple[torch.Tensor, ...]:
        x = torch.linspace(-1, 1, 12).view(4, 3).to(device)
        weight = torch.nn.Parameter(torch.full((3, 5), 0.3).to(device))
        optimiser = torch.optim.AdamW([weight], lr=0.1, fused=True)
        (x @ weight).relu().square().sum().backward()
        optimiser.step()
        view = x[1]
        view.mul_(2)  # seen through the whole
        places = (x > 0).nonzero()
        return x.cpu(), weight.detach().cpu(), places.cpu(), x[x > 0].cumsum(0).cpu(), x.bfloat16().sort().indices.cpu()

    expected = work(torch.device("cpu"))
    with fake_cuda() as mode:
        found = work(CUDA)
        assert torch.zeros(2, device=CUDA).device == CUDA
        assert float(torch.full((), 3.0, device=CUDA)) == 3.0
    assert mode.n_operations > 20
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not torch.cuda.is_available()
