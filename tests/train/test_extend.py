"""A finished run goes on, with all that it is compared with; whatever stops that, the finished run stays."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tcsae
import torch
from stores import grow_store, make_store
from tcsae import pipeline
from tcsae.errors import RunError, UsageError
from tcsae.evaluate.subjects import _notes_on_parts
from tcsae.on_disk import entries
from tcsae.train.config import OptimiserConfig
from tcsae.train.loop import trainer
from tcsae.train.loop.alarms import MemberError
from tcsae.train.loop.schedule import learning_rate
from tcsae.train.run_folder.metrics_log import read_metrics
from tcsae.train.run_folder.record import load_run
from tcsae.train.sae.protocol import SparseAutoencoder

ASKED = {
    "batch_size": 60, "pool": 256, "k": 4, "width": 32, "steps": 20, "log_every": 5, "checkpoint_every": 3,
    "device": "cpu", "dtype": "float32",
}  # fmt: skip
FILES = ("train.json", "cfg.json", "sae_weights.safetensors", "metrics.jsonl")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("cache"), rows=64, context=16, d_model=8, documents=12)


def trained(store, out, **asked):
    return tcsae.train(store=store, out=out, **(ASKED | asked)).runs


def files(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(run.iterdir()) if file.is_file()}


def extended(run, **asked):
    return tcsae.train(extend=run, **({"steps": 10} | asked))


def test_both_of_a_pair_go_on_and_the_record_has_both_parts(store, tmp_path):
    tc, twin = trained(store, tmp_path)
    before = {run: SparseAutoencoder.load(run) for run in (tc, twin)}
    done = extended(tc)
    assert (sorted(done.runs), done.steps, done.tokens) == (sorted([tc, twin]), 30, 30 * 60)
    for run in (tc, twin):
        record = load_run(run)
        record.check_files(run)
        assert (record.steps, record.planned_steps, record.tokens, record.finished) == (30, 30, 1800, True)
        first, second = record.parts
        assert (first.from_step, first.steps, first.tokens) == (0, 20, 1200)
        assert (second.from_step, second.steps, second.tokens) == (20, 10, 600)
        assert (second.moments, second.warmup, second.decay) == ("fresh", 0, 2)
        assert record.cost["seconds"] == pytest.approx(first.cost["seconds"] + second.cost["seconds"])
        assert not torch.equal(SparseAutoencoder.load(run).W_dec, before[run].W_dec)
        assert {file.name for file in run.iterdir()} == set(FILES)
        assert json.loads((run / "cfg.json").read_text())["metadata"]["tcsae_tokens"] == 1800
    assert load_run(tc).twin == twin.name
    assert load_run(tc).pairs, "what the term compares stays known"


def test_metrics_go_on_with_the_second_schedule(store, tmp_path):
    tc, _ = trained(store, tmp_path)
    first = read_metrics(tc)
    extended(tc, log_every=1)
    lines = read_metrics(tc)
    assert lines[: len(first)] == first
    steps = [line["step"] for line in lines]
    assert steps == [5, 10, 15, 20, *range(21, 31)]
    assert [line["tokens"] for line in lines] == [60 * step for step in steps]
    rates = [line["lr"] for line in lines if line["step"] > 20]
    assert rates == pytest.approx([learning_rate(step, 10, OptimiserConfig()) for step in range(10)])


def test_it_sees_the_batches_that_follow(store, tmp_path):
    """The stream ends where that of one long run does, and the first batch is not the first run's first."""
    tc, _ = trained(store, tmp_path / "two")
    at = load_run(tc).ends["stream"]
    extended(tc)
    (long, _) = trained(store, tmp_path / "one", steps=30)
    assert load_run(tc).ends["stream"] == load_run(long).ends["stream"] != at


def test_an_older_record_goes_on_at_the_next_pass(store, tmp_path):
    tc, twin = trained(store, tmp_path)
    for run in (tc, twin):
        load_run(run).model_copy(update={"ends": {}}).save(run)
    epoch = read_metrics(tc)[-1]["epoch"]
    extended(tc, log_every=1)
    assert read_metrics(tc)[-10]["epoch"] == epoch + 1


def test_the_loss_goes_on_falling(store, tmp_path):
    """With fresh weights or scaled wrongly it would begin where the first part began."""
    (run,) = trained(store, tmp_path, steps=300, lr=3e-3, baseline=False, log_every=50)
    first = read_metrics(run)
    extended(run, steps=300, log_every=1)
    second = [line for line in read_metrics(run) if line["step"] > 300]
    assert second[0]["explained_variance"] > 0.9 * first[-1]["explained_variance"]
    assert second[-1]["explained_variance"] > first[-1]["explained_variance"]


