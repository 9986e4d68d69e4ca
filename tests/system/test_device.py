"""What auto means, and the one sentence for a device that is not there."""

import pytest
import torch
from tcsae.errors import UsageError
from tcsae.system import device
from tcsae.system.device import resolve_device, resolve_dtype

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_asked_for_where_there_is_none():
    with pytest.raises(
        UsageError, match=r"--device cuda was asked for, this machine has no usable CUDA device.*: use --device cpu"
    ):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU


@pytest.mark.parametrize("name", ["tpux", "mps", "meta"])
def test_an_unknown_device(name):
    with pytest.raises(UsageError, match=f"--device {name} is unknown: choose auto, cpu, cuda or cuda:1"):
        resolve_device(name)


def test_every_process_of_a_machine_has_a_cuda_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    assert resolve_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match=r"process 2 of this machine has no CUDA device of its own: start at most 2"):
        resolve_device("auto")
    with pytest.raises(UsageError, match=r"--device cuda:7 was asked for, this machine has 2 CUDA devices"):
        resolve_device("cuda:7")


def test_dtype_is_float32_on_a_cpu_without_the_instructions(monkeypatch):
    monkeypatch.setattr(device, "_cpu_multiplies_bfloat16", lambda: False)
    assert resolve_dtype("auto", CPU) == "float32"
    assert resolve_dtype("bfloat16", CPU) == "bfloat16"
    monkeypatch.setattr(device, "_cpu_multiplies_bfloat16", lambda: True)
    assert resolve_dtype("auto", CPU) == "bfloat16"
    assert resolve_dtype("float32", CPU) == "float32"


@pytest.mark.parametrize(("machine", "avx", "amx", "found"), [
    ("x86_64", False, False, False),  # oneDNN would emulate it
    ("x86_64", True, False, True),
    ("AMD64", False, True, True),
])  # fmt: skip
def test_a_processor_is_asked_for_its_instructions(monkeypatch, machine, avx, amx, found):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert device._cpu_multiplies_bfloat16() is found


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_gpu_is_asked_for_its_generation(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert resolve_dtype("auto", torch.device("cuda:0")) == dtype
