"""A compact index beside a long commit log, from which a store opens without parsing every line of the log.

The log is what counts: the index names the length and the hash of the part of the log that it was made of, and is used
only if the log still begins with exactly these bytes. Otherwise, or if its own checksums do not fit, it is made again
from the log; a reader that may not write there parses the log. Versions that do not know the file ignore it.

The file: one line of JSON (``log_bytes``, ``log_xxh3``, ``lines``, ``parts``: name → XXH3-64, and ``check``), then the
parts one after the other, arrays with one entry per line of the log:

    lines    [L] of shard, first_row, rows, and where the line is in the log: offset, length (:data:`LINE`)
    hashes   [L, 4, 16] uint8: XXH3-128 of the line's files, in the order of :data:`FILES`
    bytes    [L, 4] int64: their sizes
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import xxhash

from ...errors import StoreError
from ...system.untrusted_files import parse_json
from ..storage.places import Place
from .commit_log import LOG, Commit, follows, identities, last_of_shards, parse_line, table_of
from .manifest import checksum
from .zarr_documents import ARRAYS

INDEX = "activations/commits.index"
WORTH_IT = 4_000_000  # bytes of a log, or of what was added to it since: less is parsed in a tenth of a second
FILES = tuple(sorted(ARRAYS))
LINE = np.dtype([("shard", "<i8"), ("first_row", "<i8"), ("rows", "<i8"), ("offset", "<i8"), ("length", "<i8")])
_PARTS = {"lines": (LINE, ()), "hashes": (np.dtype("u1"), (len(FILES), 16)), "bytes": (np.dtype("<i8"), (len(FILES),))}
_BLOCK, _HEADER = 2**22, 4096


class IndexedLog(Sequence[Commit]):
    """A commit log whose lines are read when they are asked for. ``sound`` bytes of it are valid.

    Every line that is read is held to its own checksum and to the index.
    """

    def __init__(
        self,
        place: Place,
        lines: np.ndarray,
        newer: Sequence[Commit],
        sound: int,
        header: dict[str, Any] | None = None,
    ):
        self._place, self._lines, self._newer, self.sound, self._header = place, lines, list(newer), sound, header

    def __len__(self) -> int:
        return len(self._lines) + len(self._newer)

    @overload
    def __getitem__(self, at: int) -> Commit: ...
    @overload
    def __getitem__(self, at: slice) -> list[Commit]: ...
    def __getitem__(self, at: int | slice) -> Commit | list[Commit]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = at + len(self) if at < 0 else at
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self._read(at) if at < len(self._lines) else self._newer[at - len(self._lines)]

    def __iter__(self) -> Iterator[Commit]:
        for first in range(0, len(self._lines), 4096):
            part = self._lines[first : first + 4096]
            raw = _bytes_at(self._place, int(part["offset"][0]), int(part["length"].sum()))
            start = int(part["offset"][0])
            for line in part:
                yield self._parsed(raw[line["offset"] - start : line["offset"] - start + line["length"]], line)
        yield from self._newer

    def head(self, n: int) -> IndexedLog:
        """The first ``n`` lines; how many bytes these have is not known."""
        newer = self._newer[: max(0, n - len(self._lines))]
        return IndexedLog(self._place, self._lines[:n], newer, -1, self._header if n >= len(self._lines) else None)

    def append(self, commit: Commit) -> None:
        """Add a line that was just written."""
        self._newer.append(commit)

    def table(self) -> np.ndarray:
        """See :func:`.commit_log.table_of`."""
        fields = ("shard", "first_row", "rows")
        mine = np.stack([self._lines[field] for field in fields], axis=1) if len(self._lines) else None
        newer = table_of(self._newer)
        return newer if mine is None else np.concatenate([mine, newer])

    def latest(self) -> LatestLines:
        """See :func:`.commit_log.latest`."""
        return LatestLines(self)

    def _read(self, at: int) -> Commit:
        line = self._lines[at]
        return self._parsed(_bytes_at(self._place, int(line["offset"]), int(line["length"])), line)

    def _parsed(self, raw: bytes, line: np.void) -> Commit:
        commit = parse_line(raw)
        if commit is None or (commit.shard, commit.first_row, commit.rows) != line.item()[:3]:
            raise StoreError(
                f"{self._place}/{LOG} has changed since it was opened, or is damaged: open the store again"
            )
        return commit

    def identities(self) -> Iterator[tuple[int, int, int, str]]:
        """See :func:`.commit_log.identities`; from the index alone, as far as it reaches."""
        hashes = None if self._header is None else read_part(self._place, self._header, "hashes")
        if hashes is None:  # it has been replaced since
            yield from identities(list(self))
            return
        form = "{" + ", ".join(f'"{name}": "%s"' for name in FILES) + "}"
        for first in range(0, len(self._lines), 4096):
            part, digits = self._lines[first : first + 4096], hashes[first : first + 4096].tobytes().hex()
            wide = 32 * len(FILES)
            for at, (shard, first_row, rows, _, _) in enumerate(part.tolist()):
                mine = digits[at * wide : (at + 1) * wide]
                yield shard, first_row, rows, form % tuple(mine[i : i + 32] for i in range(0, wide, 32))
        yield from identities(self._newer)

    def bytes(self) -> int:
        """Of the files of the last line of every shard."""
        return int(np.maximum(self.file_sizes(), 0).sum())

    def file_sizes(self) -> np.ndarray:
        """Bytes of the files of the last line of every shard, in the order of :data:`FILES`: int64 [shards, files].

        −1 for a file that the line does not have.
        """
        indexed = None if self._header is None else read_part(self._place, self._header, "bytes")
        known = np.empty((0, len(FILES)), np.int64) if indexed is None else indexed
        rest = self if indexed is None else self._newer
        more = [[file.bytes if (file := c.files.get(name)) else -1 for name in FILES] for c in rest]
        return np.concatenate([known, np.array(more, np.int64).reshape(-1, len(FILES))])[self.last_lines()]

    def last_lines(self) -> np.ndarray:
        """Positions of the last line of every shard, in order of the shards."""
        return last_of_shards(self.table()[:, 0])


class LatestLines(Sequence[Commit]):
    """The valid (last) line of each shard, in order, read when it is asked for."""

    def __init__(self, log: IndexedLog):
        self._log, self._at = log, log.last_lines()

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, at: int) -> Commit: ...
    @overload
    def __getitem__(self, at: slice) -> list[Commit]: ...
    def __getitem__(self, at: int | slice) -> Commit | list[Commit]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return self._log[int(self._at[at])]


def _bytes_at(place: Place, offset: int, length: int) -> bytes:
    raw = bytearray(length)
    return bytes(raw[: place.read_into(LOG, offset, [raw])])


def open_log(place: Place, *, keep: bool = True) -> tuple[IndexedLog, int]:
    """A store's log and its length in bytes. Where it is long, its index is used, or extended, or made again.

    Args:
        place: the store.
        keep: write an index that was made.

    Raises:
        FileNotFoundError: there is no log.

    """
    size = place.size(LOG)
    lines, header = (None, None) if size < WORTH_IT else _usable(place, size)
    covered = 0 if header is None else int(header["log_bytes"])
    if size - covered >= WORTH_IT:
        try:
            parts, covered = _indexed(place, size, _parts_of(place, header))
        except (KeyError, ValueError):  # lines of files that stores do not have: what is valid is not decided here
            lines, header, covered = None, None, 0
        else:
            if keep:
                write_index(place, parts, covered)
            lines, header = parts["lines"], read_header(place) if keep else None
    lines = np.empty(0, LINE) if lines is None else lines
    last = IndexedLog(place, lines, [], covered)[-1] if len(lines) else None
    newer, sound = _parsed_tail(_bytes_at(place, covered, size - covered), last)
    return IndexedLog(place, lines, newer, covered + sound, header), size


def _parsed_tail(raw: bytes, last: Commit | None) -> tuple[list[Commit], int]:
    commits, sound = [], 0
    for line in raw.splitlines(keepends=True):
        commit = parse_line(line) if line.endswith(b"\n") else None
        if commit is None or not follows(last, commit):
            break
        commits.append(commit)
        last, sound = commit, sound + len(line)
    return commits, sound


def _usable(place: Place, log_bytes: int) -> tuple[np.ndarray, dict[str, Any]] | tuple[None, None]:
    """The lines of the index and its header, if it is whole and the log still begins with what it was made of."""
    header = read_header(place)
    if header is None or not 0 < header["log_bytes"] <= log_bytes:
        return None, None
    lines = read_part(place, header, "lines")
    if lines is None or _hash_of_log(place, header["log_bytes"]) != header["log_xxh3"]:
        return None, None
    ends = lines["offset"] + lines["length"]
    whole = len(lines) and lines["offset"][0] == 0 and ends[-1] == header["log_bytes"]
    return (lines, header) if whole and (ends[:-1] == lines["offset"][1:]).all() else (None, None)


def read_header(place: Place) -> dict[str, Any] | None:
    """The index's first line; None if there is no index, or the line is damaged."""
    try:
        raw = bytearray(_HEADER)
        found = bytes(raw[: place.read_into(INDEX, 0, [raw])])
        first, newline, _ = found.partition(b"\n")
        header = parse_json(first)
        if not newline or header.pop("check") != checksum(header) or set(header["parts"]) != set(_PARTS):
            return None
        entry = sum(dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for dtype, shape in _PARTS.values())
        if place.size(INDEX) != len(first) + 1 + header["lines"] * entry:
            return None
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return header | {"begins": len(first) + 1}


