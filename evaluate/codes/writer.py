"""Writing a store of codes: arrays that grow along their first axis, committed together in parts.

For every part the chunks are written first, then the line of the log, then the shapes that Zarr readers see. A chunk
that is not full is written again, longer, by a later part; what is committed of it keeps its bytes. So a process that
is killed at any moment leaves exactly the parts of the log, and the next one goes on behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ...cache.format.codecs import checksum_bytes, encode
from ...cache.format.zarr_documents import to_json
from ...cache.storage.local import PARTIAL
from ...cache.storage.lock import acquire
from ...cache.storage.open_place import place_of
from ...cache.storage.places import Place
from ...errors import StoreError
from .format import LOCK, LOG, ArrayFormat, CodesManifest, Part, arrays, group_document, parse_log, read_manifest
from .store import array_hash, read_chunk

_PART_ENTRIES, _PART_TOKENS = 1 << 20, 1 << 17  # a part is committed when it has so many of either

Encoded = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]
"""Text by array [R, T], entries of every token [N], their features [E] and activations [E]."""


def worth_a_commit(parts: Sequence[Encoded]) -> bool:
    """Whether parts together have so many tokens or entries that they are written."""
    tokens, entries = sum(len(each[1]) for each in parts), sum(len(each[2]) for each in parts)
    return tokens >= _PART_TOKENS or entries >= _PART_ENTRIES


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The rows of all parts, in order."""
    text = {name: np.concatenate([each[0][name] for each in parts]) for name in parts[0][0]}
    _, counts, features, values = zip(*parts, strict=True)
    return text, np.concatenate(counts), np.concatenate(features), np.concatenate(values)


