"""What a measurement ran on, for the record: machine, library versions, peak memory."""

from __future__ import annotations

import os
import platform
import resource
import sys

import torch

from ..cache.manifest import installed_versions


def describe_machine(device: torch.device) -> dict[str, str | int | float | None]:
    """Processor, threads and device; nothing that identifies a person or a host."""
    facts: dict[str, str | int | float | None] = {
        "device": device.type,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions() -> dict[str, str]:
    """Of Python and the packages that shape the numbers."""
    return {"python": platform.python_version(), **installed_versions()}


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on the GPU where there is one, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
