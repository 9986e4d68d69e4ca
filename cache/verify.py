"""The check of a whole store; it reads everything and changes nothing.

It tells whether every committed byte is what was written and, on request, whether the model produces the stored rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from ..console import progress
from ..errors import StoreError, UsageError
from ..system.untrusted_files import parse_json
from .format.codecs import CRC_BYTES, DamageError, check
from .format.commit_log import LOG, Commit, execution_of, last_of_shards, latest, rows_in, table_of
from .format.layout import PADDING, RowBlock
from .format.log_index import INDEX, IndexedLog, open_log
from .format.manifest import Execution, StoreManifest, checksum, group_document, manifest_at
from .format.shard_reader import ShardReader
from .format.zarr_documents import ARRAYS, array_document, shard_key, shard_of_name
from .statistics import STATISTICS
from .storage.lock import LOCK
from .storage.open_place import place_of
from .storage.places import Place
from .store import ActivationStore

_PIECE = 8_000_000  # bytes hashed at a time
# (batch of rows, execution with which it was extracted) → this layer's activations, bfloat16 bits [B, T, D].
Recompute = Callable[[RowBlock, Execution], np.ndarray]


@dataclass(frozen=True)
class Finding:
    """One problem: a file (or rows of one) and what is wrong with it."""

    file: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`."""

    path: str
    rows: int
    files: int
    bytes: int
    findings: tuple[Finding, ...]
    rows_recomputed: int = 0
    rows_identical: int = 0
    worst_difference: float = 0.0  # largest |new − stored| relative to the largest value of the same token

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.findings


def verify(
    path: str | Path, *, recompute: Recompute | None = None, sample: int = 64, seed: int = 0, tolerance: float = 2.0**-5
) -> Verification:
    """Check structure, checksums and counts of a store, search for NaN and Inf, and compare some rows with the model.

    Args:
        path: folder or URL.
        recompute: computes the activations of rows again; None: no comparison with the model. It is called with the
            same batches as the extraction used, so that results are bit-identical on the same machine.
        sample: rows to recompute, rounded up to whole batches.
        seed: decides the sample.
        tolerance: a recomputed token with a larger relative difference counts as a problem.

    Raises:
        StoreError: there is no store, or it has a newer format. Damage is reported in the result, not raised.
        UsageError: ``sample`` is below 1.

    """
    if sample < 1:
        raise UsageError(f"a sample of {sample} rows was asked for: verify at least one")
    place = place_of(path)
    manifest = manifest_at(place)
    findings = list(_documents(place, manifest))
    try:
        commits, log_bytes = open_log(place, keep=False)
    except FileNotFoundError:
        return Verification(str(place), 0, 0, 0, (*findings, Finding(LOG, "is missing")))
    findings += _log(manifest, commits, commits.sound == log_bytes)
    findings += _arrays(place, manifest, rows_in(commits))
    findings += _unexpected(place, commits)
    findings += _side_files(place)
    newest, files, held = latest(commits), 0, 0
    with progress(f"verifying layer {manifest.layer}", rows_in(commits), unit="rows") as bar:
        for commit in newest:
            findings += _shard(place, manifest, commit)
            files, held = files + len(commit.files), held + sum(file.bytes for file in commit.files.values())
            bar.advance(commit.rows)
    seen = Verification(str(place), rows_in(commits), files, held, tuple(findings))
    if recompute is None or findings or not seen.rows:
        return seen
    return _recomputed(seen, ActivationStore(place, manifest, commits), recompute, sample, seed, tolerance)


def _documents(place: Place, manifest: StoreManifest) -> Iterator[Finding]:
    if parse_json(place.read("zarr.json")) != json.loads(json.dumps(group_document(manifest))):
        yield Finding("zarr.json", "says other things than its manifest implies")