class _GrowingArray:
    """One array: its length, and its last chunk in memory."""

    def __init__(self, place: Place, array: ArrayFormat, length: int):
        self._place, self._array, self.length = place, array, length
        self._tail = np.full((array.chunk, *array.inner), array.fill, np.dtype(array.dtype).newbyteorder("<"))
        if length % array.chunk:
            inside = length % array.chunk
            self._tail[:inside] = read_chunk(place, array, length // array.chunk)[:inside]

    def append(self, values: np.ndarray) -> None:
        """Write every chunk that becomes full, and the last one as far as it goes."""
        while len(values):
            inside = self.length % self._array.chunk
            taken = min(len(values), self._array.chunk - inside)
            self._tail[inside : inside + taken] = values[:taken]
            self._tail[inside + taken :] = self._array.fill
            self.length += taken
            values = values[taken:]
            if inside + taken == self._array.chunk or not len(values):
                data = bytes(encode(self._tail, "zstd"))
                self._place.replace(
                    self._array.key((self.length - 1) // self._array.chunk), data + checksum_bytes(data)
                )

    def shape(self) -> None:
        """Tell Zarr readers the length."""
        self._place.replace(f"{self._array.name}/zarr.json", to_json(self._array.document(self.length)))


class CodesWriter:
    """Writes the codes of a run, part by part; create it with :meth:`open`. A context manager that releases the lock.

    Args of :meth:`append` are as in :class:`~tcsae.evaluate.codes.store.RowCodes`.
    """

    def __init__(self, place: Place, manifest: CodesManifest, parts: list[Part], lock: Any):
        self._place, self.manifest, self._parts, self._lock = place, manifest, parts, lock
        lengths = {"features": self.n_entries, "values": self.n_entries, "indptr": self.n_rows * manifest.context + 1}
        self._arrays: dict[str, _GrowingArray] = {}
        for name, array in arrays(manifest.context).items():
            length = lengths.get(name, self.n_rows)
            if name == "indptr" and not parts:  # its first bound is no token's
                self._arrays[name] = _GrowingArray(place, array, 0)
                self._arrays[name].append(np.zeros(1, np.int64))
                continue
            self._arrays[name] = _GrowingArray(place, array, length)

    @classmethod
    def open(cls, path: str | Path, manifest: CodesManifest, *, fresh: bool = False) -> Self:
        """Begin a store of codes, or go on with one.

        Raises:
            StoreError: another process writes it, it holds other codes, or the folder holds other things.

        """
        place = place_of(path)
        known = {*arrays(1), "zarr.json"}
        other = [name for name in place.names("") if name not in known and not name.endswith(PARTIAL)]
        if other:
            raise StoreError(f"{place} is a folder with other things in it ({other[0]}): name a new or empty one")
        if place.exists("zarr.json") and not fresh:
            read_manifest(place)  # of anything else nothing is touched
        place.make_folder("values")
        lock = acquire(place, key=LOCK)
        try:
            if fresh or not place.exists("zarr.json"):
                _begin(place, manifest)
            return cls(place, _same(place, manifest), _sound_parts(place), lock)
        except BaseException:
            lock.release()
            raise

    @property
    def n_rows(self) -> int:
        """Committed rows: where writing goes on."""
        return self._parts[-1].stop_row if self._parts else 0

    @property
    def n_entries(self) -> int:
        """Committed codes that are not zero."""
        return self._parts[-1].stop_entry if self._parts else 0

    def append(
        self, text: Mapping[str, np.ndarray], count_N: np.ndarray, feature_E: np.ndarray, value_E: np.ndarray
    ) -> None:
        """Write and commit some rows.

        Args:
            text: tokens, documents and flags, each [R, T].
            count_N: entries of every token.
            feature_E: features, token by token, ascending within each.
            value_E: their activations.

        Raises:
            StoreError, ResourceError: they cannot be written.

        """
        rows = len(text["tokens"])
        data: dict[str, np.ndarray] = {name: np.ascontiguousarray(values) for name, values in text.items()}
        data["indptr"] = np.cumsum(count_N, dtype=np.int64) + self.n_entries
        data |= {"features": feature_E.astype(np.int32, copy=False), "values": value_E.astype(np.float32, copy=False)}
        for name, values in data.items():
            self._arrays[name].append(values)
        hashes = {name: array_hash(values) for name, values in data.items()}
        part = Part(self.n_rows, rows, self.n_entries, len(feature_E), hashes)
        self._lock.confirm()
        self._place.append(LOG, part.to_line())
        self._parts.append(part)
        for array in self._arrays.values():
            array.shape()

    def finish(self) -> None:
        """Mark the codes as finished."""
        self.manifest = self.manifest.model_copy(update={"finished": True})
        self._place.replace("zarr.json", to_json(group_document(self.manifest)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _begin(place: Place, manifest: CodesManifest) -> None:
    place.remove("zarr.json")  # first: what remains of a process that is killed here is not taken for codes
    for name, array in arrays(manifest.context).items():
        place.make_folder(name)
        for file in place.names(name):
            if f"{name}/{file}" != LOCK:
                place.remove(f"{name}/{file}")
        place.replace(f"{name}/zarr.json", to_json(array.document(0)))
    place.replace(LOG, b"")
    place.replace("zarr.json", to_json(group_document(manifest)))


def _same(place: Place, manifest: CodesManifest) -> CodesManifest:
    there = read_manifest(place)
    difference = there.difference(manifest)
    if difference:
        raise StoreError(f"{place} holds other codes ({difference}): choose another --out, or --fresh to begin anew")
    return there


def _sound_parts(place: Place) -> list[Part]:
    try:
        raw = place.read(LOG)
    except FileNotFoundError:
        raise StoreError(f"{place}/{LOG} is missing, so nothing says which codes are good: use --fresh") from None
    parts, sound = parse_log(raw)
    if raw[sound:].count(b"\n") > 1:
        raise StoreError(f"{place}/{LOG} is damaged at line {len(parts) + 1}, before its end: use --fresh")
    if sound < len(raw):  # a line that a crash left incomplete
        place.replace(LOG, raw[:sound])
    for name in arrays(1):
        for file in place.names(name):
            if place.local and file.endswith(PARTIAL):
                place.remove(f"{name}/{file}")
    return parts