def read_part(place: Place, header: dict[str, Any], name: str) -> np.ndarray | None:
    """One of the index's arrays; None if its bytes are not those that were written."""
    offset = header["begins"]
    for part, (dtype, shape) in _PARTS.items():
        array = np.empty((header["lines"], *shape), dtype) if part == name else None
        if array is not None:
            raw = array.view(np.uint8).reshape(-1).data
            short = place.read_into(INDEX, offset, [raw]) != len(raw)
            return None if short or xxhash.xxh3_64_hexdigest(raw) != header["parts"][name] else array
        offset += header["lines"] * dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    raise KeyError(name)


def _hash_of_log(place: Place, length: int) -> str:
    hashed, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    for start in range(0, length, _BLOCK):
        part = block[: min(_BLOCK, length - start)]
        if place.read_into(LOG, start, [part]) != len(part):
            return ""
        hashed.update(part)
    return hashed.hexdigest()


def _parts_of(place: Place, header: dict[str, Any] | None) -> dict[str, np.ndarray]:
    """All arrays of an index, none of them where one is damaged."""
    found = {} if header is None else {name: read_part(place, header, name) for name in _PARTS}
    whole = {name: part for name, part in found.items() if part is not None}
    return whole if len(whole) == len(_PARTS) else {}


def _indexed(place: Place, size: int, begun: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of the log's valid lines, and how many bytes these have; one block of the log in memory at a time.

    ``begun``: those of its first lines, or nothing.
    """
    lines: list[np.ndarray] = []
    hashes: list[bytes] = []
    sizes: list[np.ndarray] = []
    last, start = None, 0
    if begun and len(begun["lines"]):
        lines, hashes, sizes = [begun["lines"]], [begun["hashes"].tobytes()], [begun["bytes"]]
        start = int(begun["lines"]["offset"][-1] + begun["lines"]["length"][-1])
        last = IndexedLog(place, begun["lines"], [], start)[-1]
    while start < size:
        raw = _bytes_at(place, start, min(2 * _BLOCK, size - start))
        commits, sound = _parsed_tail(raw, last)
        if not commits:
            break
        lengths = [len(line) for line in raw[:sound].splitlines(keepends=True)]
        part = np.empty(len(commits), LINE)
        for field in ("shard", "first_row", "rows"):
            part[field] = [getattr(commit, field) for commit in commits]
        part["length"], part["offset"] = lengths, start + np.cumsum([0, *lengths[:-1]])
        lines.append(part)
        hashes.append(b"".join(bytes.fromhex(commit.files[name].xxh3) for commit in commits for name in FILES))
        sizes.append(np.array([[commit.files[name].bytes for name in FILES] for commit in commits], "<i8"))
        last, start = commits[-1], start + sound
    whole = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, len(FILES), 16)
    empty = {"lines": np.empty(0, LINE), "bytes": np.empty((0, len(FILES)), "<i8")}
    found = {"lines": lines, "bytes": sizes}
    joined = {name: np.concatenate(each) if each else empty[name] for name, each in found.items()}
    return joined | {"hashes": whole}, start


def write_index(place: Place, parts: dict[str, np.ndarray], log_bytes: int) -> None:
    """Write the index atomically, where that is allowed: nothing depends on it."""
    raw = {name: np.ascontiguousarray(parts[name]).tobytes() for name in _PARTS}
    header: dict[str, Any] = {
        "log_bytes": log_bytes,
        "log_xxh3": _hash_of_log(place, log_bytes),
        "lines": len(parts["lines"]),
        "parts": {name: xxhash.xxh3_64_hexdigest(part) for name, part in raw.items()},
    }
    header["check"] = checksum(header)
    try:
        place.replace(INDEX, json.dumps(header).encode() + b"\n" + b"".join(raw.values()))
    except (OSError, StoreError):
        return  # a store of somebody else's, or on a disk that is full or read-only