def _log(manifest: StoreManifest, commits: IndexedLog, sound: bool) -> Iterator[Finding]:
    rows = rows_in(commits)
    if not sound:
        yield Finding(LOG, f"is damaged at line {len(commits) + 1}")
    if not manifest.finished:
        yield Finding(LOG, f"holds {rows} of {manifest.planned_rows} rows: finish it with the same extract command")
    elif rows != manifest.planned_rows:
        yield Finding(LOG, f"holds {rows} rows where {manifest.planned_rows} were finished")
    lines_L3 = table_of(commits)
    shards_S3 = lines_L3[last_of_shards(lines_L3[:, 0])][:-1]
    for shard, _, held in shards_S3[shards_S3[:, 2] != manifest.layout.shard_rows].tolist():
        yield Finding(LOG, f"commits {held} rows as shard {shard}, which is not the last")


def _arrays(place: Place, manifest: StoreManifest, rows: int) -> Iterator[Finding]:
    for name in ARRAYS:
        try:
            found = parse_json(place.read(f"{name}/zarr.json"))
        except FileNotFoundError:
            yield Finding(f"{name}/zarr.json", "is missing")
            continue
        except ValueError:
            yield Finding(f"{name}/zarr.json", "is no JSON")
            continue
        if found != array_document(name, manifest.layout, rows):
            yield Finding(f"{name}/zarr.json", f"is not what {rows} rows in this layout need")


def _unexpected(place: Place, commits: IndexedLog) -> Iterator[Finding]:
    """Files that belong to no commit: leftovers of a killed writer, or files that are not ours."""
    shards = len(latest(commits))
    known = {"zarr.json", LOG, INDEX, LOCK, STATISTICS, *ARRAYS, *(f"{name}/zarr.json" for name in ARRAYS)}
    for folder in ("", *ARRAYS):
        for name in place.names(folder):
            key = f"{folder}/{name}" if folder else name
            shard = shard_of_name(folder, name) if folder else None
            if shard is not None and shard < shards and key == shard_key(folder, shard):
                continue
            if key not in known and not key.startswith("activations/norms."):
                yield Finding(key, "does not belong to the store's committed rows")


def _side_files(place: Place) -> Iterator[Finding]:
    """Check the saved statistics. A store may lack them, but those that exist must be undamaged."""
    if place.exists(STATISTICS):
        try:
            record = parse_json(place.read(STATISTICS))
            sound = record.pop("check") == checksum(record)
        except (ValueError, KeyError, AttributeError, TypeError):
            sound = False
        if not sound:
            yield Finding(STATISTICS, "is damaged: delete it, it will be computed again")
    for name in place.names("activations"):
        if name.startswith("norms."):
            data = place.read(f"activations/{name}")
            try:
                check(data[:-CRC_BYTES], data[-CRC_BYTES:])
            except DamageError:
                yield Finding(f"activations/{name}", "is damaged: delete it, it will be computed again")


def _shard(place: Place, manifest: StoreManifest, commit: Commit) -> Iterator[Finding]:
    sound = True
    for name in ARRAYS:
        key = shard_key(name, commit.shard)
        problem = _file(place, key, commit, name)
        if problem:
            sound = False
            yield Finding(key, problem)
    if sound:
        yield from _content(place, manifest, commit)


def _file(place: Place, key: str, commit: Commit, name: str) -> str | None:
    record = commit.files.get(name)
    if record is None:
        return "is in no commit"
    try:
        size = place.size(key)
    except FileNotFoundError:
        return "is missing"
    if size != record.bytes:
        return f"has {size} bytes where {record.bytes} were committed"
    hashed, piece = xxhash.xxh3_128(), bytearray(_PIECE)
    files = place.open_many()
    for offset in range(0, size, _PIECE):
        n = files.read_into(key, offset, [piece])
        hashed.update(memoryview(piece)[:n])
    files.close()
    return None if hashed.hexdigest() == record.xxh3 else "is altered: its hash is not the committed one"


