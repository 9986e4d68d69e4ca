"""The layout of a store, as pure arithmetic: rows, chunks, shards and bytes.

Shapes: B rows, T positions (the context), D model width. One row is one context of the model. Consecutive rows form a
*chunk*, the unit of reading, checking and shuffling. Consecutive chunks form a *shard*, which is one file and the unit
of committing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ...errors import UsageError

if TYPE_CHECKING:
    import torch

SPECIAL, PADDING = 1, 2  # bits of `flags`: special tokens (BOS, EOS, …); positions that hold no token
ROLES = ("system", "user", "assistant", "tool")  # whose message a token is of; nobody's outside of conversations
_ROLE_SHIFT, _ROLE_MASK = 2, 0b111  # bits 2–4 of `flags`: 1 + the role's place in ROLES, 0 for nobody
FILL = 65535  # fill value of `activations`: a bfloat16 NaN, so that values that were never written are noticed

Compression = Literal["none", "lz4", "zstd"]
_CHUNK_BYTES = 10_000_000  # 4–10 MB are read fastest; above 32 MB, glibc's mmap threshold, reading is much slower
_SMALL_CHUNK_BYTES = 1_000_000  # the smallest chunks of a small store, which needs many chunks for shuffling


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of text that belong to a block of activations.

    ``tokens_BT`` int32; ``documents_BT`` int32 running document numbers; ``flags_BT`` uint8,
    :data:`SPECIAL` | :data:`PADDING`.
    """

    tokens_BT: np.ndarray
    documents_BT: np.ndarray
    flags_BT: np.ndarray

    def __post_init__(self):
        wanted = {"tokens_BT": np.int32, "documents_BT": np.int32, "flags_BT": np.uint8}
        for name, dtype in wanted.items():
            array = getattr(self, name)
            if array.ndim != 2 or array.shape != self.tokens_BT.shape or array.dtype != dtype:
                raise ValueError(
                    f"{name} is {array.dtype} {array.shape}; it must be {np.dtype(dtype)} {self.tokens_BT.shape} [B, T]"
                )

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def slice(self, start: int, stop: int) -> RowBlock:
        """Rows ``start`` … ``stop`` as views."""
        return RowBlock(self.tokens_BT[start:stop], self.documents_BT[start:stop], self.flags_BT[start:stop])

    @staticmethod
    def concatenate(blocks: Sequence[RowBlock]) -> RowBlock:
        """The rows of all blocks, in order."""
        columns = zip(*((b.tokens_BT, b.documents_BT, b.flags_BT) for b in blocks), strict=True)
        return RowBlock(*(np.concatenate(column) for column in columns))


def role_flags(numbers: np.ndarray) -> np.ndarray:
    """``flags`` that say whose each token is: 1 + a role's place in :data:`ROLES`, 0 for nobody."""
    return (numbers.astype(np.uint8) & _ROLE_MASK) << _ROLE_SHIFT


def of_role(flags: np.ndarray, role: str) -> np.ndarray:
    """Which tokens are in a message of ``role``.

    Raises:
        UsageError: there is no such role.

    """
    if role not in ROLES:
        raise UsageError(f"there is no role '{role}': choose among {', '.join(ROLES)}")
    return (flags >> _ROLE_SHIFT & _ROLE_MASK) == 1 + ROLES.index(role)


