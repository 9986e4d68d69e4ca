"""The sparse codes of an SAE, opened for reading: part after part, every one compared with its hashes.

Shapes: R rows, T positions, N = R·T tokens (token n = row · T + position), E entries: codes that are not zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import xxhash

from ...cache.format.codecs import CRC_BYTES, DamageError, check, decode
from ...cache.storage.open_place import place_of
from ...cache.storage.places import Place
from ...errors import StoreError
from .format import LOG, REMEDY, ArrayFormat, CodesManifest, Part, arrays, parse_log, read_manifest


@dataclass(frozen=True)
class RowCodes:
    """The codes of some rows. Tokens are numbered from the first of these rows."""

    first_row: int
    tokens_RT: np.ndarray  # int32
    documents_RT: np.ndarray  # int32
    flags_RT: np.ndarray  # uint8; 0: the token counts
    indptr: np.ndarray  # int64 [N + 1]: entries indptr[n] … indptr[n + 1] are of token n
    feature_E: np.ndarray  # int32, ascending within a token
    value_E: np.ndarray  # float32

    @property
    def entry_tokens(self) -> np.ndarray:
        """The token of every entry [E]."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))

    @property
    def valid(self) -> np.ndarray:
        """Which tokens count, bool [R, T]."""
        return self.flags_RT == 0

    def rows(self, start: int, stop: int) -> RowCodes:
        """Rows ``start`` … ``stop`` of these."""
        context = self.tokens_RT.shape[1]
        bounds = self.indptr[start * context : stop * context + 1]
        entries = slice(bounds[0], bounds[-1])
        return RowCodes(
            self.first_row + start,
            self.tokens_RT[start:stop],
            self.documents_RT[start:stop],
            self.flags_RT[start:stop],
            bounds - bounds[0],
            self.feature_E[entries],
            self.value_E[entries],
        )

    def dense_row(self, row: int, features: np.ndarray) -> np.ndarray:
        """Activations [T, len(features)] of some features (ascending) in one row, counted from the first of these."""
        context = self.tokens_RT.shape[1]
        bounds = self.indptr[row * context : (row + 1) * context + 1]
        feature_E, value_E = self.feature_E[bounds[0] : bounds[-1]], self.value_E[bounds[0] : bounds[-1]]
        position_E = np.repeat(np.arange(context), np.diff(bounds))
        column_E = np.searchsorted(features, feature_E)
        keep = features[np.minimum(column_E, len(features) - 1)] == feature_E
        out = np.zeros((context, len(features)), np.float32)
        out[position_E[keep], column_E[keep]] = value_E[keep]
        return out


