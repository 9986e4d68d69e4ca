"""Where metrics go: one file always, other loggers where asked for; a resumed run goes on with the same curves."""

from __future__ import annotations

import sys
import types

import pytest
from stores import make_store
from tcsae.errors import ResourceError, RunError
from tcsae.pipeline import main
from tcsae.train.loop.batches import BatchReader
from tcsae.train.run_folder.metrics_log import MetricsLog, read_metrics


def test_a_resumed_journal_has_no_step_twice_and_drops_torn_lines(tmp_path):
    log = MetricsLog(tmp_path, ["jsonl"], from_step=0, config={})
    for step in (5, 10, 15):
        log.write(step, {"loss": float(step)})
    log.alarm(15, "collapse")
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "lo')
    again = MetricsLog(tmp_path, ["jsonl"], from_step=10, config={})
    again.write(15, {"loss": 0.0})
    again.close()
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path)] == [(5, 5.0), (10, 10.0), (15, 0.0)]


def test_a_full_disk_is_one_sentence(tmp_path):
    log = MetricsLog(tmp_path, ["jsonl"], from_step=0, config={})
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115 - closing it fails too
    for once_more in (lambda: log.write(5, {"loss": 1.0}), log.close):
        with pytest.raises(ResourceError, match=r"the disk is full: cannot write .*metrics.jsonl"):
            once_more()


def killed_and_resumed(tmp_path, monkeypatch, *more):
    """Run folders of a pair: 20 steps, logged every 2, with a power cut in step 18, after the checkpoint of step 14."""
    store = make_store(tmp_path / "cache", rows=64, context=16, d_model=8)
    small = [
        "--steps",
        "20",
        "--batch-size",
        "60",
        "--k",
        "4",
        "--width",
        "16",
        "--log-every",
        "2",
        "--checkpoint-every",
        "7",
    ]
    arguments = ["--quiet", "train", "--store", str(store), "--out", str(tmp_path / "runs"), *small, *more]
    real, calls = BatchReader.next_batches, []

    def next_batches(self):
        calls.append(1)
        if len(calls) == 18:
            raise RuntimeError("pulled the plug")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(BatchReader, "next_batches", next_batches)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            main(arguments)
    assert main(arguments) == 0
    return sorted((tmp_path / "runs").iterdir())


def test_tensorboard_has_every_step_of_a_resumed_run_once(tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for run in killed_and_resumed(tmp_path, monkeypatch, "--log", "tensorboard"):
        assert len(list((run / "tensorboard").iterdir())) == 2
        events = accumulators.EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        lines = read_metrics(run)
        assert [line["step"] for line in lines] == [*range(2, 21, 2)]
        for name in ("loss", "explained_variance", "tokens_per_second"):
            curve = [(event.step, event.value) for event in events.Scalars(name)]
            wanted = [(line["step"], pytest.approx(line[name])) for line in lines]
            assert curve == wanted


class FakeWandb(types.ModuleType):
    """Keeps what its runs were begun and fed with; as the real one, it has one run per process unless told to create
    more.
    """

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.runs, self.open = [], {}, []

    def Settings(self, **settings):  # noqa: N802
        return settings

    def init(self, **given):
        self.begun.append(given)
        if given.get("reinit") != "create_new" and self.open:
            return self.open[-1]
        curve = self.runs.setdefault(given["id"], [])
        run = types.SimpleNamespace(
            log=lambda metrics, step: curve.append((step, metrics)), finish=lambda: self.open.remove(run)
        )
        self.open.append(run)
        return run


def test_weights_and_biases_gets_a_run_per_member_and_no_step_twice(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    folders = killed_and_resumed(tmp_path, monkeypatch, "--log", "wandb")
    assert [given["resume"] for given in wandb.begun] == ["allow"] * 4
    assert len(wandb.runs) == 2
    assert not wandb.open
    for folder in folders:
        ((name, curve),) = [(name, curve) for name, curve in wandb.runs.items() if name.startswith(folder.name)]
        assert name == (folder / "wandb" / "id").read_text()
        lines = read_metrics(folder)
        assert [step for step, _ in curve] == [line["step"] for line in lines] == [*range(2, 21, 2)]
        assert [metrics["loss"] for _, metrics in curve] == [line["loss"] for line in lines]


def test_undefined_numbers_stay_out_of_other_loggers_and_a_new_run_is_another_one(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        log = MetricsLog(tmp_path, ["wandb"], from_step=0, config={})
        log.write(5, {"loss": 1.5, "cosine": None})
        log.close()
    assert list(wandb.runs.values()) == [[(5, {"loss": 1.5})], [(5, {"loss": 1.5})]]
    assert read_metrics(tmp_path) == [{"step": 5, "loss": 1.5, "cosine": None}]


def test_weights_and_biases_that_refuses_is_one_sentence(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def refuse(**_):
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        RunError, match=r"cannot begin .* \(No API key configured\): 'wandb login', set WANDB_MODE=offline"
    ):
        MetricsLog(tmp_path, ["wandb"], from_step=0, config={})


def test_the_real_weights_and_biases_keeps_members_apart(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for folder in killed_and_resumed(tmp_path, monkeypatch, "--log", "wandb"):
        kept = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(kept) == 2  # before and after the power cut
        assert {file.stem for file in kept} == {"run-" + (folder / "wandb" / "id").read_text()}
