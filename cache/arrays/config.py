"""The configuration of an import: one frozen record that checks its values. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, Unpack

from ... import options
from ...console import parse_count
from ...errors import UsageError
from ...sites import Location
from ...system.untrusted_files import seed_number

HELD_OUT = "held-out"
"""The split that evaluation reads, and what its store's name ends with."""


@dataclass(frozen=True)
class ImportConfig:
    """One import: an array of vectors, how it is cut into sequences and rows, and the store to fill."""

    array: str
    """A .npy, .npz, .zarr, .safetensors or .parquet file of ``[row, position, d]`` or ``[n, d]``."""
    key: str | None = None
    """Which array (or column) of the file; None: ``vectors``, or the only one."""
    lengths: str | None = None
    """Positions of each sequence, one after the other: an array of the same file, or a file. Of ``[row, position, d]``:
    how many positions of each row count. None: every row is a sequence; ``[n, d]`` is one.
    """
    tokens: str | None = None
    """What each position is of, as whole numbers from 0: an array of the same file, or a file."""
    token_text: str | None = None
    """The text of token 0, 1, 2 …: an array of the same file, or a file (.json)."""
    labels: str | None = None
    """The label of each sequence, which probes look for: an array of the same file, or a file (.json)."""
    context: int | None = None
    """Positions per row of the store; None: those of ``[row, position, d]`` up to 1024, else 128."""
    held_out: float = 0.1
    """Share of the sequences (of the last positions, where there is one sequence) that evaluation is to read."""
    seed: int = 0
    """Decides which sequences are held out."""
    name: str | None = None
    """What the vectors are of, in names and reports; None: the name of the file."""
    layer: int = 0
    """The layer they come from, for names and reports."""
    site: str | None = None
    """What they are there, for names and reports: hidden, conv2 … None: as ``name``."""
    out: str | None = None
    """The store, NAME.zarr; None: in ``cache``, called after ``name``. Held-out vectors are in NAME.held-out.zarr."""
    compression: Literal["none", "lz4", "zstd"] = "none"
    """How the stores are compressed on disk."""
    shard_bytes: int = 256_000_000
    """Approximate bytes of vectors in one shard, which is committed as a whole."""
    fresh: bool = False
    """Replace stores that are there instead of continuing them."""

    def __post_init__(self):
        if self.context is not None and self.context < 2:
            raise UsageError(f"--context {self.context} holds no two neighbours: use at least 2")
        if not 0 <= self.held_out < 1:
            raise UsageError(f"--held-out {self.held_out} is no share: use a number from 0 up to, not including, 1")
        if self.layer < 0:
            raise UsageError(f"--layer {self.layer} must be a number from 0 up")
        if not re.fullmatch(r"\w+", self.site or "_"):
            raise UsageError(f"--site '{self.site}' is no name: use letters, digits and _")
        if self.token_text is not None and self.tokens is None:
            raise UsageError("--token-text says what tokens look like, and there are none: give --tokens")
        if self.out is not None and not self.out.rstrip("/").endswith(".zarr"):
            raise UsageError(f"--out {self.out} must end with .zarr: it is the store itself")
        seed_number(self.seed)

    @property
    def called(self) -> str:
        """What the vectors are of."""
        return self.name or Path(self.array.rstrip("/")).stem

    @property
    def at(self) -> Location:
        """Layer and site."""
        return Location(self.layer, self.site or re.sub(r"\W+", "_", self.called).strip("_") or "vectors")

    @property
    def store(self) -> str:
        """Where the store is."""
        return (self.out or f"cache/{self.called}.zarr").rstrip("/")

    @property
    def held_out_store(self) -> str:
        """Where the vectors are that evaluation is to read."""
        return held_out_beside(self.store)


def held_out_beside(store: str) -> str:
    """The store of the held-out vectors of an imported store."""
    return f"{store.rstrip('/').removesuffix('.zarr')}.{HELD_OUT}.zarr"


class ImportOptions(TypedDict, total=False):
    """The options of ``pipeline import`` under their names in Python; None means the default."""

    array: str | Path
    """A file of ``[row, position, d]`` or ``[n, d]``."""
    key: str | None
    """Which array (or column) of the file."""
    lengths: str | Path | None
    """Positions of each sequence: an array of the same file, or a file."""
    tokens: str | Path | None
    """What each position is of, as whole numbers."""
    token_text: str | Path | None
    """The text of token 0, 1, 2 …"""
    labels: str | Path | None
    """The label of each sequence."""
    context: int | None
    """Positions per row of the store."""
    held_out: float | None
    seed: int | None
    name: str | None
    """What the vectors are of."""
    layer: int | None
    site: str | None
    out: str | Path | None
    """The store, NAME.zarr."""
    compression: Literal["none", "lz4", "zstd"] | None
    shard_bytes: int | str | None
    fresh: bool | None


def import_config(**asked: Unpack[ImportOptions]) -> ImportConfig:
    """The configuration for these options; an option that is not given has the default of the record.

    Raises:
        UsageError: there is no such option, no array, or a value is impossible.

    """
    given = options.chosen(asked, ImportOptions, "import")
    if not given.get("array"):
        raise UsageError("no array was named: give a file of vectors")
    if "shard_bytes" in given:
        given["shard_bytes"] = parse_count(given["shard_bytes"])
    return ImportConfig(**given)
