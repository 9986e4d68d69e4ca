"""Training is a pure function of store, configuration and seed: golden, resumed, swept and twinned alike."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from stores import grow_store, make_store
from tcsae import pipeline
from tcsae.cache.format.layout import of_role
from tcsae.cache.store import ActivationStore
from tcsae.errors import ResourceError, RunError, StoreError, UsageError
from tcsae.train import passes, run
from tcsae.train.loop import memory_plan, trainer
from tcsae.train.loop.alarms import MemberError
from tcsae.train.loop.batches import BatchReader
from tcsae.train.presets import build_config
from tcsae.train.run_folder.checkpoint import checkpoints
from tcsae.train.run_folder.metrics_log import read_metrics
from tcsae.train.run_folder.record import find_runs, load_run
from tcsae.train.sae.protocol import SparseAutoencoder
from tcsae.train.sae.temporal_sae import TemporalSAE

WEIGHTS = "sae_weights.safetensors"
BASE = {
    "data.batch_size": 60, "data.pool": 256, "sae.k": 4, "sae.width": 32, "run.steps": 20, "run.log_every": 5,
    "run.checkpoint_every": 7, "run.device": "cpu", "run.dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("cache"), rows=64, context=16, d_model=8, documents=12)


def config_for(store, out, preset=None, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return build_config(preset, None, BASE | {"data.store": str(store), "run.out": str(out)} | dotted)


def weights(folder) -> bytes:
    return (Path(folder) / WEIGHTS).read_bytes()


def curve(folder, key="loss"):
    return [entry[key] for entry in read_metrics(Path(folder))]


# 20 steps, logged every 5, on the store above; float32 on one thread
GOLDEN = {
    "modern": ("l3-topk4-pairwise0.03-w5-s0", [4.23276, 4.09052, 4.85597, 3.58557]),
    "paper": ("l3-relu0.04-pairwise0.1-w5-s0", [68.11105, 65.5928, 60.0881, 60.10437]),
}


@pytest.mark.parametrize("preset", GOLDEN)
def test_golden_curve(store, tmp_path, preset):
    run.train(config_for(store, tmp_path, preset))
    name, expected = GOLDEN[preset]
    assert curve(tmp_path / name) == pytest.approx(expected, rel=1e-4)


def test_a_run_folder_holds_sae_record_and_metrics_and_nothing_else(store, tmp_path):
    done = run.train(config_for(store, tmp_path))
    tc, twin = done.runs
    assert [path.name for path in find_runs(tmp_path)] == sorted([tc.name, twin.name])
    assert {file.name for file in tc.iterdir()} == {"cfg.json", WEIGHTS, "train.json", "metrics.jsonl"}
    record = load_run(tc)
    assert (record.role, record.twin, load_run(twin).role, load_run(twin).twin) == ("tc", twin.name, "twin", tc.name)
    assert (record.steps, record.tokens, record.finished, record.layer) == (20, 20 * 60, True, 3)
    opened = ActivationStore.open(store)
    assert record.store_fingerprint == opened.fingerprint()
    assert record.store_manifest["model"]["id"] == opened.manifest.model.id
    metadata = json.loads((tc / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"], metadata["layer"]) == ("tiny", "blocks.3.hook_resid_post", 3)
    assert (metadata["context_size"], metadata["prepend_bos"]) == (16, True)
    assert record.metrics["explained_variance"] == read_metrics(tc)[-1]["explained_variance"]


def test_the_saved_sae_takes_raw_activations(store, tmp_path):
    done = run.train(config_for(store, tmp_path, run__steps=300, optimiser__lr=3e-3, run__log_every=300))
    sae = TemporalSAE.load(done.runs[0])
    statistics = ActivationStore.open(store).statistics()
    assert load_run(done.runs[0]).input_scale == pytest.approx(statistics.rms_scale)
    x = ActivationStore.open(store).rows(0, 64, dtype=torch.float32)[:, 1:]
    mean = torch.from_numpy(statistics.mean_D).float()
    unexplained = (x - sae(x).reconstruction).pow(2).sum() / (x - mean).pow(2).sum()
    assert 1 - unexplained > 0.5
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((32,), 1 / statistics.rms_scale), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_the_first_of_nested_groups_learns_to_reconstruct_by_itself(store, tmp_path, kind):
    about = {"sae__architecture": "gated"} if kind == "gated" else {"sae__activation": kind}
    about |= {
        "run__steps": 150,
        "optimiser__lr": 3e-3,
        "run__baseline": False,
        "temporal__scope": 0.25,
        "loss__l1": 0.02,
    }
    found = []
    for groups in ("0.25,1", "1"):
        (path,) = run.train(config_for(store, tmp_path / groups, sae__groups=groups, **about)).runs
        sae = SparseAutoencoder.load(path)
        x = ActivationStore.open(store).rows(0, 64, dtype=torch.float32)[:, 1:]
        first = sae.encode(x) * (torch.arange(32) < 8)
        found.append((x - sae.decode(first)).pow(2).sum(-1).mean().item())
        assert sae.prefix_sizes == ((8, 32) if groups == "0.25,1" else (32,))
        last = load_run(path).metrics
        assert last["explained_variance"] > 0.2
        assert last["reconstruction"] > 0
    assert found[0] < 0.85 * found[1]


def test_members_with_other_views_share_the_read_and_are_what_they_are_alone(store, tmp_path, chunks_read):
    ActivationStore.open(store).statistics()  # which reads it, too, the first time
    chunks_read.clear()
    grid = {"temporal.partner": ["next", "earlier"], "data.window": ["3", "5"]}
    shared = run.train(config_for(store, tmp_path / "shared", run__baseline=False), sweep=grid)
    assert len(shared.runs) == 3  # windows of 3, of 5, and pairs, which know no window
    chunks_shared = sum(chunks_read)
    for change in ({"data__window": 3}, {"data__window": 5}, {"temporal__partner": "earlier"}):
        chunks_read.clear()
        (alone,) = run.train(config_for(store, tmp_path / "alone", run__baseline=False, **change)).runs
        assert weights(tmp_path / "shared" / alone.name) == weights(alone)
        assert sum(chunks_read) == chunks_shared


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "jumprelu quadratic", "gated"])
def test_l0_lands_where_it_is_told(store, tmp_path, kind):
    activation, _, penalty = kind.partition(" ")
    about = {"sae__architecture": "gated"} if kind == "gated" else {"sae__activation": activation}
    about |= {"loss__l0_penalty": penalty} if penalty else {}
    about |= {"loss__target_l0": 5, "run__steps": 800, "run__log_every": 5, "optimiser__lr": 1e-3}
    about |= {"data__batch_size": 240, "data__pool": 1024, "temporal__weight": 0.1}
    for path in run.train(config_for(store, tmp_path, **about)).runs:  # the twin too
        last = [entry["l0"] for entry in read_metrics(path)[-10:]]
        assert sum(last) / len(last) == pytest.approx(5, rel=0.03)
        moved = {entry.get("l0_aim", entry["sparsity_weight"]) for entry in read_metrics(path)}
        assert len(moved) > 100
        assert kind.replace("quadratic", "-l0-5-quadratic").replace(" ", "") in path.name or "-l0-5" in path.name


def test_a_target_that_was_missed_is_said(store, tmp_path, capsys):
    about = {"sae__activation": "relu", "loss__target_l0": 4, "run__baseline": False}
    run.train(config_for(store, tmp_path / "a", **about))
    assert "% from the target 4: train for more steps, or begin at another --l1" in capsys.readouterr().err
    run.train(config_for(store, tmp_path / "b", run__steps=4, **about))
    assert "the run is too short to bring L0 to the target 4" in capsys.readouterr().err


def test_default_length_is_the_store_once_and_tokens_set_it(store, tmp_path):
    counted = ActivationStore.open(store).statistics().n_tokens
    done = run.train(config_for(store, tmp_path / "a", run__steps=0, run__baseline=False))
    assert done.steps == counted // 60
    done = run.train(config_for(store, tmp_path / "b", run__steps=0, run__tokens=600, run__baseline=False))
    assert done.steps == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"sae__activation": "topk", "loss__dead_after": 300},
        {"sae__activation": "batchtopk"},
        {"sae__activation": "jumprelu", "temporal__form": "cosine"},
        {"sae__activation": "relu", "loss__l1": 0.1, "optimiser__name": "adam", "temporal__partner": "shuffled"},
        {"sae__activation": "batchtopk", "sae__groups": "0.2,1", "loss__dead_after": 300},
        {"sae__activation": "relu", "loss__target_l0": 4},
        {"temporal__per_feature": "autocorrelation"},
        {"temporal__per_feature": "density", "temporal__form": "l1", "sae__activation": "batchtopk"},
        {"sae__activation": "jumprelu", "loss__target_l0": 4, "loss__l0_penalty": "quadratic"},
        {"sae__architecture": "gated", "loss__target_l0": 4},
        {"preset": "paper"},
    ],
    ids=[
        "topk-aux",
        "batchtopk",
        "jumprelu",
        "relu-adam",
        "nested",
        "l0",
        "autocorrelation",
        "density",
        "l0-jumprelu",
        "l0-gated",
        "paper",
    ],
)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(store, tmp_path, monkeypatch, changes):
    whole = run.train(config_for(store, tmp_path / "whole", **changes))
    halted = config_for(store, tmp_path / "parts", **changes)
    for batches in (9, 10):  # after steps 9 and 17, between checkpoints (7, 14): the steps since are done again
        pull_the_plug(halted, monkeypatch, after=batches)
    resumed = run.train(halted)
    for a, b in zip(whole.runs, resumed.runs, strict=True):
        assert weights(a) == weights(b)
        assert [entry["step"] for entry in read_metrics(b)] == [5, 10, 15, 20]
        assert curve(a) == curve(b)
        assert not (b / "checkpoint").exists()


def pull_the_plug(config, monkeypatch, *, after):
    """Train until so many batches were read, then fail as a power cut would: nothing is cleaned up or written."""
    real, calls = BatchReader.next_batches, []

    def next_batches(self):
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("pulled the plug")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(BatchReader, "next_batches", next_batches)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            run.train(config)


@pytest.mark.parametrize(("minutes", "kept"), [(5.0, 15), (7.0, 10), (0.0, None), (60.0, None)])
def test_a_checkpoint_is_written_by_time_too(store, tmp_path, monkeypatch, minutes, kept):
    """A clock on which a step takes 61 seconds, and nothing else takes time."""
    real, now = BatchReader.next_batches, [0.0]

    def next_batches(self):
        now[0] += 61
        return real(self)

    monkeypatch.setattr(BatchReader, "next_batches", next_batches)
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])
    often = {"run__checkpoint_every": 1000, "run__checkpoint_minutes": minutes}
    config = config_for(store, tmp_path, run__steps=20, run__baseline=False, **often)
    pull_the_plug(config, monkeypatch, after=18)
    (path,) = tmp_path.iterdir()
    assert max(checkpoints(path), default=None) == kept


def test_killed_processes_resume_to_the_same_bits(store, tmp_path, forks):
    whole = run.train(config_for(store, tmp_path / "whole", run__steps=250, run__log_every=1, run__checkpoint_every=23))
    config = config_for(store, tmp_path / "parts", run__steps=250, run__log_every=1, run__checkpoint_every=23)
    code = (
        "import json; from tcsae.train.presets import validated; from tcsae.train.run import train\n"
        "train(validated(json.loads(arguments[0])))"
    )
    metrics = tmp_path / "parts" / whole.runs[0].name / "metrics.jsonl"
    for target in (40, 120):  # lines of metrics to wait for, so that the kill falls at a random step after it
        process = forks.start(code, config.model_dump_json())
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < target:
            assert process.runs(), process.said
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert checkpoints(metrics.parent)
    assert forks.start(code, config.model_dump_json()).wait() == 0
    for path in whole.runs:
        other = tmp_path / "parts" / path.name
        assert weights(path) == weights(other)
        assert curve(path) == curve(other)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_writes_a_checkpoint_and_says_so(store, tmp_path, monkeypatch, name):
    real = BatchReader.next_batches
    calls = []

    def next_batches(self):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), getattr(signal, name))
        return real(self)

    monkeypatch.setattr(BatchReader, "next_batches", next_batches)
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(KeyboardInterrupt, match="step 5; the same command goes on"):
        run.train(config_for(store, tmp_path))
    assert signal.getsignal(getattr(signal, name)) is before
    folders = sorted(tmp_path.iterdir())
    assert [checkpoints(folder) for folder in folders] == [[5], [5]]
    assert find_runs(tmp_path) == []


def test_at_most_two_checkpoints_are_kept(store, tmp_path, monkeypatch):
    pull_the_plug(config_for(store, tmp_path, run__checkpoint_every=5), monkeypatch, after=18)
    assert checkpoints(tmp_path / "l3-topk4-none-s0") == [10, 15]


def test_members_killed_between_two_checkpoint_files_go_on_from_the_common_one(store, tmp_path, monkeypatch):
    whole = run.train(config_for(store, tmp_path / "whole"))
    config = config_for(store, tmp_path / "parts")
    pull_the_plug(config, monkeypatch, after=15)
    twin = tmp_path / "parts" / "l3-topk4-none-s0"
    (twin / "checkpoint" / "step-0000000014.pt").unlink()
    resumed = run.train(config)
    assert [weights(a) for a in whole.runs] == [weights(b) for b in resumed.runs]


def test_the_twin_equals_a_run_without_the_term(store, tmp_path):
    pair = run.train(config_for(store, tmp_path / "pair"))
    alone = run.train(config_for(store, tmp_path / "alone", temporal__form="none"))
    assert [path.name for path in alone.runs] == [pair.runs[1].name]
    assert weights(pair.runs[1]) == weights(alone.runs[0])
    assert weights(pair.runs[0]) != weights(alone.runs[0])
    assert load_run(alone.runs[0]).role == "tc"


def test_every_member_of_a_sweep_equals_its_configuration_alone(store, tmp_path):
    grid = {"temporal.weight": ("0", "0.1"), "run.seed": ("0", "1"), "sae.width": ("16", "32")}
    swept = run.train(config_for(store, tmp_path / "sweep"), sweep=grid)
    names = {path.name for path in swept.runs}
    assert len(names) == 8
    alone = config_for(store, tmp_path / "alone", temporal__weight=0.1, run__seed=1, sae__width=16)
    for path in run.train(alone).runs:
        other = path.name.replace("-s1", "-width16-s1")
        assert weights(path) == weights(tmp_path / "sweep" / other)


def test_a_sweep_that_does_not_fit_is_split_and_gives_the_same(store, tmp_path, monkeypatch):
    grid = {"run.seed": ("0", "1", "2")}
    whole = run.train(config_for(store, tmp_path / "whole"), sweep=grid)
    plans = []
    real = passes.split_passes
    monkeypatch.setattr(passes, "available_bytes", lambda _: 80_000)
    monkeypatch.setattr(passes, "split_passes", lambda *args: plans.append(real(*args)) or plans[-1])
    split = run.train(config_for(store, tmp_path / "split"), sweep=grid)
    assert len(plans[0]) > 1
    assert [weights(path) for path in whole.runs] == [weights(path) for path in split.runs]
    monkeypatch.setattr(passes, "available_bytes", lambda _: 10_000)
    with pytest.raises(ResourceError, match=r"needs .* are free: give a smaller --width"):
        run.train(config_for(store, tmp_path / "never"))


def test_windows_of_several_lengths_get_a_stream_each(store, tmp_path):
    swept = run.train(config_for(store, tmp_path / "sweep"), sweep={"data.window": ("2", "5")})
    alone = run.train(config_for(store, tmp_path / "alone", data__window=2))
    assert weights(tmp_path / "sweep" / alone.runs[0].name) == weights(alone.runs[0])
    assert len(swept.runs) == 4


def test_finished_runs_are_kept_and_replaced_only_when_asked(store, tmp_path):
    first = run.train(config_for(store, tmp_path))
    before = (first.runs[0] / WEIGHTS).stat().st_mtime_ns
    again = run.train(config_for(store, tmp_path))
    assert again.skipped == first.runs
    assert (first.runs[0] / WEIGHTS).stat().st_mtime_ns == before
    with pytest.raises(RunError, match=r"optimiser.lr was 0.0003 and is now 0.01; give another --name"):
        run.train(config_for(store, tmp_path, optimiser__lr=0.01))
    run.train(config_for(store, tmp_path, optimiser__lr=0.01), fresh=True)
    assert load_run(first.runs[0]).config["optimiser"]["lr"] == 0.01


def test_another_store_under_the_same_name_is_refused(store, tmp_path):
    run.train(config_for(store, tmp_path / "runs"))
    other = make_store(tmp_path / "cache", rows=64, context=16, d_model=8, documents=12, seed=1)
    with pytest.raises(RunError, match=r"are not those that .* was trained on"):
        run.train(config_for(other, tmp_path / "runs"))


def test_a_store_that_grows_leaves_unfinished_runs_as_they_were(tmp_path, monkeypatch):
    same = {"rows": 64, "context": 16, "d_model": 8, "documents": 12}
    whole = run.train(config_for(make_store(tmp_path / "a", **same), tmp_path / "whole", run__steps=0))
    store = make_store(tmp_path / "b", **same)
    config = config_for(store, tmp_path / "parts", run__steps=0)
    pull_the_plug(config, monkeypatch, after=9)
    grow_store(store, 96)
    resumed = run.train(config)
    assert (resumed.steps, load_run(resumed.runs[0]).store_rows) == (whole.steps, 64)
    assert [weights(a) for a in whole.runs] == [weights(b) for b in resumed.runs]
    assert run.train(config).skipped == resumed.runs


def test_a_loss_that_is_not_finite_stops_the_run_naming_term_and_step(store, tmp_path):
    with pytest.raises(RunError, match=r"the reconstruction term of .* is not finite at step \d+ .*use a smaller --lr"):
        run.train(
            config_for(
                store, tmp_path, optimiser__lr=1e30, optimiser__warmup=0, optimiser__clip=0.0, sae__decoder="free"
            )
        )


def test_weights_that_are_not_finite_are_never_checkpointed(store, tmp_path, monkeypatch):
    real = trainer.Pass.checkpoint

    def poisoned(self):
        with torch.no_grad():
            self.members[-1].sae.W_dec[0, 0] = float("nan")
        real(self)

    monkeypatch.setattr(trainer.Pass, "checkpoint", poisoned)
    with pytest.raises(RunError, match="the weights of l3-topk4-none-s0 are not finite at step 7: use a smaller --lr"):
        run.train(config_for(store, tmp_path, temporal__form="none"))
    assert not list(tmp_path.glob("*/checkpoint/*.pt"))


def test_a_member_that_fails_is_left_out_and_the_others_are_what_they_are_without_it(store, tmp_path, monkeypatch):
    grid = {"run.seed": ["0", "1", "2"]}
    whole = run.train(config_for(store, tmp_path / "whole", run__baseline=False), sweep=grid)
    real, failing = trainer.check_finite, "l3-topk4-pairwise0.03-w5-s1"

    def fails(member, update, batch):
        if member.plan.name == failing and member.step == 12:
            raise MemberError(f"{failing} came to nothing")
        real(member, update, batch)

    monkeypatch.setattr(trainer, "check_finite", fails)
    config = config_for(store, tmp_path / "part", run__baseline=False)
    done = run.train(config, sweep=grid)
    assert done.failures == {failing: f"{failing} came to nothing"}
    assert [path.name[-2:] for path in done.runs] == ["s0", "s2"]
    for path in done.runs:
        assert weights(path) == weights(tmp_path / "whole" / path.name)
        assert curve(path) == curve(tmp_path / "whole" / path.name)
    assert load_run(tmp_path / "part" / failing).failure == f"{failing} came to nothing"
    assert [path.name for path in find_runs(tmp_path / "part")] == [path.name for path in done.runs]
    monkeypatch.setattr(trainer.Pass, "run", lambda *_: pytest.fail("what failed is not tried again"))
    assert run.train(config, sweep=grid).failures == done.failures
    monkeypatch.undo()
    assert len(run.train(config, sweep=grid, fresh=True).runs) == len(whole.runs) == 3


def test_a_sweep_with_a_failure_ends_with_status_1(store, tmp_path, capsys):
    options = [
        "--store",
        str(store),
        "--out",
        str(tmp_path),
        "--no-baseline",
        "--steps",
        "6",
        "--width",
        "32",
        "--k",
        "4",
    ]
    options += ["--batch-size", "60", "--device", "cpu", "--dtype", "float32", "--warmup", "0", "--json"]
    assert pipeline.main(["train", *options, "--sweep", "lr=0.001,1e30"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (len(found["runs"]), len(found["failures"])) == (1, 1)


def test_configurations_that_train_together_agree_in_what_a_pass_has_once(store, tmp_path):
    pair = [config_for(store, tmp_path), config_for(store, tmp_path, run__checkpoint_every=3, run__name="b")]
    with pytest.raises(UsageError, match=r"run.checkpoint_every is the same for all that train together, not 7 and 3"):
        run.train(pair)


def test_a_device_without_memory_is_one_sentence(store, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer.Stack, "train_step", full)
    with pytest.raises(
        ResourceError, match=r"cpu ran out of memory with 2 SAEs and batches of 60 tokens: .* smaller --batch-s"
    ):
        run.train(config_for(store, tmp_path))


def test_shares_are_of_the_loss_as_it_was_minimised_warm_ups_included(store, tmp_path):
    warming = {"sae__activation": "relu", "loss__l1": 5.0, "loss__l1_warmup": 1.0, "temporal__warmup": 1.0}
    run.train(config_for(store, tmp_path, temporal__weight=2.0, **warming))
    (folder,) = tmp_path.glob("*pairwise*")
    for entry in read_metrics(folder):
        shares = [entry[f"{name}_share"] for name in ("reconstruction", "sparsity", "temporal", "auxiliary")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_inputs_that_are_not_finite_are_blamed_on_their_rows(store, tmp_path, monkeypatch):
    real = BatchReader.next_batches

    def poisoned(self):
        batches = real(self)
        (batch,) = batches.values()
        batch.x_NWD[3, 1, 2] = float("nan")
        poisoned.row = int(batch.rows_N[3])
        return batches

    monkeypatch.setattr(BatchReader, "next_batches", poisoned)
    with pytest.raises(RunError, match=r"rows .* of the store hold NaN") as caught:
        run.train(config_for(store, tmp_path))
    assert f"rows {poisoned.row} of" in str(caught.value)


def test_a_dictionary_that_dies_is_reported_once(store, tmp_path, capsys):
    run.train(
        config_for(
            store, tmp_path, sae__activation="relu", loss__l1=1e4, optimiser__lr=0.1, run__baseline=False, run__steps=60
        )
    )
    assert capsys.readouterr().err.count("collapse at step") == 1
    lines = next(tmp_path.iterdir()).joinpath("metrics.jsonl").read_text().splitlines()
    assert sum("alarm" in json.loads(line) for line in lines) == 1


def test_missing_things_are_one_sentence(store, tmp_path):
    with pytest.raises(UsageError, match="give --store"):
        run.train(build_config())
    with pytest.raises(StoreError):
        run.train(config_for(tmp_path / "nothing", tmp_path))
    with pytest.raises(UsageError, match="no usable CUDA device"):
        run.train(config_for(store, tmp_path, run__device="cuda:7"))
    with pytest.raises(RunError, match=r"cannot make the folder .* choose another place"):
        run.train(config_for(store, "/proc/nowhere"))


def test_memory_is_estimated_from_what_a_member_keeps(store):
    from tcsae.train.plan import plan_members

    (plan,) = plan_members(config_for(store, "x", run__baseline=False), {}, layer=3, d_model=8, n_tokens=100)
    assert plan.n_parameters == sum(p.numel() for p in TemporalSAE(8, 32).parameters())
    assert memory_plan.member_bytes(plan) == 16 * plan.n_parameters
    assert memory_plan.available_bytes(torch.device("cpu")) > 0


def test_training_needs_no_language_model_library(store, tmp_path):
    code = (
        "import sys; from tcsae.train.presets import validated; from tcsae.train.run import train; import json\n"
        "train(validated(json.loads(sys.argv[1])))\n"
        "assert not {'transformers', 'datasets'} & set(sys.modules), 'loaded'"
    )
    config = config_for(store, tmp_path, run__steps=2)
    subprocess.run([sys.executable, "-c", code, config.model_dump_json()], check=True, stderr=subprocess.DEVNULL)


def test_batchtopk_is_calibrated_to_its_k_outside_training(store, tmp_path):
    config = config_for(
        store, tmp_path, sae__activation="batchtopk", run__steps=200, optimiser__lr=3e-3, run__baseline=False
    )
    sae = TemporalSAE.load(run.train(config).runs[0])
    assert sae.activation.kind == "jumprelu"
    x = ActivationStore.open(store).rows(0, 64, dtype=torch.float32)[:, 1:]
    assert (sae.encode(x) > 0).sum(-1).float().mean() == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("penalty", ["linear", "quadratic"])
def test_a_short_training_of_jumprelu_ends_at_its_target_too(store, tmp_path, capsys, penalty):
    """Forty steps are too few for the controller: what is off then, the thresholds make up for, all by one factor."""
    about = {"sae__activation": "jumprelu", "loss__target_l0": 3, "loss__l0_penalty": penalty, "optimiser__lr": 3e-3}
    x = ActivationStore.open(store).rows(0, 64, dtype=torch.float32)[:, 1:]
    for path in run.train(config_for(store, tmp_path, run__steps=40, **about)).runs:  # the twin, too
        before = [entry["l0"] for entry in read_metrics(path)][-1]
        assert abs(before / 3 - 1) > 0.1
        assert (TemporalSAE.load(path).encode(x) > 0).sum(-1).float().mean() == pytest.approx(3, rel=0.03)
    assert "from the target" not in capsys.readouterr().err


_TOGETHER = (
    "import sys, torch; torch.set_num_threads(1)\n"
    "from tcsae.train.presets import validated; from tcsae.train.run import train; import json\n"
    "train(validated(json.loads(sys.argv[1])))"
)


def torchrun(config, *options: str) -> subprocess.Popen:
    """Start one agent, on the loopback address: a machine need not be able to resolve its own name."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1", *options]
    return subprocess.Popen(
        [*launch, "--no-python", sys.executable, "-W", "ignore", "-c", _TOGETHER, config.model_dump_json()],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def outcomes(*agents: subprocess.Popen) -> list[tuple[int, str]]:
    """Exit status of each agent and what it said."""
    said = [agent.communicate(timeout=240)[1] for agent in agents]
    return [(agent.returncode, words) for agent, words in zip(agents, said, strict=True)]


def free_port() -> int:
    """One that is free, and below those that Linux gives to whoever asks for any: nobody gets it before its use."""
    for port in random.SystemRandom().sample(range(20000, 32768), 100):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port among a hundred")


def two_machines(*configs) -> list[tuple[int, str]]:
    """One agent with one process on each of two machines, both of them this one."""
    meet = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    return outcomes(*(torchrun(each, *meet, f"--node-rank={rank}") for rank, each in enumerate(configs)))


@pytest.fixture(scope="module")
def two_processes(store, tmp_path_factory):
    """Runs that two processes of one machine trained."""
    folder = tmp_path_factory.mktemp("two")
    config = config_for(store, folder, sae__activation="relu", loss__l1=0.1)
    ((status, said),) = outcomes(torchrun(config, "--standalone", "--nproc-per-node=2"))
    assert status == 0, said
    return folder


def test_two_machines_equal_one_with_two_processes(store, two_processes, tmp_path):
    config = config_for(store, tmp_path / "runs", sae__activation="relu", loss__l1=0.1)
    for status, said in two_machines(config, config):
        assert status == 0, said
    paths = sorted(path for path in two_processes.iterdir() if path.is_dir())
    assert len(paths) == 2
    for path in paths:
        mine, theirs = TemporalSAE.load(path), TemporalSAE.load(tmp_path / "runs" / path.name)
        for name, value in mine.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], value), name
        assert curve(tmp_path / "runs" / path.name, "loss") == curve(path, "loss")