class CodeStore:
    """The committed codes of a run over rows of text, with tokens, documents and flags; needs no language model."""

    def __init__(self, place: Place, manifest: CodesManifest, parts: list[Part]):
        self._place, self.manifest, self.parts = place, manifest, parts
        self._arrays = arrays(manifest.context)
        self._chunk: dict[str, tuple[int, np.ndarray]] = {}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open codes for reading.

        Raises:
            StoreError: nothing there, no codes, unfinished, or damaged.

        """
        place = place_of(path)
        manifest = read_manifest(place)
        try:
            parts, _ = parse_log(place.read(LOG))
        except FileNotFoundError:
            raise StoreError(f"{place}/{LOG} is missing, so nothing says which codes are good: {REMEDY}") from None
        rows = parts[-1].stop_row if parts else 0
        if not manifest.finished:
            what = f"{place} holds the codes of {rows} of {manifest.planned_rows} rows"
            again = f"pipeline {manifest.kept_by}" + (" --codes" if manifest.kept_by == "evaluate" else "")
            raise StoreError(f"{what}, not finished: finish it with the same `{again}`")
        if rows != manifest.planned_rows:
            raise StoreError(f"{place}/{LOG} is damaged: {rows} of {manifest.planned_rows} rows can be read; {REMEDY}")
        return cls(place, manifest, parts)

    def __repr__(self) -> str:
        return f"CodeStore({self.path!r}, {self.n_rows} × {self.context}, {self.n_entries} entries)"

    @property
    def path(self) -> str:
        """The folder or URL."""
        return str(self._place)

    @property
    def place(self) -> Place:
        """The folder or URL, for files kept beside the codes."""
        return self._place

    @property
    def context(self) -> int:
        """T, positions per row."""
        return self.manifest.context

    @property
    def n_rows(self) -> int:
        """R."""
        return self.parts[-1].stop_row if self.parts else 0

    @property
    def n_features(self) -> int:
        """Features of the SAE."""
        return self.manifest.n_features

    @property
    def n_entries(self) -> int:
        """Codes that are not zero."""
        return self.parts[-1].stop_entry if self.parts else 0

    def fingerprint(self) -> str:
        """Hash of what the codes are of and of all of them."""
        told = "".join(part.xxh3["values"] + part.xxh3["features"] for part in self.parts)
        return xxhash.xxh3_128_hexdigest(f"{self.manifest.store_fingerprint}{self.manifest.weights}{told}".encode())

    def __iter__(self) -> Iterator[RowCodes]:
        """All rows, in order, part by part."""
        for part in self.parts:
            yield self.read(part)

    def read(self, part: Part) -> RowCodes:
        """The codes of one part.

        Raises:
            StoreError: they are damaged.

        """
        context, entries = self.context, (part.first_entry, part.stop_entry)
        tokens_RT, documents_RT, flags_RT = (
            self._checked(part, name, part.first_row, part.stop_row) for name in ("tokens", "documents", "flags")
        )
        upper = self._checked(part, "indptr", part.first_row * context + 1, part.stop_row * context + 1)
        indptr = np.concatenate([[part.first_entry], upper]) - part.first_entry
        feature_E, value_E = (self._checked(part, name, *entries) for name in ("features", "values"))
        return RowCodes(part.first_row, tokens_RT, documents_RT, flags_RT, indptr, feature_E, value_E)

    def part_of(self, row: int) -> Part:
        """The part that holds a row.

        Raises:
            StoreError: there is no such row.

        """
        found = next((part for part in self.parts if part.first_row <= row < part.stop_row), None)
        if found is None:
            raise StoreError(f"row {row} was asked for, {self.path} holds rows 0 to {self.n_rows}")
        return found

    def _checked(self, part: Part, name: str, start: int, stop: int) -> np.ndarray:
        found = self._slice(self._arrays[name], start, stop)
        if array_hash(found) != part.xxh3[name]:
            raise StoreError(f"{self.path}/{name} is damaged in rows {part.first_row} to {part.stop_row}: {REMEDY}")
        return found

    def _slice(self, array: ArrayFormat, start: int, stop: int) -> np.ndarray:
        parts = []
        for chunk in range(start // array.chunk, -(-stop // array.chunk)):
            first = chunk * array.chunk
            kept = self._chunk.get(array.name)
            if kept is None or kept[0] != chunk:
                kept = self._chunk[array.name] = (chunk, read_chunk(self._place, array, chunk))
            parts.append(kept[1][max(start - first, 0) : stop - first])
        return np.concatenate(parts) if parts else np.empty((0, *array.inner), array.dtype)


def array_hash(values: np.ndarray) -> str:
    """XXH3-64, in hexadecimal, of an array's bytes in C order."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(values).data.cast("B"))


def read_chunk(place: Place, array: ArrayFormat, chunk: int) -> np.ndarray:
    """One whole chunk, decompressed, its CRC compared.

    Raises:
        StoreError: it is missing or damaged.

    """
    key = array.key(chunk)
    out = np.empty((array.chunk, *array.inner), np.dtype(array.dtype).newbyteorder("<"))
    try:
        raw = place.read(key)
        check(raw[:-CRC_BYTES], raw[-CRC_BYTES:])
        decode(raw[:-CRC_BYTES], out, "zstd")
    except FileNotFoundError:
        raise StoreError(f"{place}/{key} is missing: {REMEDY}") from None
    except DamageError as damage:
        raise StoreError(f"{place}/{key} is damaged ({damage}): {REMEDY}") from None
    return out
