"""One shard file: chunks with their checksums, written as rows arrive, and an index at the end.

This is Zarr's ``sharding_indexed`` codec. Files of ``activations`` hold several chunks and an index; the file of a text
array is one chunk of ``shard_rows`` rows with its CRC-32C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from ..storage.places import Place
from .codecs import CRC_BYTES, DamageError, check, checksum_bytes, encode
from .layout import FILL, RowBlock, StoreLayout
from .zarr_documents import TEXT_ARRAYS, shard_key

_ABSENT = 2**64 - 1  # offset and length of a chunk that was never written
Confirm = Callable[[], None]  # raises if the run that asked for the file has ended, so that it must not appear
_TEXT_FIELDS = {"tokens": "tokens_BT", "documents": "documents_BT", "flags": "flags_BT"}


@dataclass(frozen=True)
class FileRecord:
    """A committed file: its size, its XXH3-128, and for activations the XXH3-64 of every encoded chunk."""

    bytes: int
    xxh3: str
    chunks: tuple[str, ...] | None = None


class _HashedFile:
    """An unfinished file that hashes what is written to it."""

    def __init__(self, place: Place, key: str):
        self._sink, self._hash, self.bytes = place.create(key), xxhash.xxh3_128(), 0

    def write(self, *buffers: Any) -> None:
        for buffer in buffers:
            self._hash.update(buffer)
            self.bytes += memoryview(buffer).nbytes
        self._sink.write(buffers)

    def commit(self, confirm: Confirm | None = None) -> FileRecord:
        self._sink.commit(confirm)
        return FileRecord(self.bytes, self._hash.hexdigest())

    def discard(self) -> None:
        self._sink.discard()


class ActivationShard:
    """Writes the activations of one shard of one layer, chunk by chunk."""

    def __init__(self, place: Place, shard: int, layout: StoreLayout):
        self._layout = layout
        self._file = _HashedFile(place, shard_key("activations", shard))
        self._index = np.full((layout.shard_chunks, 2), _ABSENT, "<u8")
        self._chunk = np.empty((layout.chunk_rows, layout.context, layout.d_model), np.uint16)
        self._filled = 0  # rows waiting in _chunk
        self._hashes: list[str] = []  # one per written chunk

    @property
    def rows(self) -> int:
        """Rows received so far."""
        return len(self._hashes) * self._layout.chunk_rows + self._filled

    def append(self, rows_BTD: np.ndarray) -> None:
        """Add rows of uint16 bits; complete chunks are written at once.

        A chunk that lies completely in ``rows_BTD`` is written from there, without a copy.
        """
        size = self._layout.chunk_rows
        while len(rows_BTD):
            if not self._filled and len(rows_BTD) >= size:
                taken = size
                self._write_chunk(np.ascontiguousarray(rows_BTD[:size]))
            else:
                taken = min(size - self._filled, len(rows_BTD))
                self._chunk[self._filled : self._filled + taken] = rows_BTD[:taken]
                self._filled += taken
                if self._filled == size:
                    self._filled = 0
                    self._write_chunk(self._chunk)
            rows_BTD = rows_BTD[taken:]

    def _write_chunk(self, chunk: np.ndarray) -> None:
        encoded = encode(chunk, self._layout.compression)
        self._index[len(self._hashes)] = self._file.bytes, memoryview(encoded).nbytes + CRC_BYTES
        self._hashes.append(xxhash.xxh3_64_hexdigest(encoded))
        self._file.write(encoded, checksum_bytes(encoded))

    def commit(self, confirm: Confirm | None = None) -> FileRecord:
        """Fill up the last chunk, write the index, and make the file durable under its final name.

        ``confirm`` is called before the file gets that name and may raise.
        """
        if self._filled:
            self._chunk[self._filled :] = FILL
            self._filled = 0
            self._write_chunk(self._chunk)
        self._file.write(self._index, checksum_bytes(self._index))
        return replace(self._file.commit(confirm), chunks=tuple(self._hashes))

    def discard(self) -> None:
        """Drop what was written."""
        self._file.discard()


def write_text(
    place: Place, shard: int, layout: StoreLayout, block: RowBlock, confirm: Confirm | None = None
) -> dict[str, FileRecord]:
    """Write the three text arrays of one shard durably.

    ``block`` holds all rows of the shard; ``confirm`` is called before each file appears.
    """
    records = {}
    for name, (dtype, fill) in TEXT_ARRAYS.items():
        whole = np.full((layout.shard_rows, layout.context), fill, np.dtype(dtype).newbyteorder("<"))
        whole[: len(block)] = getattr(block, _TEXT_FIELDS[name])
        file = _HashedFile(place, shard_key(name, shard))
        try:
            file.write(whole, checksum_bytes(whole))
            records[name] = file.commit(confirm)
        except BaseException:
            file.discard()
            raise
    return records


def read_text(place: Place, name: str, shard: int, layout: StoreLayout) -> np.ndarray:
    """Read one text array of one shard, ``[shard_rows, T]``, and check it. Rows that do not exist hold the fill value.

    Raises:
        DamageError: the file is short, long or altered. FileNotFoundError: it is missing.

    """
    whole = np.empty((layout.shard_rows, layout.context), np.dtype(TEXT_ARRAYS[name][0]).newbyteorder("<"))
    crc, beyond = bytearray(CRC_BYTES), bytearray(1)
    if place.read_into(shard_key(name, shard), 0, [whole, crc, beyond]) != whole.nbytes + CRC_BYTES:
        raise DamageError("it has the wrong length")
    check(whole, crc)
    return whole


def index_bytes(layout: StoreLayout) -> int:
    """Size of a shard's index with its checksum."""
    return 16 * layout.shard_chunks + CRC_BYTES


def parse_index(raw: Any, layout: StoreLayout, file_bytes: int, chunks: int) -> np.ndarray:
    """A shard's index ``[shard_chunks, (offset, length)]`` from its bytes, after a check that it is possible.

    Args:
        raw: the last :func:`index_bytes` bytes of the file.
        layout: the store's.
        file_bytes: the file's length.
        chunks: number of chunks that must be present. There may be more, if the last shard has grown since the log was
            read.

    Raises:
        DamageError: the checksum is wrong, or a chunk would lie outside the file.

    """
    check(raw[:-CRC_BYTES], raw[-CRC_BYTES:])
    index = np.frombuffer(raw[:-CRC_BYTES], "<u8").reshape(layout.shard_chunks, 2)
    here = index[:chunks].astype(object)
    plain = layout.chunk_bytes + CRC_BYTES if layout.compression == "none" else None
    limit = file_bytes - index_bytes(layout)
    if any(offset + length > limit or length <= CRC_BYTES or (plain and length != plain) for offset, length in here):
        raise DamageError("its index points outside the file")
    return index