def test_machines_that_see_other_runs_are_refused(store, two_processes, tmp_path):
    """The second machine has no disk in common with the first, which goes on with what it finds."""
    shared, own = (config_for(store, at, sae__activation="relu", loss__l1=0.1) for at in (two_processes, tmp_path))
    for status, said in two_machines(shared, own):
        assert status != 0
        assert "the 2 processes do not see the same runs in" in said


def test_two_processes_equal_one(store, two_processes, tmp_path):
    """The torchrun way: every process takes its share of the windows; equal up to the order of sums."""
    config = config_for(store, tmp_path / "one", sae__activation="relu", loss__l1=0.1)
    alone = run.train(config)
    for path in alone.runs:
        other = two_processes / path.name
        mine, theirs = TemporalSAE.load(path), TemporalSAE.load(other)
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[name], value, rtol=1e-3, atol=1e-4)
        for key in ("loss", "explained_variance", "l0"):
            assert curve(other, key) == pytest.approx(curve(path, key), rel=1e-3)
        assert len(read_metrics(other)) == 4


def test_two_processes_on_one_run_folder_are_refused(store, tmp_path, monkeypatch):
    config = config_for(store, tmp_path)
    real = trainer.Pass.run

    def meanwhile(self, *shown):
        with pytest.raises(RunError, match=r"another process trains .*give another --name"):
            run.train(config)
        real(self, *shown)

    monkeypatch.setattr(trainer.Pass, "run", meanwhile)
    assert len(run.train(config).runs) == 2


