"""Arrays in files, read a piece at a time: .npy, .npz, Zarr, safetensors and parquet.

Whatever its file, an array is a list of positions: ``[row, position, d]`` is read as ``[row · position, d]``. No more
of it is in memory than was asked for, apart from one record batch of a parquet file.

Shapes: N positions in all, S sequences, D width.
"""

from __future__ import annotations

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ArrayError, TcsaeError, needs
from ...system.untrusted_files import reason, shown

KINDS = ".npy, .npz, .zarr, .safetensors or .parquet"
_BATCH_BYTES = 16_000_000  # of a stream that can only be read from its beginning


class ArrayFile(ABC):
    """One array of a file. ``shape`` is as stored; a parquet column of lists has the number of positions in it.

    Attributes:
        shape: ``[n, d]``, ``[row, position, d]``, or without d where every position is one number.
        dtype: of its numbers, in words.
        lengths_S: positions of each list of a parquet column of lists; None for all other arrays.

    """

    shape: tuple[int, ...]
    dtype: str
    lengths_S: np.ndarray | None = None

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Entries ``start`` … ``stop`` along the first axis, in the array's own dtype."""

    def flat(self, start: int, stop: int, axes: int) -> torch.Tensor:
        """Positions ``start`` … ``stop`` where the first ``axes`` axes are counted as one, ``[stop − start, ...]``."""
        if axes == 1:
            return self.read(start, stop)
        width, parts = self.shape[1], []
        while start < stop:
            row, first = divmod(start, width)
            rows = (stop - start) // width if first == 0 else 0
            if rows:  # whole rows
                parts.append(self.read(row, row + rows).flatten(0, 1))
                start += rows * width
            else:
                last = min(width, first + stop - start)
                parts.append(self.part_of_row(row, first, last))
                start += last - first
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def part_of_row(self, row: int, first: int, last: int) -> torch.Tensor:
        """Positions ``first`` … ``last`` of one row."""
        return self.read(row, row + 1)[0, first:last]


class _Sliced(ArrayFile):
    """An array of which any part can be read: mapped into memory, Zarr, safetensors."""

    def __init__(self, array: Any, shape: tuple[int, ...], dtype: str):
        self._array, self.shape, self.dtype = array, tuple(shape), dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        return _tensor(self._array[start:stop])

    def part_of_row(self, row: int, first: int, last: int) -> torch.Tensor:
        return _tensor(self._array[row : row + 1, first:last])[0]


class _Stream(ArrayFile):
    """An array that can only be read from its beginning: a compressed member of a .npz, a parquet column."""

    def __init__(self, shape: tuple[int, ...], dtype: str, begin: Any, lengths_S: np.ndarray | None = None):
        self.shape, self.dtype, self.lengths_S, self._begin = shape, dtype, lengths_S, begin
        self._blocks: Iterator[np.ndarray] = iter(())
        self._held, self._at = np.zeros((0, *shape[1:])), 0
        self._started = False

    def read(self, start: int, stop: int) -> torch.Tensor:
        if start < self._at or not self._started:
            self._blocks, self._at, self._started = self._begin(), 0, True
            self._held = np.zeros((0, *self.shape[1:]))
        parts: list[np.ndarray] = []
        while start < stop:
            if start >= self._at + len(self._held):
                self._at += len(self._held)
                block = next(self._blocks, None)
                if block is None:
                    raise ArrayError("an array ends earlier than its file says: the file is damaged, write it again")
                self._held = block
                continue
            part = self._held[start - self._at : stop - self._at]
            parts.append(part)
            start += len(part)
        return _tensor(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _tensor(values: Any) -> torch.Tensor:
    if torch.is_tensor(values):
        return values
    array = np.ascontiguousarray(values)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))


def open_array(path: str | Path, key: str | None = None, *, what: str = "vectors") -> ArrayFile:
    """Open an array of numbers.

    Args:
        path: a file; for Zarr a folder.
        key: which of the arrays (or columns) of the file; None: the one called as ``what`` says, or the only one.
        what: what it is to hold.

    Raises:
        ArrayError: there is none, it cannot be read, or it holds no numbers.
        MissingPackageError: reading it needs a package that is not installed.

    """
    place = Path(path)
    if not place.exists():
        raise ArrayError(f"there is no {shown(path)}: name a file of {what}, {KINDS}")
    kind = ".zarr" if (place / "zarr.json").is_file() or (place / ".zarray").is_file() else place.suffix.lower()
    readers = {".npy": _npy, ".npz": _npz, ".zarr": _zarr, ".safetensors": _safetensors, ".parquet": _parquet}
    if kind not in readers:
        raise ArrayError(f"{shown(path)} is no array that can be read: give {KINDS}")
    try:
        return readers[kind](place, key, what)
    except TcsaeError:
        raise
    except Exception as failure:  # every library has its own errors for a damaged file
        raise ArrayError(f"{shown(path)} cannot be read ({reason(failure)}): write it again") from failure


