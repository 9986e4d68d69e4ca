"""Codes on disk are those of the SAE, for every architecture, however often the writer was killed on the way."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
import zarr
from coded_runs import KINDS, coded, random_run
from stores import grow_store, make_store
from tcsae.cache.format.layout import SPECIAL
from tcsae.cache.format.manifest import checksum
from tcsae.cache.store import ActivationStore
from tcsae.errors import ResourceError, RunError, StoreError, UsageError
from tcsae.evaluate.codes import encode as module
from tcsae.evaluate.codes.encode import EncodeConfig, encode_config, encode_run, estimate_encoding
from tcsae.evaluate.codes.format import LOCK, LOG, OUTLIER
from tcsae.evaluate.codes.store import CodeStore
from tcsae.pipeline import main
from tcsae.train.sae.protocol import RowTokens, SparseAutoencoder


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    """Many parts, none of which ends where a chunk does."""
    monkeypatch.setattr("tcsae.evaluate.codes.format._ENTRIES", 100)
    monkeypatch.setattr("tcsae.evaluate.codes.format._BOUNDS", 64)
    monkeypatch.setattr("tcsae.evaluate.codes.format._TOKENS", 7 * 16)
    monkeypatch.setattr("tcsae.evaluate.codes.writer._PART_TOKENS", 5 * 16)
    monkeypatch.setattr(module, "_DENSE_BYTES", 3 * 16 * 24 * 4)


def dense(path) -> np.ndarray:
    """All codes [R, T, F], by plain zarr."""
    group = zarr.open_group(str(path), mode="r")
    rows, context = group["tokens"].shape
    bounds, n_features = group["indptr"][:], group.attrs["tcsae_codes"]["n_features"]
    out = np.zeros((rows * context, n_features), np.float32)
    token = np.repeat(np.arange(rows * context), np.diff(bounds))
    out[token, group["features"][:]] = group["values"][:]
    return out.reshape(rows, context, n_features)


def expected(run, store, part="all") -> np.ndarray:
    opened = ActivationStore.open(store)
    x = opened.rows(0, opened.n_rows, dtype=torch.float32)
    limit = opened.statistics().norm_limit
    valid = torch.from_numpy(opened.flags(0, opened.n_rows) == 0) & (x.norm(dim=2) <= limit)
    documents = torch.from_numpy(opened.documents(0, opened.n_rows).astype(np.int64))
    with torch.no_grad():
        out = SparseAutoencoder.load(run).token_coder().on_rows(x, RowTokens.of(valid, documents))
    return torch.where(valid[..., None], out.features if part == "all" else out.counted, 0.0).numpy()


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_the_codes_of_every_architecture(kind, tmp_path):
    run, store = coded(tmp_path, kind)
    done = encode_run(EncodeConfig(str(run)))
    found, wanted = dense(run / "codes.zarr"), expected(run, store)
    assert (wanted != 0).any()
    np.testing.assert_array_equal(found != 0, wanted != 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert (done.rows, done.entries) == (40, int((wanted != 0).sum()))


def test_only_the_sparse_part_of_codes_that_are_not_all_sparse(tmp_path):
    run, store = coded(tmp_path, ("tfa", "topk"))
    encode_run(EncodeConfig(str(run), part="sparse"))
    found = dense(run / "codes.zarr")
    np.testing.assert_allclose(found, expected(run, store, "sparse"), rtol=1e-4, atol=1e-5)
    assert ((found != 0).sum(-1) <= 3).all()


def test_what_stands_beside_the_codes_is_the_stores_text(tmp_path):
    run, path = coded(tmp_path)
    store = ActivationStore.open(path)
    encode_run(EncodeConfig(str(run)))
    data = xarray.open_zarr(str(run / "codes.zarr"), consolidated=False, chunks=None, mask_and_scale=False)
    assert dict(data.sizes) == {"row": 40, "position": 16, "bound": 641, "entry": data.sizes["entry"]}
    np.testing.assert_array_equal(data["tokens"], store.tokens(0, 40))
    np.testing.assert_array_equal(data["documents"], store.documents(0, 40))
    flags, there = data["flags"].values, store.flags(0, 40)
    np.testing.assert_array_equal(flags & ~np.uint8(OUTLIER), there)
    assert (flags[:, 0] & SPECIAL).all()


def test_parts_read_back_are_what_zarr_reads(tmp_path):
    run, _ = coded(tmp_path)
    encode_run(EncodeConfig(str(run)))
    codes, whole = CodeStore.open(run / "codes.zarr"), dense(run / "codes.zarr")
    assert len(codes.parts) > 3
    features = np.array([2, 3, 11, 23])
    for part in codes:
        for row in range(len(part.tokens_RT)):
            found = part.dense_row(row, features)
            np.testing.assert_array_equal(found, whole[part.first_row + row][:, features])
        np.testing.assert_array_equal(part.valid, part.flags_RT == 0)


KILLED = """
import os, signal
from tcsae.evaluate.codes import encode as module, format, writer
format._ENTRIES, format._BOUNDS, format._TOKENS = 100, 64, 7 * 16
writer._PART_TOKENS, module._DENSE_BYTES = 5 * 16, 3 * 16 * 24 * 4
left = [int(arguments[1])]
from tcsae.cache.storage.local import LocalPlace
def dying(method):
    def call(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args)
    return call