@dataclass(frozen=True)
class StoreLayout:
    """How the rows of one layer are divided into files. All Zarr documents follow from it (``zarr_documents.py``)."""

    d_model: int
    context: int  # positions per row
    chunk_rows: int
    shard_rows: int
    compression: Compression = "none"

    def __post_init__(self):
        if min(self.d_model, self.context, self.chunk_rows, self.shard_rows) < 1:
            raise ValueError(f"every size of a layout is at least 1: {self}")
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"a shard of {self.shard_rows} rows is not a whole number of chunks of {self.chunk_rows}")

    @property
    def bytes_per_row(self) -> int:
        """Uncompressed bytes of one row's activations."""
        return self.context * self.d_model * 2

    @property
    def bytes_per_token(self) -> int:
        """Uncompressed bytes of one token: its activation, token, document and flags."""
        return self.d_model * 2 + 9

    @property
    def chunk_bytes(self) -> int:
        """Uncompressed bytes of one chunk of activations."""
        return self.chunk_rows * self.bytes_per_row

    @property
    def shard_bytes(self) -> int:
        """Uncompressed bytes of one shard of activations."""
        return self.shard_rows * self.bytes_per_row

    @property
    def shard_chunks(self) -> int:
        """Chunks in a whole shard."""
        return self.shard_rows // self.chunk_rows

    def store_bytes(self, rows: int) -> int:
        """Bytes of ``rows`` rows on disk before compression, with text arrays and the unused part of the last chunk."""
        chunks, shards = -(-rows // self.chunk_rows), self.shards_for(rows)
        per_shard = self.shard_rows * self.context * 9 + 16 * self.shard_chunks + 64
        return chunks * (self.chunk_bytes + 4) + shards * per_shard

    def shards_for(self, rows: int) -> int:
        """Shards that ``rows`` rows need."""
        return -(-rows // self.shard_rows)

    def chunks_for(self, rows: int) -> int:
        """Chunks that ``rows`` rows need."""
        return -(-rows // self.chunk_rows)

    def rows_of(self, shard: int, total_rows: int) -> range:
        """The rows of shard ``shard`` in a store of ``total_rows``."""
        first = shard * self.shard_rows
        return range(first, max(first, min(first + self.shard_rows, total_rows)))


def plan_layout(
    d_model: int,
    context: int,
    *,
    compression: Compression = "none",
    shard_bytes: int = 256_000_000,
    planned_rows: int | None = None,
) -> StoreLayout:
    """Choose chunk and shard sizes for rows of ``context`` × ``d_model`` bfloat16 values, as powers of two in rows.

    Chunks are as large as possible below 10 MB; shards are as near as possible to ``shard_bytes``. A small plan gets
    smaller ones, so that the store still has about 64 chunks to shuffle (but not below 1 MB each) and 8 shards. For
    Gemma-2-2b (2304 × 128): chunks of 16 rows, shards of 512 rows.

    Raises:
        UsageError: a size is below 1, or the compression is not none, lz4 or zstd.

    """
    if d_model < 1 or context < 1 or shard_bytes < 1:
        raise UsageError(
            f"a store needs positive sizes, got d_model {d_model}, context {context}, shard bytes {shard_bytes}"
        )
    if compression not in ("none", "lz4", "zstd"):
        raise UsageError(f"compression '{compression}' is unknown: choose none, lz4 or zstd")
    row = d_model * context * 2
    chunk_rows = _power_below(_CHUNK_BYTES / row)
    shard_rows = _power_near(shard_bytes / row)
    if planned_rows:
        chunk_rows = min(chunk_rows, max(_power_below(planned_rows / 64), _power_below(_SMALL_CHUNK_BYTES / row)))
        shard_rows = min(shard_rows, _power_below(planned_rows / 8))
    return StoreLayout(d_model, context, chunk_rows, max(shard_rows, chunk_rows), compression)


def _power_below(x: float) -> int:
    return 1 << max(0, int(x).bit_length() - 1)


def _power_near(x: float) -> int:
    below = _power_below(x)
    return below * 2 if x > below * 1.5 else below


def to_bits(x: torch.Tensor) -> np.ndarray:
    """The bfloat16 bits of ``x`` (rounded to nearest even) as a C-contiguous uint16 array on the CPU."""
    import torch

    return x.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()


def from_bits(bits: np.ndarray) -> torch.Tensor:
    """Stored uint16 bits as a bfloat16 tensor.

    It shares the array's memory, unless the array is read-only or strided; then it is a copy.
    """
    import torch

    bits = np.require(bits, np.uint16, ["C", "W"])
    return torch.from_numpy(bits).view(torch.bfloat16)