def _choose(names: list[str], key: str | None, what: str, path: Path) -> str:
    if key is not None:
        if key not in names:
            raise ArrayError(f"{shown(path)} has no '{shown(key)}': it has {', '.join(map(shown, names)) or 'nothing'}")
        return key
    if what in names:
        return what
    if len(names) != 1:
        there = ", ".join(map(shown, names)) or "nothing"
        raise ArrayError(f"{shown(path)} holds {there}, none called {what}: say which with --key")
    return names[0]


def _numbers(dtype: np.dtype[Any], path: Path) -> str:
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise ArrayError(f"{shown(path)} holds {dtype}, which are no real numbers: convert them")
    return str(dtype)


def _npy(path: Path, key: str | None, what: str) -> ArrayFile:  # noqa: ARG001 - as all readers
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    sliced = array if array.flags.f_contiguous and array.ndim > 1 else _FromFile(path, array)
    return _Sliced(sliced, array.shape, _numbers(array.dtype, path))


class _FromFile:
    """Slices of a file in C order by ordinary reads: pages of a mapped file would stay in memory until it is full."""

    def __init__(self, path: Path, array: np.memmap[Any, Any]):
        self._path, self._offset, self._shape, self._dtype = path, array.offset, array.shape, array.dtype

    def __getitem__(self, part: slice | tuple[slice, slice]) -> np.ndarray:
        rows, positions = part if isinstance(part, tuple) else (part, None)
        first, shape = int(rows.start), [rows.stop - rows.start, *self._shape[1:]]
        each = int(np.prod(self._shape[1:], dtype=np.int64))
        if positions is not None:  # of one row
            each = int(np.prod(self._shape[2:], dtype=np.int64))
            first = first * self._shape[1] + positions.start
            shape = [1, positions.stop - positions.start, *self._shape[2:]]
        offset = self._offset + first * each * self._dtype.itemsize
        found = np.fromfile(self._path, self._dtype, count=int(np.prod(shape)), offset=offset)
        return found.reshape(shape)


def _npz(path: Path, key: str | None, what: str) -> ArrayFile:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        name = _choose(names, key, what, path)
        with archive.open(f"{name}.npy") as member:
            shape, fortran, dtype = _npy_header(member)
    if fortran and len(shape) > 1:
        raise ArrayError(f"{shown(path)} holds '{shown(name)}' column by column: save np.ascontiguousarray of it")
    return _Stream(shape, _numbers(dtype, path), partial(_npz_blocks, path, f"{name}.npy"))


def _npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(member)
    if version not in read:
        raise ValueError(f"its version {version} is unknown")
    return read[version](member)