LocalPlace.replace, LocalPlace.append = dying(LocalPlace.replace), dying(LocalPlace.append)
module.encode_run(module.EncodeConfig(arguments[0]))
"""


def test_killed_at_any_write_the_same_command_goes_on(tmp_path, forks):
    run, store = coded(tmp_path)
    wanted = expected(run, store)
    for at in (2, 9, 16, 23, 30):
        process = forks.start(KILLED, run, at)
        assert process.wait() == -signal.SIGKILL, process.said[-500:]
        if (run / "codes.zarr" / "zarr.json").exists():
            with pytest.raises(StoreError, match="not finished: finish it with the same `pipeline encode`"):
                CodeStore.open(run / "codes.zarr")
    encode_run(EncodeConfig(str(run)))
    np.testing.assert_allclose(dense(run / "codes.zarr"), wanted, rtol=1e-5, atol=1e-6)
    assert not list(run.rglob("*.partial"))
    assert not (run / "codes.zarr" / LOCK).exists()


def test_a_line_that_was_cut_is_dropped(tmp_path):
    run, store = coded(tmp_path)
    encode_run(EncodeConfig(str(run)))
    log, group = run / "codes.zarr" / LOG, run / "codes.zarr" / "zarr.json"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    with pytest.raises(StoreError, match=r"commits.jsonl is damaged: 12 of 40 rows can be read"):
        CodeStore.open(run / "codes.zarr")
    document = json.loads(group.read_text())
    record = document["attributes"]["tcsae_codes"] | {"finished": False}
    document["attributes"] = {"tcsae_codes": record, "tcsae_check": checksum(record)}
    group.write_text(json.dumps(document))
    encode_run(EncodeConfig(str(run)))
    np.testing.assert_allclose(dense(run / "codes.zarr"), expected(run, store), rtol=1e-5, atol=1e-6)


def test_damage_is_noticed_on_reading(tmp_path):
    run, _ = coded(tmp_path)
    encode_run(EncodeConfig(str(run)))
    codes = run / "codes.zarr"
    first, second = (codes / "values" / f"c.{n}" for n in (0, 1))
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"values/c\.0 is damaged"):
        list(CodeStore.open(codes))
    first.write_bytes(second.read_bytes())  # sound by itself, in the wrong place
    with pytest.raises(StoreError, match=r"values is damaged in rows 0 to 6: write these codes again with --fresh"):
        list(CodeStore.open(codes))
    first.unlink()
    with pytest.raises(StoreError, match=r"values/c\.0 is missing"):
        list(CodeStore.open(codes))
    encode_run(EncodeConfig(str(run), fresh=True))
    assert sum(len(part.tokens_RT) for part in CodeStore.open(codes)) == 40


def test_one_writer_at_a_time(tmp_path):
    run, _ = coded(tmp_path)
    lock = run / "codes.zarr" / LOCK
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"another writer holds .*codes.zarr"):
            encode_run(EncodeConfig(str(run)))
    encode_run(EncodeConfig(str(run)))


def test_the_wrong_store_is_refused(tmp_path):
    run, _ = coded(tmp_path)
    layer = make_store(tmp_path / "a", layer=5)
    with pytest.raises(RunError, match=r"holds layer 5, width 8; .* is of layer 3, width 8: name a store of its layer"):
        encode_run(EncodeConfig(str(run), store=str(layer)))
    unfinished = random_run(tmp_path / "short", tmp_path / "l3.zarr", steps=4, finished=False)
    with pytest.raises(RunError, match="has trained 4 of 10 steps"):
        encode_run(EncodeConfig(str(unfinished)))


def test_a_store_of_another_model_is_refused(tmp_path):
    run, path = coded(tmp_path)
    record = json.loads((run / "train.json").read_text())
    record.pop("hashes")
    record["store_manifest"]["model"]["fingerprint"] = "other"
    (run / "train.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"is of another language model than .*fingerprint"):
        encode_run(EncodeConfig(str(run), store=str(path)))


def test_codes_of_another_sae_are_not_gone_on_with(tmp_path):
    run, path = coded(tmp_path)
    encode_run(EncodeConfig(str(run)))
    random_run(run, path, seed=1)
    with pytest.raises(StoreError, match=r"holds other codes \(weights: .*: choose another --out, or --fresh"):
        encode_run(EncodeConfig(str(run)))
    encode_run(EncodeConfig(str(run), fresh=True))
    np.testing.assert_allclose(dense(run / "codes.zarr"), expected(run, path), rtol=1e-5, atol=1e-6)


def test_other_files_are_left_alone(tmp_path):
    run, path = coded(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for fresh in (False, True):
        with pytest.raises(StoreError, match=r"is a folder with other things in it \(thesis.txt\)"):
            encode_run(EncodeConfig(str(run), out=str(tmp_path / "mine"), fresh=fresh))
        with pytest.raises(StoreError, match=r"is a folder with other things in it \(activations\)|holds no codes"):
            encode_run(EncodeConfig(str(run), out=str(path), fresh=fresh))
    assert ActivationStore.open(path).n_rows == 40


def test_rows_that_training_did_not_see(tmp_path):
    run, path = coded(tmp_path)
    with pytest.raises(RunError, match=r"was trained on all 40 rows of .*: say --rows all, or name a store"):
        encode_run(EncodeConfig(str(run), rows="unseen"))
    grow_store(path, 60)
    encode_run(EncodeConfig(str(run), rows="unseen", tokens=100))
    codes = CodeStore.open(run / "codes.zarr")
    assert (codes.n_rows, codes.manifest.first_row, codes.manifest.trained_rows) == (7, 40, 0)
    np.testing.assert_array_equal(next(iter(codes)).tokens_RT, ActivationStore.open(path).tokens(40, 46))
    encode_run(EncodeConfig(str(run), out=str(tmp_path / "all.zarr")))
    assert CodeStore.open(tmp_path / "all.zarr").manifest.trained_rows == 40


def test_the_plan_is_told_first_and_a_full_disk_is_a_sentence(tmp_path, monkeypatch, capsys):
    run, _ = coded(tmp_path)
    assert main(["encode", str(run), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["rows"], plan["tokens"], plan["path"]) == (40, 640, str(run / "codes.zarr"))
    assert 0 < plan["l0"] <= 3
    assert plan["bytes"] == pytest.approx(640 * (17 + 8 * plan["l0"] * 15 / 16), rel=0.2)
    assert not (run / "codes.zarr").exists()
    monkeypatch.setattr("tcsae.cache.storage.local.LocalPlace.free_bytes", lambda self: (0, 100))
    with pytest.raises(ResourceError, match=r"needs about .* and 100 B are free: free some space, or ask for fewer"):
        encode_run(EncodeConfig(str(run)))


def test_the_disk_that_fills_up_on_the_way(tmp_path, monkeypatch):
    run, store = coded(tmp_path)
    with monkeypatch.context() as patch:
        real, calls = os.replace, []

        def full(source, target):
            calls.append(target)
            if len(calls) > 25:
                raise OSError(28, "No space left on device")
            real(source, target)

        patch.setattr(os, "replace", full)
        with pytest.raises(ResourceError, match=r"codes.zarr"):
            encode_run(EncodeConfig(str(run)))
    encode_run(EncodeConfig(str(run)))
    np.testing.assert_allclose(dense(run / "codes.zarr"), expected(run, store), rtol=1e-5, atol=1e-6)


def test_options(tmp_path):
    run, _ = coded(tmp_path)
    assert encode_config(run, tokens="2k").tokens == 2000
    assert estimate_encoding(encode_config(run, tokens=32)).rows == 2
    for asked, said in (({"rows": "some"}, "--rows some"), ({"part": "x"}, "--part x"), ({"tokens": 0}, "is no text")):
        with pytest.raises(UsageError, match=said):
            encode_config(run, **asked)


def test_nothing_there(tmp_path, capsys):
    with pytest.raises(StoreError, match=r"there are no codes at .*: `pipeline encode RUN` writes them"):
        CodeStore.open(tmp_path / "codes.zarr")
    assert main(["encode", str(Path(tmp_path) / "run")]) == 1
    assert "is no training run" in capsys.readouterr().err


def test_the_documented_snippets_run(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    run, store = coded(tmp_path)
    encode_run(EncodeConfig(str(run), out=str(tmp_path / "codes.zarr")))
    monkeypatch.chdir(tmp_path)
    section = (Path(__file__).parents[3] / "docs" / "FORMAT.md").read_text().split("\n## Codes\n")[1]
    first, second = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    found = {}
    exec(first, found)
    np.testing.assert_allclose(found["z_NF"].toarray(), expected(run, store).reshape(640, -1), rtol=1e-5, atol=1e-6)
    exec(second, found)
    np.testing.assert_array_equal(found["rows"], ActivationStore.open(store).tokens(36, 40))


def test_ls_and_rm_know_codes(tmp_path, capsys):
    run, _ = coded(tmp_path)
    out = tmp_path / "elsewhere.zarr"
    encode_run(EncodeConfig(str(run), out=str(out)))
    assert main(["ls", str(tmp_path), "--kind", "codes", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["path"], entry["finished"], entry["damaged"]) == (str(out), True, False)
    assert entry["state"] == "of run, layer 3, 40 rows"
    assert main(["rm", str(out), "--yes", "--within", str(tmp_path)]) == 0
    assert not out.exists()


def test_tokens_of_conversations_count_whoever_says_them(tmp_path):
    store = make_store(tmp_path, rows=20, turns=True)
    run = random_run(tmp_path / "run", store)
    encode_run(EncodeConfig(str(run)))
    flags = ActivationStore.open(store).flags(0, 20)
    found = zarr.open_group(str(run / "codes.zarr"), mode="r")["flags"][:]
    np.testing.assert_array_equal(found & SPECIAL, flags & SPECIAL)
    assert (found == 0).sum() > 0.9 * (flags & SPECIAL == 0).sum()
    assert (dense(run / "codes.zarr")[found == 0] != 0).any(-1).all()
