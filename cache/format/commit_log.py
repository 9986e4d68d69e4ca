"""The commit log: one JSON line with a checksum per shard, written after the shard's files are durable.

A row exists only if a line of the log covers it. If a crash left a line incomplete, that line and everything after it
are ignored. A shard has several lines if it was the short last one and was later replaced by a longer one. The last of
these lines counts for reading. For fingerprints the first line that covers a row counts, so that an old fingerprint
stays valid when the store grows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import xxhash

from ...sites import Location
from ...system.untrusted_files import parse_json
from .manifest import Execution, StoreManifest, checksum
from .shard import FileRecord

L = TypeVar("L", bound="Sequence[Commit]")
LOG = "activations/commits.jsonl"  # in the folder of an array, where Zarr readers do not search for arrays


@dataclass(frozen=True)
class ShardRecord:
    """A shard that is durable in the stores of all layers but not committed yet; what a distributed worker returns."""

    shard: int
    first_row: int
    rows: int
    files: Mapping[Location, Mapping[str, FileRecord]]  # location → array → file

    def for_layer(
        self, layer: Location, cursor: dict[str, Any] | None, execution: dict[str, Any] | None = None
    ) -> Commit:
        """The log line of one layer."""
        return Commit(self.shard, self.first_row, self.rows, self.files[layer], cursor, execution)


@dataclass(frozen=True)
class Commit:
    """One line of a store's log."""

    shard: int
    first_row: int
    rows: int
    files: Mapping[str, FileRecord]
    cursor: dict[str, Any] | None  # the text position after these rows
    execution: dict[str, Any] | None = field(default=None)  # only if it differs from the manifest's

    @property
    def stop_row(self) -> int:
        """The first row after this shard."""
        return self.first_row + self.rows

    def to_line(self) -> bytes:
        """The line with its newline and its own checksum (field ``check``)."""
        record: dict[str, Any] = {"shard": self.shard, "first_row": self.first_row, "rows": self.rows}
        record["files"] = {name: _file_entry(file) for name, file in self.files.items()}
        record["cursor"] = self.cursor
        if self.execution is not None:
            record["execution"] = self.execution
        record["check"] = checksum(record)
        return (json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _file_entry(file: FileRecord) -> dict[str, Any]:
    entry: dict[str, Any] = {"bytes": file.bytes, "xxh3": file.xxh3}
    return entry if file.chunks is None else entry | {"chunks": list(file.chunks)}


def _file_record(entry: dict[str, Any]) -> FileRecord:
    chunks = entry.pop("chunks", None)
    return FileRecord(**entry, chunks=None if chunks is None else tuple(chunks))


def parse_log(raw: bytes) -> tuple[list[Commit], int]:
    """The commits of a log, and the length in bytes of the part that is valid.

    Everything from the first invalid line on is ignored.
    """
    commits: list[Commit] = []
    sound = 0
    for line in raw.splitlines(keepends=True):
        commit = parse_line(line) if line.endswith(b"\n") else None
        if commit is None or not follows(commits[-1] if commits else None, commit):
            break
        commits.append(commit)
        sound += len(line)
    return commits, sound


def parse_line(line: bytes) -> Commit | None:
    """The commit of one line; None if the line is damaged."""
    try:
        record = parse_json(line)
        check = record.pop("check")
        if check != checksum(record):
            return None
        files = {name: _file_record(entry) for name, entry in record.pop("files").items()}
        return Commit(files=files, **record)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def follows(last: Commit | None, new: Commit) -> bool:
    """Whether a line may come next: it must be the next shard, or a longer version of the last one."""
    if last is None:
        return new.shard == 0 and new.first_row == 0
    if new.shard == last.shard:
        return new.first_row == last.first_row and new.rows > last.rows
    return new.shard == last.shard + 1 and new.first_row == last.stop_row


def latest(commits: Sequence[Commit]) -> Sequence[Commit]:
    """The valid (last) line of each shard, in order."""
    known = getattr(commits, "latest", None)  # of a log with an index
    if known is not None:
        return known()
    return list({commit.shard: commit for commit in commits}.values())


def execution_of(commit: Commit, manifest: StoreManifest) -> Execution:
    """How the forward passes of a shard were run."""
    return manifest.execution if commit.execution is None else Execution(**commit.execution)


def table_of(commits: Sequence[Commit]) -> np.ndarray:
    """Shard, first row and rows of every line: int64 [lines, 3]."""
    known = getattr(commits, "table", None)  # of a log with an index
    if known is not None:
        return known()
    return np.array([(c.shard, c.first_row, c.rows) for c in commits], np.int64).reshape(-1, 3)


def last_of_shards(shards_L: np.ndarray) -> np.ndarray:
    """Positions of the last line of every shard, from the shard of every line: a log has them in order."""
    return np.flatnonzero(np.append(np.diff(shards_L) != 0, True)) if len(shards_L) else np.empty(0, np.int64)


def rows_in(commits: Sequence[Commit]) -> int:
    """Number of committed rows."""
    return commits[-1].stop_row if commits else 0


def agreed(logs: Mapping[Location, L], settled: Collection[Location] = ()) -> dict[Location, L] | None:
    """The logs of layers that are written together, cut to the rows that all of them have.

    A crash can leave some layers one line ahead of the others; that line is removed. The result is None if the logs
    differ by more, or if a ``settled`` (finished) layer would lose a line. Only the rows of each shard are compared,
    not the lines: a store that grew in steps and one that was written at once may hold the same rows.
    """
    wanted = _shard_rows(table_of(min(logs.values(), key=rows_in)))
    cut: dict[Location, L] = {}
    for layer, log in logs.items():
        lines = table_of(log)
        shorter = [len(log)] if layer in settled or not len(log) else [len(log), len(log) - 1]
        found = next((n for n in shorter if np.array_equal(_shard_rows(lines[:n]), wanted)), None)
        if found is None:
            return None
        cut[layer] = log if found == len(log) else _head(log, found)
    return cut


def _head(log: Any, n: int) -> Any:
    return log.head(n) if hasattr(log, "head") else log[:n]


def _shard_rows(lines_L3: np.ndarray) -> np.ndarray:
    return lines_L3[last_of_shards(lines_L3[:, 0]), 1:]


def fingerprint(manifest: StoreManifest, commits: Sequence[Commit], rows: int) -> str:
    """XXH3-128 of what identifies the first ``rows`` rows; it stays the same when the store grows.

    It covers layer, model, text, layout, and the hashes of the first files that held these rows.
    """
    identity = manifest.model_dump(
        mode="json", include={"format_version", "layer", "d_model", "model", "text", "layout"}
    )
    # The JSON of [identity, rows, [[shard, rows, files], …]], piece by piece: a store may have a million shards.
    hashed = xxhash.xxh3_128(json.dumps([identity, rows, []], sort_keys=True)[:-2].encode())
    between = ""
    for shard, rows_in_shard, files in _covering(commits, rows, manifest.layout.shard_rows):
        hashed.update(f"{between}[{shard}, {rows_in_shard}, {files}]".encode())
        between = ", "
    hashed.update(b"]]")
    return hashed.hexdigest()


def _covering(commits: Sequence[Commit], rows: int, shard_rows: int) -> Iterator[tuple[int, int, str]]:
    """Of every shard the first line that covers its part of the first ``rows`` rows, or its last one: shard, rows,
    files.
    """
    chosen: tuple[int, int, str] | None = None
    reached = 0
    for shard, first_row, rows_in_shard, files in identities(commits):
        if first_row >= rows:
            break
        same = chosen is not None and chosen[0] == shard
        if same and reached >= min(rows, first_row + shard_rows):
            continue
        if chosen is not None and not same:
            yield chosen
        chosen, reached = (shard, rows_in_shard, files), first_row + rows_in_shard
    if chosen is not None:
        yield chosen


def identities(commits: Sequence[Commit]) -> Iterator[tuple[int, int, int, str]]:
    """Of every line its shard, first row, rows, and the hashes of its files as JSON with sorted names."""
    known = getattr(commits, "identities", None)  # of a log with an index
    if known is not None:
        yield from known()
        return
    for c in commits:
        yield c.shard, c.first_row, c.rows, json.dumps({n: f.xxh3 for n, f in c.files.items()}, sort_keys=True)