def _content(place: Place, manifest: StoreManifest, commit: Commit) -> Iterator[Finding]:
    """Check that chunks decode with the right hashes, all numbers are finite, and all token ids are possible."""
    layout, reader = manifest.layout, ShardReader(place, manifest.layout)
    key = shard_key("activations", commit.shard)
    hashes, chunks = commit.files["activations"].chunks or (), layout.chunks_for(commit.rows)
    if len(hashes) != chunks:
        yield Finding(LOG, f"has {len(hashes)} chunk hashes for the {chunks} chunks of shard {commit.shard}")
        return
    try:
        text = {name: array[: commit.rows] for name, array in reader.text(commit.shard).items()}
        bad = 0
        for chunk, xxh3 in enumerate(hashes):
            bits = reader.scratch()
            # Once with the chunk's own CRC-32C, which every Zarr reader compares, and once with the log's hash, which
            # our reader compares.
            for compared in (None, xxh3):
                reader.read_chunk(commit.shard, chunk, commit.rows, bits, compared)
            bad += nonfinite_tokens(bits[: commit.rows - chunk * layout.chunk_rows])
    except StoreError as damage:
        yield Finding(key, str(damage))
        return
    finally:
        reader.forget()
    if bad:
        yield Finding(key, f"holds NaN or Inf at {bad} tokens")
    tokens, padded = text["tokens"], text["flags"] & PADDING != 0
    if ((tokens < 0) | (tokens >= manifest.model.vocab_size))[~padded].any():
        yield Finding(
            shard_key("tokens", commit.shard), f"holds tokens outside the vocabulary of {manifest.model.vocab_size}"
        )
    if (text["documents"] < 0).any():
        yield Finding(shard_key("documents", commit.shard), "holds negative document numbers")


def nonfinite_tokens(bits_BTD: np.ndarray) -> int:
    """Number of tokens that hold NaN or Inf, that is, a bfloat16 whose exponent bits are all ones."""
    worst = (bits_BTD & 0x7FFF).max(axis=-1, initial=0)
    return int((worst >= 0x7F80).sum())


def _recomputed(
    seen: Verification, store: ActivationStore, recompute: Recompute, sample: int, seed: int, tolerance: float
) -> Verification:
    findings, identical, rows_done, worst = [], 0, 0, 0.0
    batches = _batches(store)
    order = np.random.default_rng(seed).permutation(len(batches))
    sizes = np.cumsum([len(batches[at][0]) for at in order])
    chosen = order[: int(np.searchsorted(sizes, sample)) + 1]
    with progress("recomputing rows", len(chosen), unit="batches") as bar:
        for at in sorted(chosen.tolist()):
            rows, execution = batches[at]
            block = _block(store, rows)
            differences = _differences(recompute(block, execution), store.rows(rows.start, rows.stop), block)
            identical += int((differences == 0).sum())
            rows_done += len(rows)
            worst = max(worst, float(differences.max()))
            for row, difference in zip(rows, differences.tolist(), strict=True):
                if not difference <= tolerance:
                    findings.append(
                        Finding(
                            f"row {row}", f"differs from the model by {difference:.2g} of the token's largest value"
                        )
                    )
            bar.advance(1)
    return Verification(seen.path, seen.rows, seen.files, seen.bytes, tuple(findings), rows_done, identical, worst)


def _batches(store: ActivationStore) -> list[tuple[range, Execution]]:
    """The batches that the extraction used: of the recorded size, and ending at the end of each shard."""
    batches = []
    for commit in latest(store.commits):
        execution = execution_of(commit, store.manifest)
        step, stop = execution.batch_size, commit.stop_row
        batches += [(range(low, min(low + step, stop)), execution) for low in range(commit.first_row, stop, step)]
    return batches


def _block(store: ActivationStore, rows: range) -> RowBlock:
    span = rows.start, rows.stop
    return RowBlock(store.tokens(*span), store.documents(*span), store.flags(*span))


def _differences(new_bits: Any, stored: torch.Tensor, block: RowBlock) -> np.ndarray:
    """The largest relative difference in every row, without padding."""
    from .format.layout import from_bits

    new, old = from_bits(np.asarray(new_bits)).float(), stored.float()
    scale = old.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    relative = (new - old).abs().amax(-1) / scale
    relative[torch.from_numpy(block.flags_BT & PADDING != 0)] = 0
    return relative.amax(-1).numpy()