@pytest.mark.parametrize("kind", ["relu", "batchtopk", "jumprelu", "gated"])
def test_every_kind_goes_on(store, tmp_path, kind):
    about = {"architecture": "gated"} if kind == "gated" else {"activation": kind}
    about |= {} if kind == "batchtopk" else {"target_l0": 4}
    (run,) = trained(store, tmp_path, steps=60, baseline=False, **about)
    before = load_run(run)
    if "target_l0" in about:
        assert before.ends["target"]["steps"] >= 0
    extended(run)
    assert load_run(run).steps == 70


class StoppedError(Exception):
    pass


def stop_at(monkeypatch, step):
    original = trainer.Pass._train_batch

    def train_batch(self, *args):
        if self.step == step:
            raise StoppedError
        original(self, *args)

    monkeypatch.setattr(trainer.Pass, "_train_batch", train_batch)


def test_stopped_it_leaves_the_finished_run_and_goes_on_bit_for_bit(store, tmp_path, monkeypatch):
    straight, _ = trained(store, tmp_path / "straight")
    extended(straight)
    tc, twin = trained(store, tmp_path / "stopped")
    before = {run: files(run) for run in (tc, twin)}
    with monkeypatch.context() as patch:
        stop_at(patch, 27)
        with pytest.raises(StoppedError):
            extended(tc)
    assert {run: files(run) for run in (tc, twin)} == before
    load_run(tc).check_files(tc)
    for entry in entries([tmp_path / "stopped"]):
        assert entry.finished
        assert "20 steps, on the way to 30: `pipeline train --extend` goes on" in entry.state
    with pytest.raises(UsageError, match="being extended by 10 steps, not by 50"):
        extended(tc, steps=50)
    tcsae.train(extend=tc)
    assert files(tc)["sae_weights.safetensors"] == files(straight)["sae_weights.safetensors"]
    assert [line["loss"] for line in read_metrics(tc)] == [line["loss"] for line in read_metrics(straight)]
    assert load_run(twin).steps == 30


