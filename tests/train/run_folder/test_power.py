"""Run folders after a power cut: nothing that was vouched for is gone, and the same command ends with the same bits."""

from __future__ import annotations

import os

import pytest
from power import Disk, PowerCut
from stores import make_store
from tcsae.train.config import OptimiserConfig
from tcsae.train.presets import build_config
from tcsae.train.run import train
from tcsae.train.run_folder.record import load_run

WEIGHTS = "sae_weights.safetensors"
OTHER = OptimiserConfig(lr=1e-3)
CUTS = 12  # of some sixty calls; benchmarks/torture.py cuts at all of them


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("cache"), rows=64, context=16, d_model=8, documents=12)


def config_for(store, out):
    return build_config(
        None,
        None,
        {
            "data.store": str(store), "data.batch_size": 60, "data.pool": 256, "sae.k": 4, "sae.width": 16,
            "run.steps": 9, "run.log_every": 2, "run.checkpoint_every": 3, "run.device": "cpu",
            "run.dtype": "float32", "run.out": str(out), "run.baseline": False, "run.name": "a",
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """Weights of a run that nothing happens to, and the calls it makes."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(out, patch)
        train(config_for(store, out))
    return (out / "a" / WEIGHTS).read_bytes(), disk


def test_nothing_is_renamed_before_it_is_on_the_disk(whole):
    assert whole[1].calls > 25
    assert whole[1].unsynced == []


def test_the_disk_forgets_what_was_not_synced(tmp_path):
    """So that the tests below can fail."""
    (tmp_path / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(tmp_path / "runs", patch, cut_at=2)
        (tmp_path / "runs/file.partial").write_text("weights")
        os.replace(tmp_path / "runs/file.partial", tmp_path / "runs/file")
        with pytest.raises(PowerCut):
            os.mkdir(tmp_path / "runs/next")
    assert disk.unsynced == [str(tmp_path / "runs/file")]
    left = set()
    for _ in range(40):
        disk.survivors(tmp_path / "after")
        left.add((tmp_path / "after/file").read_bytes() if (tmp_path / "after/file").exists() else None)
    assert left == {None, b"", bytes(7), b"weights"}


@pytest.mark.parametrize("cut", range(CUTS))
def test_after_a_power_cut_in_a_run_that_replaces_another_it_is_replaced(store, whole, tmp_path, cut):
    train(config_for(store, tmp_path / "runs").model_copy(update={"optimiser": OTHER}))
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(tmp_path / "runs", patch, cut_at=2 * cut + 1, seed=cut)
        with pytest.raises(PowerCut):
            train(config_for(store, tmp_path / "runs"), fresh=True)
    disk.survivors(tmp_path / "after")
    done = train(config_for(store, tmp_path / "after"), fresh=True)
    assert (done.runs[0] / WEIGHTS).read_bytes() == whole[0]


@pytest.mark.parametrize("cut", range(CUTS))
def test_after_a_power_cut_the_same_command_ends_with_the_same_weights(store, whole, tmp_path, cut):
    weights, calls = whole[0], whole[1].calls
    at = 1 + cut * (calls - 1) // (CUTS - 1)
    (tmp_path / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(tmp_path / "runs", patch, cut_at=at, seed=cut)
        with pytest.raises(PowerCut):
            train(config_for(store, tmp_path / "runs"))
    disk.survivors(tmp_path / "after")
    was_finished = (tmp_path / "after/a/train.json").exists() and load_run(tmp_path / "after/a").finished
    done = train(config_for(store, tmp_path / "after"))
    assert (done.runs[0] / WEIGHTS).read_bytes() == weights
    assert bool(done.skipped) == was_finished
    assert sorted(path.name for path in done.runs[0].iterdir()) == ["cfg.json", "metrics.jsonl", WEIGHTS, "train.json"]
