"""Damage to a run folder is noticed on reading and named; where an older checkpoint can heal it, it does."""

from __future__ import annotations

import json
import random
import shutil
import zipfile

import pytest
from saes import random_sae
from stores import make_store
from tcsae.console import speaking
from tcsae.errors import RunError, UsageError
from tcsae.train.formats.export import export
from tcsae.train.loop.batches import BatchReader
from tcsae.train.presets import build_config
from tcsae.train.run import train
from tcsae.train.run_folder.record import find_runs, load_run
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE

WEIGHTS = "sae_weights.safetensors"


@pytest.fixture(autouse=True)
def _speaking():
    with speaking(True):
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("cache"), rows=64, context=16, d_model=8, documents=12)


def config_for(store, out, **more):
    small = {
        "data.store": str(store), "data.batch_size": 60, "data.pool": 256, "sae.k": 4, "sae.width": 16,
        "run.steps": 9, "run.log_every": 2, "run.checkpoint_every": 3, "run.device": "cpu", "run.dtype": "float32",
        "run.out": str(out), "run.baseline": False, "run.name": "a",
    }  # fmt: skip
    return build_config(None, None, small | {key.replace("__", "."): value for key, value in more.items()})


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    return train(config_for(store, tmp_path_factory.mktemp("runs"))).runs[0]


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def unfinished(store, tmp_path_factory):
    """Killed in step 8, with checkpoints of steps 3 and 6."""
    out, seen, real = tmp_path_factory.mktemp("runs"), [], BatchReader.next_batches

    def next_batches(self):
        seen.append(1)
        if len(seen) == 8:
            raise Killed
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchReader, "next_batches", next_batches)
        with pytest.raises(Killed):
            train(config_for(store, out))
    return out / "a"


def flip(file, seed):
    """Invert one bit, anywhere."""
    dice, content = random.Random(seed), bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["train.json", "cfg.json", WEIGHTS])
@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_in_a_finished_run_is_named(finished, tmp_path, name, seed):
    shutil.copytree(finished, tmp_path / "a")
    flip(tmp_path / "a" / name, seed)
    for read in (TemporalSAE.load, lambda path: export(path, "saelens", tmp_path / "out")):
        with pytest.raises(RunError, match=name) as caught:
            read(tmp_path / "a")
        assert "\n" not in str(caught.value)
    assert find_runs(tmp_path) == [tmp_path / "a"]  # so that an evaluation says so


@pytest.mark.parametrize("name", ["step-0000000006.pt", "step-0000000006.pt.xxh3"])
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    store, finished, unfinished, tmp_path, capsys, name, seed
):
    shutil.copytree(unfinished, tmp_path / "a")
    flip(tmp_path / "a" / "checkpoint" / name, seed)
    done = train(config_for(store, tmp_path))
    said = capsys.readouterr().err
    assert "step-0000000006.pt is damaged and was removed" in said
    assert "going on from step 3" in said
    assert (done.runs[0] / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_a_checkpoint_without_a_hash_is_held_to_its_own_sums(store, finished, unfinished, tmp_path, capsys, seed):
    for name in ("sound", "damaged"):
        shutil.copytree(unfinished, tmp_path / name / "a")
        for file in (tmp_path / name / "a/checkpoint").glob("*.xxh3"):
            file.unlink()
    file = tmp_path / "damaged/a/checkpoint/step-0000000006.pt"
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        at = archive.read(largest)[10:30]
    content = bytearray(file.read_bytes())
    content[content.index(at) + seed] ^= 16
    file.write_bytes(content)
    for name, step in (("sound", 6), ("damaged", 3)):
        done = train(config_for(store, tmp_path / name))
        assert f"going on from step {step}" in capsys.readouterr().err
        assert (done.runs[0] / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_without_a_sound_checkpoint_a_run_begins_again_and_says_so(store, finished, unfinished, tmp_path, capsys):
    shutil.copytree(unfinished, tmp_path / "a")
    for file in (tmp_path / "a/checkpoint").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    done = train(config_for(store, tmp_path))
    assert "has no sound checkpoint: it begins again" in capsys.readouterr().err
    assert (done.runs[0] / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("back", "bit"), [(32, 0), (30, 7), (75, 3)])
def test_a_checkpoint_without_a_hash_must_open(store, finished, unfinished, tmp_path, capsys, back, bit):
    """Bits of the archive's end that its own sums do not cover, though torch cannot open it without them."""
    shutil.copytree(unfinished, tmp_path / "a")
    for file in (tmp_path / "a/checkpoint").glob("*.xxh3"):
        file.unlink()
    file = tmp_path / "a/checkpoint/step-0000000006.pt"
    content = bytearray(file.read_bytes())
    content[-back] ^= 1 << bit
    file.write_bytes(content)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    done = train(config_for(store, tmp_path))
    assert "step-0000000006.pt is damaged and was removed" in capsys.readouterr().err
    assert (done.runs[0] / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_records_without_hashes_open_and_edits_are_refused_with_the_way_out(finished, tmp_path):
    record = json.loads((finished / "train.json").read_text())
    assert set(record["hashes"]) == {"train.json", "cfg.json", WEIGHTS}
    (tmp_path / "train.json").write_text(json.dumps(record | {"seed": 5}))
    with pytest.raises(RunError, match="take 'hashes' out of it"):
        load_run(tmp_path)
    del record["hashes"]
    (tmp_path / "train.json").write_text(json.dumps(record | {"seed": 5}))
    assert load_run(tmp_path).seed == 5


def test_a_missing_file_of_a_finished_run_is_named(store, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).unlink()
    for use in (TemporalSAE.load, lambda path: train(config_for(store, tmp_path))):
        with pytest.raises(RunError, match=f"{WEIGHTS} is missing: .* --fresh"):
            use(tmp_path / "a")
    assert (train(config_for(store, tmp_path), fresh=True).runs[0] / WEIGHTS).exists()


def test_checkpoints_that_a_killed_process_left_in_a_finished_run_are_removed(store, finished, unfinished, tmp_path):
    shutil.copytree(finished, tmp_path / "a")
    shutil.copytree(unfinished / "checkpoint", tmp_path / "a/checkpoint")
    (tmp_path / "a/train.json.00000000.partial").write_text("{")
    done = train(config_for(store, tmp_path))
    assert done.skipped == done.runs
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "cfg.json",
        "metrics.jsonl",
        WEIGHTS,
        "train.json",
    ]


def test_a_folder_that_is_no_run_is_not_written_into(store, tmp_path):
    random_sae(Activation("topk", k=3)).save(tmp_path / "a")  # an SAE of other making has the same files
    with pytest.raises(RunError, match=r"is no training run and holds other files \(cfg.json\): give another --name"):
        train(config_for(store, tmp_path))
    (tmp_path / "b").write_text("a file")
    with pytest.raises(RunError, match="is a file: give another --name"):
        train(config_for(store, tmp_path, run__name="b"))


@pytest.mark.parametrize("name", ["..", "../a", "a/b", "/tmp/a", "a\nb", "x" * 300])
def test_a_name_stays_inside_its_folder(store, tmp_path, name):
    with pytest.raises(UsageError, match="--name"):
        train(config_for(store, tmp_path / "runs", run__name=name))
    assert list(tmp_path.iterdir()) == []
