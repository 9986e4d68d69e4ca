"""Models that are spread over several devices, or whose weights are kept in 8 or 4 bits.

accelerate places every part on a device, in the memory of the CPU or on disk, and moves tensors where a part runs: what
hooks see lies wherever its block lies. What is offloaded has no weights until it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ...errors import RunError, UsageError, needs
from ...system.untrusted_files import read_json
from ..config import ModelSource

_ELSEWHERE = ("cpu", "disk")


def placement_options(source: ModelSource, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` is told beyond the model: nothing for one that lies on one device in its own dtype.

    Raises:
        MissingPackageError: accelerate or bitsandbytes is not installed.
        UsageError: a file of places that cannot be read.

    """
    if not source.is_placed:
        return {}
    needs("accelerate", extra="large", what="--device-map" if source.device_map else f"--load-in {source.load_in}")
    chosen: dict[str, Any] = {"device_map": _map_of(source)}
    if source.load_in:
        needs("bitsandbytes", extra="quantised", what=f"--load-in {source.load_in}")
        from transformers import BitsAndBytesConfig

        bits = source.load_in
        chosen["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit", bnb_4bit_compute_dtype=dtype
        )
    return chosen


def _map_of(source: ModelSource) -> str | dict[str, Any]:
    if not source.device_map:
        return {"": source.device}
    if not source.device_map.endswith(".json"):
        return source.device_map
    try:
        found = read_json(
            Path(source.device_map),
            missing=f"there is no file {source.device_map}",
            remedy="give --device-map auto, or a JSON file of module → device",
        )
    except RunError as failure:
        raise UsageError(str(failure)) from failure
    if not found or not all(isinstance(place, int | str) for place in found.values()):
        raise UsageError(f'{source.device_map} is no map of modules to devices, such as {{"model.layers.0": "cpu"}}')
    return found


@contextmanager
def offload_folder(source: ModelSource) -> Iterator[dict[str, str]]:
    """Where weights are kept that are on disk, and not in safetensors files that they can be read from again."""
    if not source.device_map:
        yield {}
        return
    folder = TemporaryDirectory(prefix="tcsae-offload-")
    try:
        yield {"offload_folder": folder.name}
    except BaseException:
        folder.cleanup()
        raise
    _kept.append(folder)  # as long as the process: parts are read when they run


_kept: list[TemporaryDirectory[str]] = []


def main_device(model: nn.Module, device: torch.device) -> torch.device:
    """Where a model takes its tokens: the first device that parts of it run on; ``device`` for one that is not
    spread.
    """
    places = getattr(model, "hf_device_map", None)
    if not places:
        return device
    for place in places.values():
        if place not in _ELSEWHERE:
            return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return torch.device("cpu")


def input_device(model: nn.Module) -> torch.device:
    """Where the embedding runs; the CPU for one that is offloaded, whose tokens are moved when it does."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return torch.device("cpu") if device.type == "meta" else device


def weights_in_memory(module: nn.Module) -> Any:
    """A context in which the weights of this module itself are there, though they are offloaded."""
    if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module, execution_device=torch.device("cpu"))


def why_not_whole(module: nn.Module) -> str | None:
    """Why a block cannot be taken apart in float32, in words; None where it can."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return "is offloaded and cannot be taken apart"
    if not all(parameter.is_floating_point() for parameter in module.parameters()):
        return "is quantised and cannot be taken apart"
    return None
