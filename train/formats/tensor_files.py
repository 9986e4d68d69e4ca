"""Tensors in files of others: safetensors, npz and torch.save, read by their headers first.

What a header promises is compared with the file's size and the machine's free memory before anything is allocated, so
that a small file cannot ask for a large machine. No code of the file is run: npz without pickles, and of a torch.save
archive only the list of its tensors is understood (:class:`_StateDict`), never an object of any other kind.

Shapes are checked by the readers of the formats, which know what they expect.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...console import format_bytes
from ...errors import ResourceError, RunError, TcsaeError
from ...system.free_memory import free_memory
from ...system.untrusted_files import open_regular, reason, shown

_MOST_HEADER = 1 << 24
_MOST_TENSORS = 10_000
_SHARE_OF_MEMORY = 0.5  # what is read may take: as it is in the file, and once more as an SAE


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        RunError: missing, damaged, or no such file.
        ResourceError: it does not fit into memory.

    """
    with _sentences(path, "a safetensors file"), _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise ValueError(f"its header is said to have {length:,} bytes, the file has {size:,}")
        header = json.loads(file.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        ends = [int(entry["data_offsets"][1]) for entry in entries]
        if size != 8 + length + max(ends, default=0):
            raise ValueError(f"its header describes {8 + length + max(ends, default=0):,} bytes, the file has {size:,}")
        wanted = sum(4 * math.prod(map(int, entry["shape"])) for entry in entries)
        _check_memory(path, max(size, wanted), len(entries))
        return {name: _plain(name, value) for name, value in load_file(path).items()}


def read_npz(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Those of the named arrays that an npz file has, as float32 tensors.

    Raises:
        RunError: missing, damaged, or no such file.
        ResourceError: it does not fit into memory.

    """
    found = {}
    with _sentences(path, "an npz file"), _opened(path) as file, zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        wanted = [name for name in names if name in members]
        headers = {}
        for name in wanted:
            with archive.open(members[name]) as member:
                shape, kind = _npy_header(member)
            if kind.kind not in "fiu" or kind.itemsize > 8:
                raise ValueError(f"'{name}' is of type {kind}, which no SAE has")
            headers[name] = math.prod(shape) * max(4, kind.itemsize)
        _check_memory(path, sum(headers.values()), len(headers))
        for name in wanted:
            with archive.open(members[name]) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
                member.read(1)  # at its end the archive checks the sum of what was read
            found[name] = _plain(name, torch.from_numpy(array.astype(np.float32, copy=False)))
    return found


def _npy_header(member: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(member)
    return shape, kind


def read_torch(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """All tensors of a state dict that ``torch.save`` wrote (torch 1.6 or later); what is no tensor is left out.

    Args:
        path: the file.
        inside: the entry that the state dict is, if there is such a one: of a checkpoint that holds more.

    Raises:
        RunError: missing, damaged, no such file, or one that holds more than tensors and plain values.
        ResourceError: it does not fit into memory.

    """
    found: dict[str, Tensor] = {}
    with _sentences(path, "a file that torch.save wrote"), _opened(path) as file:
        if file.read(2) != b"PK":
            raise pickle.UnpicklingError("it is no archive, as torch.save has written since torch 1.6")
        with zipfile.ZipFile(file) as archive:
            archived = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in archived.values()):
                raise ValueError("it is compressed, which torch.save never does")
            if "byteorder" in archived and archive.read(archived["byteorder"]) != b"little":
                raise ValueError("it was written on a big-endian machine")
            listing = archived.get("data.pkl")
            if listing is None or listing.file_size > _MOST_HEADER:
                raise ValueError("it has no list of tensors")
            state = _StateDict(archive.read(listing)).load()
            nested = state.get(inside)
            state = nested if isinstance(nested, dict) else state
            described = {str(name): entry for name, entry in state.items() if isinstance(entry, _Described)}
            _check_memory(path, sum(4 * math.prod(entry.shape) for entry in described.values()), len(described))
            for name, entry in described.items():
                found[name] = _plain(name, entry.read(archive, archived))
    return found


@dataclass(frozen=True)
class _Described:
    """A tensor as the archive's list describes it: a view of a record."""

    record: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, archive: zipfile.ZipFile, archived: dict[str, zipfile.ZipInfo]) -> Tensor:
        info = archived[f"data/{self.record}"]
        elements = info.file_size // self.dtype.itemsize
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("it describes a tensor that cannot be")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if math.prod(self.shape) == 0 or last >= elements or math.prod(self.shape) > elements:
            raise ValueError(f"it describes a tensor of {list(self.shape)} in a record of {elements:,} elements")
        whole = torch.frombuffer(bytearray(archive.read(info)), dtype=self.dtype, count=elements)
        return whole.as_strided(self.shape, self.stride, self.offset).contiguous()


_Unpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


class _StateDict(_Unpickler):
    """Reads the list of tensors: any name in it that is not one of a few stands for nothing and is refused.

    Python's own unpickler, not the C one, which allocates whatever an index of its memo says. State that objects are
    given after they are made (of an OrderedDict its metadata) is passed over.
    """

    dispatch: ClassVar = {**_Unpickler.dispatch, pickle.BUILD[0]: lambda self: self.stack.pop()}

    def __init__(self, listing: bytes):
        super().__init__(io.BytesIO(listing))

    def load(self) -> dict[Any, Any]:
        found = super().load()
        if not isinstance(found, dict):
            raise ValueError("it holds no state dict")
        return found

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{shown(module)}.{shown(name)}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        kind, dtype, record, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError("it describes a tensor that cannot be")
        return str(record), dtype


def _rebuilt(storage: tuple[str, torch.dtype], offset: Any, shape: Any, stride: Any, *_: Any) -> _Described:
    return _Described(storage[0], storage[1], offset, tuple(shape), tuple(stride))


def _plain(name: str, value: Tensor) -> Tensor:
    if value.is_complex():
        raise ValueError(f"'{shown(name)}' holds complex numbers, which no SAE has")
    return value


def _check_memory(path: Path, size: int, tensors: int) -> None:
    if tensors > _MOST_TENSORS:
        raise ValueError(f"it has {tensors:,} tensors, an SAE has a handful")
    free = free_memory()
    if size > _SHARE_OF_MEMORY * free:
        sizes = f"{shown(path)} needs {format_bytes(2 * size)} of memory, this machine has {format_bytes(free)} free"
        raise ResourceError(f"{sizes}: check that it is the file you mean, or use a larger machine")


def _opened(path: Path) -> BinaryIO:
    return open_regular(path, missing=f"{shown(path)} is missing: the SAE is incomplete")


@contextmanager
def _sentences(path: Path, kind: str) -> Iterator[None]:
    """Whatever a reader of foreign bytes raises, as one sentence.

    Deliberately wide: damaged bytes make struct, zipfile, NumPy and the unpickler raise errors of a dozen kinds.
    """
    try:
        yield
    except TcsaeError:
        raise
    except MemoryError as failure:
        raise ResourceError(f"{shown(path)} does not fit into memory: use a larger machine") from failure
    except pickle.UnpicklingError as failure:
        what = f"{shown(path)} holds more than weights and is not loaded, for safety"
        raise RunError(f"{what} ({reason(failure)})") from None
    except Exception as failure:
        raise RunError(f"{shown(path)} is damaged or not {kind}: {reason(failure)}") from failure