@pytest.mark.parametrize("renames", [0, 1, 2, 3, 4, 5])
def test_stopped_while_files_are_replaced_the_same_command_finishes_it(store, tmp_path, monkeypatch, renames):
    tc, twin = trained(store, tmp_path)
    done, replace = [], os.replace

    def stopping(source, target):
        if Path(target).parent in (tc, twin) and Path(source).parent.name == "extension":
            if len(done) == renames:
                raise StoppedError
            done.append(target)
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(StoppedError):
            extended(tc)
    if renames % 3:
        half = sorted((tc, twin))[renames // 3]
        with pytest.raises(RunError, match="finish that with 'pipeline train --extend"):
            load_run(half).check_files(half)
    extended(tc, fresh=renames == 4)
    for run in (tc, twin):
        load_run(run).check_files(run)
        assert load_run(run).steps == 30
        assert [line["step"] for line in read_metrics(run)] == [5, 10, 15, 20, 25, 30]
        assert {file.name for file in run.iterdir()} == set(FILES)


def test_it_can_go_on_more_than_once(store, tmp_path):
    tc, _ = trained(store, tmp_path)
    extended(tc)
    extended(tc, steps=None, tokens=300)
    assert [(part.from_step, part.steps) for part in load_run(tc).parts] == [(0, 20), (20, 10), (30, 5)]


def test_all_members_with_one_twin_go_on_together_and_others_stay(store, tmp_path):
    sweep = {"temporal_weight": [0.1, 0.3], "seed": [0, 1]}
    runs = tcsae.train(store=store, out=tmp_path, sweep=sweep, **ASKED).runs
    assert len(runs) == 6
    tc = next(run for run in runs if "0.1" in run.name and run.name.endswith("s0"))
    done = extended(tc)
    assert sorted(done.runs) == sorted(run for run in runs if run.name.endswith("s0"))
    assert {load_run(run).steps for run in runs if run.name.endswith("s1")} == {20}
    extended(tmp_path, steps=5)
    assert sorted(load_run(run).steps for run in runs) == [25, 25, 25, 35, 35, 35]


def test_the_command_that_began_it_finds_it_finished(store, tmp_path):
    tc, _ = trained(store, tmp_path)
    extended(tc)
    done = tcsae.train(store=store, out=tmp_path, **ASKED)
    assert sorted(done.skipped) == sorted(done.runs)
    with pytest.raises(RunError, match=r"run\.steps was 30 and is now 25"):
        trained(store, tmp_path, steps=25)


def test_what_cannot_go_on_is_one_sentence(store, tmp_path, monkeypatch):
    tc, twin = trained(store, tmp_path)
    with pytest.raises(UsageError, match="how far: give --steps or --tokens"):
        tcsae.train(extend=tc)
    with pytest.raises(UsageError, match="goes on with the settings of the run: leave out --k"):
        extended(tc, k=8)
    with pytest.raises(UsageError, match="both say how far"):
        extended(tc, tokens="1k")
    other = make_store(tmp_path / "other", rows=64, context=16, d_model=8, documents=12, seed=5)
    with pytest.raises(RunError, match=r"are not those that .* was trained on: give its store with --store"):
        extended(tc, store=other)
    load_run(twin).model_copy(update={"finished": False, "planned_steps": 40}).save(twin)
    with pytest.raises(RunError, match=r"none-s0 is not finished \(0 of 40 steps\): finish it with the command"):
        extended(tc)
    load_run(twin).model_copy(update={"finished": True, "steps": 40}).save(twin)
    with pytest.raises(RunError, match=r"which has the same twin, .*: they cannot go on side by side"):
        extended(tc)
    (tc / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="damaged or was changed"):
        extended(tc)
    with pytest.raises(RunError, match="is no training run"):
        extended(tmp_path / "other")


def test_a_pruned_run_is_refused(store, tmp_path):
    (run,) = trained(store, tmp_path, baseline=False)
    sae = SparseAutoencoder.load(run)
    sae.metadata |= {"pruned_from": "whole"}
    sae.save(run)
    load_run(run).save(run)
    with pytest.raises(UsageError, match="was pruned from whole: extend whole, and prune it again"):
        extended(run)


def test_evaluation_sees_other_weights_and_says_that_there_are_parts(store, tmp_path):
    (run,) = trained(store, tmp_path, baseline=False)
    before = files(run)["sae_weights.safetensors"]
    assert _notes_on_parts(load_run(run)) == ()
    extended(run)
    assert files(run)["sae_weights.safetensors"] != before, "whose hash is in the names of kept rows"
    (note,) = _notes_on_parts(load_run(run))
    assert note.startswith("it was trained in 2 parts, of 20 + 10 steps")


def test_a_changed_plugin_is_refused(store, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import tcsae\n\n@tcsae.temporal_term('mine_extended')\ndef mine(z_NWF, pairs):\n"
        "    return (z_NWF[:, 1:] - z_NWF[:, :-1]).pow(2).sum(-1).mean()\n"
    )
    (run, *_) = trained(store, tmp_path / "runs", plugin=str(plugin), temporal="mine_extended", baseline=False)
    record = load_run(run)
    record.model_copy(update={"plugins": dict.fromkeys(record.plugins, "0" * 64)}).save(run)
    with pytest.raises(RunError, match="only the plug-ins that it was trained with can take it further"):
        extended(run)


def test_one_that_fails_leaves_all_as_they_were(store, tmp_path, monkeypatch):
    tc, twin = trained(store, tmp_path)
    before = {run: files(run) for run in (tc, twin)}

    def check(member, update, batch):
        if member.plan.name == twin.name and member.step >= 25:
            raise MemberError(f"{twin.name}: its loss is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "check_finite", check)
        with pytest.raises(RunError, match="its loss is not finite; the finished runs stay as they are"):
            extended(tc)
        assert {run: files(run) for run in (tc, twin)} == before
        with pytest.raises(RunError, match="the finished runs stay as they are"):
            extended(tc)
    extended(tc, fresh=True)
    assert load_run(tc).steps == load_run(twin).steps == 30


def test_a_store_that_has_grown_or_moved_gives_the_rows_of_before(store, tmp_path):
    moved = make_store(tmp_path / "cache", rows=64, context=16, d_model=8, documents=12)
    tc, _ = trained(moved, tmp_path / "runs")
    plain, _ = trained(store, tmp_path / "plain")
    extended(plain)
    grow_store(moved, 96)
    (there := tmp_path / "there.zarr").symlink_to(moved)
    extended(tc, store=there)
    assert files(tc)["sae_weights.safetensors"] == files(plain)["sae_weights.safetensors"]
    assert load_run(tc).store_rows == 64


def test_from_the_command_line(store, tmp_path, capsys):
    tc, _ = trained(store, tmp_path)
    assert pipeline.main(["train", "--extend", str(tc), "--steps", "10", "--json"]) in (0, None)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 30
