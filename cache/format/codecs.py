"""Chunks as bytes: optional compression, then CRC-32C, in the order the Zarr codec chain of ``cache/metadata.py``
states.

Everything long here lets other threads run (crc32c and numcodecs release the GIL on large buffers).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs import blosc, zstd  # pyright: ignore[reportAttributeAccessIssue] — compiled modules

from .layout import Compression

CRC_BYTES = 4


class DamageError(Exception):
    """Bytes that are not what was written; the caller names the file."""


def checksum_bytes(data: Any) -> bytes:
    """CRC-32C as the four little-endian bytes Zarr's ``crc32c`` codec appends."""
    return crc32c(_flat(data)).to_bytes(CRC_BYTES, "little")


def encode(chunk: np.ndarray, compression: Compression) -> Any:
    """A C-contiguous chunk as the bytes before their checksum (a view of the chunk itself when nothing is
    compressed).
    """
    if compression == "lz4":
        return blosc.compress(chunk, b"lz4", 1, blosc.BITSHUFFLE, 0, typesize=chunk.itemsize)
    if compression == "zstd":
        return zstd.compress(chunk, 1)
    return _flat(chunk)


def decode(encoded: Any, into: Any, compression: Compression) -> None:
    """Decompress a chunk into a writable contiguous buffer of its exact size.

    Raises:
        DamageError: the compressed bytes do not decode to that size.

    """
    try:
        decompress = blosc.decompress if compression == "lz4" else zstd.decompress
        if blosc_size(encoded) != len(into) and compression == "lz4":
            raise DamageError("a compressed chunk has another size than its layout says")
        decompress(encoded, into)
    except (RuntimeError, ValueError) as problem:
        raise DamageError(f"a chunk does not decompress: {problem}") from problem


def blosc_size(encoded: Any) -> int:
    """Uncompressed bytes a blosc frame announces (bytes 4 … 7 of its header)."""
    return int.from_bytes(bytes(encoded[4:8]), "little")


def check(data: Any, crc: Any) -> None:
    """Compare data with its stored CRC-32C.

    Raises:
        DamageError: they differ.

    """
    if checksum_bytes(data) != bytes(crc):
        raise DamageError("the bytes do not fit their checksum")


def _flat(data: Any) -> memoryview:
    return memoryview(data).cast("B")