# --- of conversations, one role's tokens alone


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("talks"), rows=64, context=24, d_model=8, documents=12, turns=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temporal__partner": "earlier"},
        {"temporal__partner": "same_document", "data__window": 2},
        {"preset": "tfa", "temporal__form": "pairwise", "temporal__weight": 0.1},
    ],
    ids=["windows", "pairs", "siblings", "rows"],
)
def test_only_tokens_of_the_role_are_trained_on_by_the_twin_too(talks, tmp_path, monkeypatch, changes):
    store, trained, said_before = ActivationStore.open(talks), [], []
    monkeypatch.setattr(passes, "note", said_before.append)
    said = of_role(store.flags(0, store.n_rows), "assistant")
    real = BatchReader.next_batches

    def next_batches(self):
        batches = real(self)
        for batch in batches.values():
            tokens_NW = torch.from_numpy(said[batch.rows_N[:, None], batch.positions_NW])
            trained.append(bool((tokens_NW if batch.valid_NW is None else tokens_NW | ~batch.valid_NW).all()))
        return batches

    monkeypatch.setattr(BatchReader, "next_batches", next_batches)
    done = run.train(config_for(talks, tmp_path, data__only="assistant", **changes))
    assert len(trained) >= 20
    assert all(trained)
    assert "only tokens in messages of the role 'assistant' are trained on" in said_before
    tc, twin = map(load_run, done.runs)
    assert tc.config["data"]["only"] == twin.config["data"]["only"] == "assistant"
    assert (tc.twin, twin.twin) == (twin.name, tc.name)


