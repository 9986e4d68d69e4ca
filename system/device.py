"""Where to compute and in which dtype: what ``auto`` means, and one sentence for what a machine does not have."""

from __future__ import annotations

import os
import platform

import torch

from ..errors import UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here; CUDA devices always with their number.

    Under torchrun each process of a machine has a CUDA device of its own: that of its ``LOCAL_RANK``.

    Raises:
        UsageError: an unknown name, CUDA where there is none, no such device, or more processes than devices.

    """
    usable = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if usable else "cpu") if name == "auto" else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name} is unknown: choose auto, cpu, cuda or cuda:1")
    if device.type == "cpu":
        return device
    if not usable:
        build = "" if torch.version.cuda else " (this torch is a build without CUDA)"
        raise UsageError(
            f"--device {name} was asked for, this machine has no usable CUDA device{build}: use --device cpu"
        )
    n, own = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if device.index is None and own >= n:
        raise UsageError(
            f"process {own} of this machine has no CUDA device of its own: start at most {n} (--nproc-per-node={n})"
        )
    if device.index is not None and device.index >= n:
        raise UsageError(f"--device {name} was asked for, this machine has {n} CUDA devices, counted from 0")
    return torch.device("cuda", own if device.index is None else device.index)


def resolve_dtype(name: str, device: torch.device) -> str:
    """The key of :data:`DTYPES` that a name means on ``device``: ``auto`` is bfloat16 where the hardware multiplies it.

    Decided by what the processor has, never by timing it: a run that goes on must find the same answer.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    return "bfloat16" if _cpu_multiplies_bfloat16() else "float32"


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; emulated, it is several times slower than float32."""
    if platform.machine() in ("x86_64", "AMD64"):  # where oneDNN's own answer counts emulation on AVX-512
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()
