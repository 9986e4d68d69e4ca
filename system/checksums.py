"""What a file or a JSON document held when it was written, as a hash: damage is noticed on reading.

XXH3 with 128 bits, as in the stores: against damage and slips of the hand, not against people who mean it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from .untrusted_files import open_regular

_BLOCK = 1 << 22


class HashingFile:
    """A file that is written into another one and hashed on the way."""

    def __init__(self, file: BinaryIO):
        self._file, self._digest = file, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        """Write and hash."""
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush what was written so far."""
        self._file.flush()

    def hash(self) -> str:
        """Of everything written so far, in hexadecimal."""
        return self._digest.hexdigest()


def file_hash(path: str | Path) -> str:
    """The hash of a file's bytes, in hexadecimal.

    Raises:
        RunError: there is no such file, or it cannot be read.

    """
    digest = xxhash.xxh3_128()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def content_hash(content: Any) -> str:
    """The hash of plain JSON values, however the file that holds them is laid out."""
    plain = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(plain.encode())