def test_a_run_of_one_role_goes_on_bit_for_bit_and_is_no_run_of_all(talks, tmp_path, monkeypatch):
    whole = run.train(config_for(talks, tmp_path / "whole", data__only="assistant"))
    halted = config_for(talks, tmp_path / "parts", data__only="assistant")
    pull_the_plug(halted, monkeypatch, after=10)
    with pytest.raises(RunError, match=r"data\.only was 'assistant' and is now ''"):
        run.train(config_for(talks, tmp_path / "parts"))
    resumed = run.train(halted)
    assert [weights(a) for a in whole.runs] == [weights(b) for b in resumed.runs]
    for other in ("user", ""):
        others = run.train(config_for(talks, tmp_path / f"other{other}", data__only=other))
        assert all(weights(a) != weights(b) for a, b in zip(whole.runs, others.runs, strict=True))


def test_roles_can_be_swept_and_each_is_what_it_is_alone(talks, tmp_path):
    swept = run.train(config_for(talks, tmp_path / "both"), sweep={"data.only": ("user", "assistant")})
    for role in ("user", "assistant"):
        alone = run.train(config_for(talks, tmp_path / role, data__only=role))
        found = [path for path in swept.runs if load_run(path).config["data"]["only"] == role]
        assert len(found) == 2
        assert [weights(path) for path in found] == [weights(path) for path in alone.runs]


def test_a_role_of_a_store_without_any_is_one_sentence(store, talks, tmp_path):
    with pytest.raises(StoreError, match="does not say whose each token is, so that --only assistant selects nothing"):
        run.train(config_for(store, tmp_path / "a", data__only="assistant"))
    with pytest.raises(UsageError, match="has no usable token in a message of the role 'system'"):
        run.train(config_for(talks, tmp_path / "b", data__only="system"))