def _npz_blocks(path: Path, name: str) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(path) as archive, archive.open(name) as member:
        shape, _, dtype = _npy_header(member)
        each = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        step = max(1, _BATCH_BYTES // max(1, each))
        for start in range(0, shape[0], step):
            n = min(step, shape[0] - start)
            raw = member.read(n * each)
            if len(raw) < n * each:
                return
            yield np.frombuffer(raw, dtype).reshape(n, *shape[1:])


def _zarr(path: Path, key: str | None, what: str) -> ArrayFile:
    needs("zarr", extra="arrays", what=f"reading {shown(path)}")
    import zarr

    node = zarr.open(str(path), mode="r")
    if "tcsae" in node.attrs:
        raise ArrayError(f"{shown(path)} is an activation store already: train on it with --store {shown(path)}")
    if isinstance(node, zarr.Group):
        names = [name for name, _ in node.arrays()]
        node = node[_choose(names, key, what, path)]
    if not isinstance(node, zarr.Array):
        raise ArrayError(f"{shown(path)} has no array '{shown(key or what)}': it is a group, name an array in it")
    return _Sliced(node, node.shape, _numbers(np.dtype(node.dtype), path))


def _safetensors(path: Path, key: str | None, what: str) -> ArrayFile:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found = file.get_slice(_choose(list(file.keys()), key, what, path))
        return _Sliced(found, tuple(found.get_shape()), str(found.get_dtype()).lower())


def _parquet(path: Path, key: str | None, what: str) -> ArrayFile:
    needs("pyarrow", extra="arrays", what=f"reading {shown(path)}")
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    name = _choose(file.schema_arrow.names, key, what, path)
    depth, width, dtype = _column(file, name, path)
    rows = file.metadata.num_rows
    blocks = partial(_parquet_blocks, path, name, depth, width)
    if depth == 2 or (depth == 1 and what != "vectors"):  # a row of the table is a sequence
        lengths_S = _list_lengths(file, name)
        shape = (int(lengths_S.sum()), *((width,) if width else ()))
        return _Stream(shape, dtype, blocks, lengths_S)
    return _Stream((rows, *((width,) if width else ())), dtype, blocks)


def _column(file: Any, name: str, path: Path) -> tuple[int, int, str]:
    """How many lists deep a column is, how long its innermost lists are (0: numbers alone), and of what."""
    import pyarrow as pa

    kind, depth = file.schema_arrow.field(name).type, 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth > 2 or not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ArrayError(f"{shown(path)} holds {file.schema_arrow.field(name).type} in '{shown(name)}': no vectors")
    is_float = pa.types.is_floating(kind)
    if depth == 0 or not is_float:
        return depth, 0, str(kind)
    for batch in file.iter_batches(batch_size=64, columns=[name]):
        values = batch.column(0)
        for _ in range(depth - 1):
            values = values.flatten()
        if len(values):
            return depth, len(values[0].as_py()), str(kind)
    raise ArrayError(f"{shown(path)} holds no vector in '{shown(name)}': give a file that does")


def _list_lengths(file: Any, name: str) -> np.ndarray:
    import pyarrow.compute as pc

    found = [
        pc.call_function("list_value_length", [batch.column(0)]).to_numpy(zero_copy_only=False)
        for batch in file.iter_batches(batch_size=1024, columns=[name])
    ]
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)


def _parquet_blocks(path: Path, name: str, depth: int, width: int) -> Iterator[np.ndarray]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(batch_size=1024 if depth < 2 else 16, columns=[name]):
        values = batch.column(0)
        if depth == 2:
            values = values.flatten()
        if width:
            lengths = pc.call_function("list_value_length", [values])
            if values.null_count or pc.call_function("min_max", [lengths]).as_py() != {"min": width, "max": width}:
                raise ArrayError(f"{shown(path)} holds vectors of several widths (or none) in '{shown(name)}'")
            yield values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        else:
            yield (values.flatten() if depth else values).to_numpy(zero_copy_only=False)


def open_beside(name: str, path: str | Path) -> tuple[Path, str | None]:
    """Where an array that belongs to the vectors is: a file of that name, or an array of the same file."""
    return (Path(name), None) if Path(name).exists() else (Path(path), name)


def read_list(name: str, path: str | Path, what: str) -> list[Any]:
    """A whole list of numbers or texts, one per sequence: of a file, or of the vectors' own file.

    Args:
        name: a file (any kind that vectors have, or a .json list), or the name of an array of ``path``.
        path: the vectors' file.
        what: what the list holds.

    Raises:
        ArrayError: there is none, or it is no list.

    """
    place, key = open_beside(name, path)
    try:
        if place.suffix == ".json":
            found = json.loads(place.read_text(encoding="utf-8"))
        elif place.suffix == ".npy":
            found = np.load(place, allow_pickle=False).tolist()
        elif place.suffix == ".npz":
            with np.load(place, allow_pickle=False) as kept:
                found = kept[_choose(kept.files, key, what, place)].tolist()
        elif place.suffix == ".parquet":
            needs("pyarrow", extra="arrays", what=f"reading {shown(place)}")
            import pyarrow.parquet as pq

            names = pq.ParquetFile(place).schema_arrow.names
            column = _choose(names, key, what, place)
            found = pq.read_table(place, columns=[column]).column(0).to_pylist()
        else:
            whole = open_array(place, key, what=what)
            found = whole.read(0, whole.shape[0]).tolist()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as failure:
        raise ArrayError(f"the {what} in {shown(place)} cannot be read ({reason(failure)}): write them again") from None
    if not isinstance(found, list) or any(isinstance(one, list | dict) for one in found):
        raise ArrayError(f"the {what} in {shown(place)} are no list: give one entry for each sequence")
    return found
