"""Encoding and decoding of chunks: optional compression, then a CRC-32C, as declared in ``zarr_documents.py``.

The expensive calls run without the GIL (crc32c and numcodecs release it for large buffers).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs import blosc, zstd  # pyright: ignore[reportAttributeAccessIssue] — compiled modules

from .layout import Compression

CRC_BYTES = 4


class DamageError(Exception):
    """The bytes read are not those that were written. The caller adds the name of the file."""


def checksum_bytes(data: Any) -> bytes:
    """CRC-32C as the four little-endian bytes Zarr's ``crc32c`` codec appends."""
    return crc32c(_flat(data)).to_bytes(CRC_BYTES, "little")


def encode(chunk: np.ndarray, compression: Compression) -> Any:
    """A C-contiguous chunk as bytes, without the checksum. Without compression it is a view of the chunk's memory."""
    if compression == "lz4":
        return blosc.compress(chunk, b"lz4", 1, blosc.BITSHUFFLE, 0, typesize=chunk.itemsize)
    if compression == "zstd":
        return zstd.compress(chunk, 1)
    return _flat(chunk)


def decode(encoded: Any, into: Any, compression: Compression) -> None:
    """Decompress a chunk into a writable contiguous buffer of its exact size.

    Raises:
        DamageError: the compressed bytes cannot be decoded, or have another size.

    """
    try:
        decompress = blosc.decompress if compression == "lz4" else zstd.decompress
        if blosc_size(encoded) != len(into) and compression == "lz4":
            raise DamageError("a compressed chunk has another size than its layout says")
        decompress(encoded, into)
    except (RuntimeError, ValueError) as problem:
        raise DamageError(f"a chunk does not decompress: {problem}") from problem


def blosc_size(encoded: Any) -> int:
    """The uncompressed size in a blosc header (bytes 4 … 7)."""
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
