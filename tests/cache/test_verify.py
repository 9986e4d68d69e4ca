"""verify finds every flipped byte in every file, values that cannot be, and rows another model would give."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from stores import make_activations, make_block, make_manifest, make_store, write_rows
from tcsae.cache.format.commit_log import LOG, parse_log
from tcsae.cache.format.layout import RowBlock
from tcsae.cache.store import ActivationStore
from tcsae.cache.verify import nonfinite_tokens, verify
from tcsae.cache.writer import StoreSetWriter
from tcsae.errors import StoreError


def flip(path, rng):
    """Flip one bit of one file, files chosen evenly; returns how to undo it."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
    file = files[rng.integers(len(files))]
    data = bytearray(file.read_bytes())
    before = bytes(data)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    file.write_bytes(data)
    return file, before, bytes(data)


def harmless(file, before, after):
    """The one exemption: JSON that still says the same."""
    try:
        return file.name.endswith(".json") and json.loads(before) == json.loads(after)
    except ValueError:
        return False


def found(path):
    """Whether the damage is seen by verify or refused when reading."""
    try:
        return not verify(path).ok
    except StoreError:
        return True


def flips(path, n, seed):
    rng = np.random.default_rng(seed)
    missed = []
    for _ in range(n):
        file, before, after = flip(path, rng)
        if not found(path) and not harmless(file, before, after):
            missed.append((file.name, [i for i in range(len(before)) if before[i] != after[i]]))
        file.write_bytes(before)
    assert not missed
    assert verify(path).ok


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_every_flipped_bit_is_found(tmp_path, compression):
    path = make_store(tmp_path, rows=20, compression=compression)
    ActivationStore.open(path).statistics()
    flips(path, 100, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_one_of_a_thousand_flipped_bits_is_found(tmp_path):
    path = make_store(tmp_path, rows=61, d_model=32)
    ActivationStore.open(path).statistics()
    flips(path, 1000, seed=1)


def test_what_should_not_be_there(tmp_path):
    path = make_store(tmp_path, rows=20)
    (path / "activations/c.9.0.0").write_bytes(b"x")
    (path / "notes.txt").write_text("x")
    (path / "tokens/zarr.json").unlink()
    assert {f.file for f in verify(path).findings} == {"activations/c.9.0.0", "notes.txt", "tokens/zarr.json"}


def test_an_unfinished_store_is_not_sound_yet(tmp_path):
    seen = verify(make_store(tmp_path, rows=20, finish=False))
    assert [f.problem for f in seen.findings] == ["holds 20 of 20 rows: finish it with the same extract command"]


def test_values_that_cannot_be(tmp_path):
    block = make_block(20, 16)
    bits = make_activations(block, 8)
    bits[3, 4, 5] = 0x7F80  # +Inf
    bits[17, 4, :] = 0xFFFF  # a hole
    tokens, documents = block.tokens_BT.copy(), block.documents_BT.copy()
    tokens[2, 2], documents[18, 1] = 300, -1
    path = tmp_path / "l3.zarr"
    with StoreSetWriter.open({3: path}, {3: make_manifest(planned_rows=20)}) as writer:
        write_rows(writer, RowBlock(tokens, documents, block.flags_BT), {3: bits})
    assert [(f.file, f.problem) for f in verify(path).findings] == [
        ("activations/c.0.0.0", "holds NaN or Inf at 1 tokens"),
        ("tokens/c.0.0", "holds tokens outside the vocabulary of 300"),
        ("activations/c.1.0.0", "holds NaN or Inf at 1 tokens"),
        ("documents/c.1.0", "holds negative document numbers"),
    ]


@pytest.mark.parametrize("chunks", [0, 1])
def test_hashes_that_only_our_reader_compares_are_verified(tmp_path, chunks):
    """A sound line with a wrong hash of a chunk: any Zarr reader reads the store, ours refuses, so verify must tell."""
    path = make_store(tmp_path, rows=20)
    log = path / LOG
    first, second = parse_log(log.read_bytes())[0]
    file = first.files["activations"]
    wrong = replace(file, chunks=("0" * 16, *file.chunks[1:]) if chunks else ())
    log.write_bytes(replace(first, files={**first.files, "activations": wrong}).to_line() + second.to_line())
    [finding] = verify(path).findings
    assert (
        "bytes are not those that were committed" if chunks else "0 chunk hashes for the 4 chunks"
    ) in finding.problem


def test_nonfinite_bits_are_what_torch_says():
    bits = np.arange(65536, dtype=np.uint16).reshape(1, 65536, 1)
    finite = torch.from_numpy(bits.copy()).view(torch.bfloat16).float().isfinite()
    assert nonfinite_tokens(bits) == int((~finite).sum())


def test_rows_are_run_again_in_the_recorded_batches(tmp_path):
    path = make_store(tmp_path, rows=61)
    block = make_block(61, 16)
    truth = make_activations(block, 8)
    sizes, asked = [], []

    def model(part, execution):
        sizes.append(execution.batch_size)
        row = next(i for i in range(61) if np.array_equal(block.tokens_BT[i], part.tokens_BT[0]))
        asked.append((row, len(part)))
        return truth[row : row + len(part)]

    seen = verify(path, recompute=model, sample=9, seed=1)
    assert seen.ok
    assert (seen.rows_identical, seen.worst_difference) == (seen.rows_recomputed, 0.0)
    assert 9 <= seen.rows_recomputed <= 12
    assert set(sizes) == {4}
    assert all(row % 4 == 0 for row, _ in asked)


@pytest.mark.parametrize(("bit", "ok"), [(0, True), (5, False)])
def test_a_rounding_is_reported_and_another_model_found(tmp_path, bit, ok):
    path = make_store(tmp_path, rows=16)
    truth = make_activations(make_block(16, 16), 8)
    truth[:, 3, :] ^= 1 << bit
    everything = verify(path, recompute=serve(truth), sample=16)
    assert everything.ok is ok
    assert everything.rows_identical == 0
    assert (everything.worst_difference > 2**-5) is not ok
    assert [f.file for f in everything.findings] == ([] if ok else [f"row {n}" for n in range(16)])


def serve(truth):
    block = make_block(16, 16)

    def model(part, _):
        row = next(i for i in range(16) if np.array_equal(block.tokens_BT[i], part.tokens_BT[0]))
        return truth[row : row + len(part)]

    return model
