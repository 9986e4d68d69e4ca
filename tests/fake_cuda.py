"""CUDA tensors without a GPU: torch's fake tensors say where everything lies, CPU tensors underneath what it is.

Inside :func:`fake_cuda`, ``torch.device("cuda", 0)`` works. Every operation on such a tensor is run twice: by torch's
``FakeTensorMode``, which knows no values but refuses tensors on different devices, and on CPU tensors of the same
values. So code that looks at values (``int(mask.sum())``, ``nonzero``, a loop over counts) runs as it would on a GPU,
and its numbers can be held to those of the CPU. What does not exist here (streams, events, pinned memory, the memory
of a card) is stubbed, and Triton's kernels, whose source is run elsewhere, are replaced by plain torch.

What this cannot show: that a kernel is right or fast, that copies and computation are ordered by their events, and that
the memory suffices. For that there is ``TCSAE_TEST_GPU=1`` on a machine with a GPU: then the same tests run on the
real one (``benchmarks/gpu.py --with-tests``).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tcsae.train.loop import batches
from tcsae.train.step import matmul
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
HAS_GPU = torch.cuda.is_available()
ON_A_GPU_IF_ASKED = pytest.mark.skipif(
    HAS_GPU and "TCSAE_TEST_GPU" not in os.environ, reason="a real GPU is at hand: TCSAE_TEST_GPU=1 runs this on it"
)
_BY_VALUE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_COPIES = {"_to_copy", "copy_", "_foreach_copy_"}


class HiddenCopyError(AssertionError):
    """An index on the CPU meets a tensor on the GPU: allowed, but it waits for the device to copy the index there."""


class CudaTensor(Tensor):
    """A tensor that says it is on the GPU. It has no memory: its storage is the name under which values are kept.

    Python sees cuda:0; the engine of autograd, which would start threads for a GPU, sees the device ``meta``.
    """

    @staticmethod
    def of(meta: Tensor) -> CudaTensor:
        return Tensor._make_subclass(CudaTensor, meta, dispatch_device=False, device_for_backend_keys=CUDA)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return self if dtype in (None, self.dtype) else super().to(dtype)
        return super().to(device, dtype or self.dtype, non_blocking=non_blocking)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone()
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if hasattr(self, "_is_param") else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a CUDA tensor outside fake_cuda()")


class RealCuda(TorchDispatchMode):
    """Changes nothing, counts what runs on the GPU."""

    n_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        done = func(*args, **(kwargs or {}))
        self.n_operations += any(isinstance(one, Tensor) and one.is_cuda for one in tree_flatten(done)[0])
        return done


class FakeCuda(TorchDispatchMode):
    """Runs what touches a CUDA tensor as a fake, for its device, and on the CPU, for its values."""

    def __init__(self, fakes: FakeTensorMode, values: dict[int, tuple[Any, torch.UntypedStorage]]):
        super().__init__()
        self.fakes, self.n_operations = fakes, 0
        self._values = values  # by storage, which is kept alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.split("::")[1] == "pin_memory" or kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        given = tree_flatten((args, kwargs))[0]
        devices = {each.type for each in given if isinstance(each, torch.device)}
        if not any(isinstance(each, CudaTensor) for each in given) and not devices & {"cuda", "meta"}:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self.n_operations += 1
        _refuse_hidden_copies(func, given)
        fake_args, fake_kwargs = tree_map(self._fake, (args, kwargs))  # before the values change sizes in place
        with unset_fake_temporarily(), torch.no_grad():
            real = func(*tree_map(self.real, args), **tree_map(self.real, kwargs))
        if _BY_VALUE & set(func.tags):  # how large it is only the values say
            return tree_map(lambda one: self.put(one) if isinstance(one, Tensor) else one, real)
        faked = func(*fake_args, **fake_kwargs)  # refuses mixed devices
        fake_parts, real_parts = tree_flatten(faked)[0], iter(tree_flatten(real)[0])
        replaced = iter([self._paired(fake, one) for fake, one in zip(fake_parts, real_parts, strict=True)])
        return tree_map(lambda _: next(replaced), faked)

    def _fake(self, one: Any) -> Any:
        if isinstance(one, torch.device):
            return CUDA if one.type == "meta" else one
        return FakeTensor(self.fakes, _meta_of(one), CUDA) if isinstance(one, CudaTensor) else one

    def _paired(self, fake: Any, real: Any) -> Any:
        if not isinstance(fake, FakeTensor):
            return real
        if fake.device.type == "cpu":
            return real
        mine = CudaTensor.of(_meta_of(fake))
        if mine.untyped_storage()._cdata not in self._values:
            assert mine.shape == real.shape, (mine.shape, real.shape)
            self._keep(mine, real)
        return mine

    def put(self, real: Tensor) -> CudaTensor:
        """A CPU tensor's values on the GPU."""
        with unset_fake_temporarily():
            mine = CudaTensor.of(torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta"))
        self._keep(mine, real)
        return mine

    def _keep(self, mine: CudaTensor, real: Tensor) -> None:
        storage = mine.untyped_storage()
        with unset_fake_temporarily(), torch.no_grad():
            place = torch.zeros(storage.nbytes(), dtype=torch.uint8)
            self._values[storage._cdata] = storage, place.untyped_storage()
            self.real(mine).copy_(real)

    def real(self, one: Any) -> Any:
        """The CPU tensor under one on the GPU, which shares its memory; a device as the CPU; the rest as it is."""
        if isinstance(one, torch.device):
            return torch.device("cpu")
        if not isinstance(one, CudaTensor):
            return one
        storage = self._values[one.untyped_storage()._cdata][1]
        with unset_fake_temporarily(), torch.no_grad():
            return torch.empty(0, dtype=one.dtype).set_(storage, one.storage_offset(), one.shape, one.stride())


def _meta_of(one: Tensor) -> Tensor:
    with unset_fake_temporarily(), torch.no_grad():
        empty = torch.empty(0, dtype=one.dtype, device="meta")
        return empty.set_(one.untyped_storage(), one.storage_offset(), tuple(one.shape), tuple(one.stride()))


def _refuse_hidden_copies(func: Any, given: list[Any]) -> None:
    """More than torch refuses: an index or mask on the CPU is allowed, and waits until the GPU has done all before."""
    if not any(isinstance(one, CudaTensor) for one in given):
        return
    others = [one for one in given if isinstance(one, Tensor) and not isinstance(one, CudaTensor)]
    if any(one.is_meta for one in others):  # torch made it without asking here, so nobody knows its values
        raise HiddenCopyError(f"{func}: a list of numbers on the CPU is an index of a tensor on the GPU")
    if func._schema.name.split("::")[1] in _COPIES:
        return
    for one in others:
        if one.dim():
            raise HiddenCopyError(f"{func}: {tuple(one.shape)} on the CPU meets a tensor on the GPU")


# --- what a machine without a GPU lacks beside tensors


class _Event:
    """Everything is done at once."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class _Stream:
    device = CUDA

    def __init__(self, *_: Any):
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def record_event(self) -> _Event:
        return _Event()


class _Kernels:
    """What Triton's kernels say they compute (:mod:`tcsae.train.step.triton_kernels`), in plain torch."""

    def forward_codes(self, pre_RF: Tensor, w: int, codes_dtype: torch.dtype, n_members: int = 1) -> tuple[Tensor, ...]:
        z = pre_RF.clamp(min=0).to(codes_dtype)
        windows = z.float().view(n_members, -1, w, z.shape[1])
        changes = (windows[:, :, 1:] - windows[:, :, :-1]).square().sum((1, 2)).flatten()
        counts = (windows > 0).sum((1, 2)).flatten()
        return z, windows.sum((1, 2)).flatten(), counts, changes

    def backward_codes(
        self, z_RF: Tensor, to_codes_RF: Tensor, w: int, sparsity_C: Tensor, temporal_C: Tensor, n_members: int = 1
    ) -> tuple[Tensor, Tensor]:
        z = z_RF.float().view(n_members, -1, w, z_RF.shape[1])
        step = torch.zeros_like(z)
        step[:, :, :-1] += z[:, :, :-1] - z[:, :, 1:]
        step[:, :, 1:] += z[:, :, 1:] - z[:, :, :-1]
        per_feature = (n_members, 1, 1, -1)
        more = sparsity_C.view(per_feature) + 2 * temporal_C.view(per_feature) * step
        slope = torch.where(z > 0, to_codes_RF.view(z.shape).float() + more, 0)
        to_codes_RF.copy_(slope.view(to_codes_RF.shape))
        return to_codes_RF, slope.sum((1, 2)).flatten()

    def weighted_rows(self, table: Tensor, index_E: Tensor, starts: Tensor, weights_E: Tensor) -> Tensor:
        bags = torch.repeat_interleave(
            torch.arange(starts.numel() - 1, device=table.device), starts.diff(), output_size=index_E.numel()
        )
        rows = table.float().index_select(0, index_E) * weights_E.float().unsqueeze(1)
        return torch.zeros(starts.numel() - 1, table.shape[1], device=table.device).index_add_(0, bags, rows)

    def inner_products(self, a_ND: Tensor, W_FD: Tensor, column_E: Tensor, row_starts: Tensor) -> Tensor:
        rows = torch.repeat_interleave(
            torch.arange(len(a_ND), device=a_ND.device), row_starts.diff(), output_size=column_E.numel()
        )
        return (a_ND.float().index_select(0, rows) * W_FD.float().index_select(0, column_E)).sum(1)


class _InMode(ThreadPoolExecutor):
    """Threads that know the GPU, too: modes belong to a thread."""

    values: dict[int, Any]

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        def inside() -> Any:
            with _modes(self.values):
                return function(*args, **kwargs)

        return super().submit(inside)


def _outside(function: Any) -> Any:
    def real(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return real


@contextmanager
def _modes(values: dict[int, Any]) -> Iterator[FakeCuda]:
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes, FakeCuda(fakes, values) as mode:
        yield mode


@contextmanager
def fake_cuda() -> Iterator[FakeCuda | RealCuda]:
    """A machine with one GPU, for the code inside; where there is one, that one."""
    if HAS_GPU:
        with RealCuda() as counted:
            yield counted
        return
    values: dict[int, Any] = {}
    threads = type("Threads", (_InMode,), {"values": values})
    kernels = _Kernels()
    stubs = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "device_of": lambda _: nullcontext(),
        "stream": lambda _: nullcontext(),
        "current_stream": lambda *_: _Stream(),
        "Stream": _Stream,
        "Event": _Event,
        "mem_get_info": lambda *_: (2**34, 2**34),
        "max_memory_allocated": lambda *_: 2**20,
        "get_device_name": lambda *_: "a GPU that is not here",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=2**34),
    }
    with pytest.MonkeyPatch.context() as patch, _device_guard(), _modes(values) as mode:
        patch.setattr(FakeTensorMode, "avoid_device_init", True)  # whatever is_available() says from here on
        # A module's parameters become tensors of another class, which they cannot in place.
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        for name, stub in stubs.items():
            patch.setattr(torch.cuda, name, stub)
        patch.setattr(torch, "load", _outside(torch.load))  # it would read fakes
        patch.setattr(Tensor, "record_stream", lambda *_: None)
        patch.setattr(Tensor, "pin_memory", lambda self, *_: self)
        patch.setattr(matmul, "_kernels", lambda: kernels)
        patch.setattr(batches, "ThreadPoolExecutor", threads)
        yield mode


@contextmanager
def _device_guard() -> Iterator[None]:
    """Builds of torch for CPUs have no guard for CUDA devices, without which no index is taken: that of ``meta`` will
    do, which guards nothing. Builds for CUDA bring one (and FakeTensorMode sees to it).
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[1]  # the numbers of c10::DeviceType
    guards[1] = before or guards[14]
    try:
        yield
    finally:
        guards[1] = before
