"""Workers give the report that one process gives, also when one of them is killed."""

import math
import os
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tcsae.errors import ModelError, ResourceError, RunError, UsageError
from tcsae.evaluate import distributed
from tcsae.evaluate.codes.store import CodeStore
from tcsae.evaluate.config import EvaluateConfig
from tcsae.evaluate.distributed import blocks_of
from tcsae.evaluate.one_pass import Measurement
from tcsae.evaluate.run import evaluate
from tcsae.train.config import SAEConfig
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.tfa import TemporalFeatureAnalysis
from tcsae.train.sae.txc import TemporalCrosscoder
from tiny import tiny_corpus, tiny_model
from tiny_runs import make_manifest, make_run, random_sae

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets that Dask's event loop closes late
D = 24
OPTIONS = {
    "batches": 16,
    "batch_rows": 4,
    "device": "cpu",
    "dtype": "float32",
    "references": ("identity_bf16", "zero_all", "untrained"),
    "codes": True,
}
METRICS = '''
import os, signal
from pathlib import Path

import torch
from tcsae.evaluate.metrics.registry import metric
from tcsae.evaluate.protocol import Findings
from tcsae.evaluate.results import Definition, Metric

FLAG = Path(__file__).with_name("killed")


@metric("twice_l0", over="tokens", text="twice L0")
def twice_l0(tokens):
    """In the middle of the text, the first worker that comes here dies."""
    if FLAG.with_suffix(".armed").exists() and not FLAG.exists() and int(tokens.batch.rows_B[0]) > 30:
        FLAG.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * (tokens.z != 0).sum(1)


@metric("last_rows")
class LastRows:
    """Knows nothing of merging, and depends on the order of the text."""

    definitions = {"last_row": Definition(text="number of the last row", unit="rows")}
    by_part = ("last_row",)

    def __init__(self, sae, *, context, seed):
        self.last = -1

    def update(self, batch, active, x_hat_BTD):
        assert int(batch.rows_B[0]) == self.last + 1
        self.last = int(batch.rows_B[-1])

    def result(self):
        return Findings(metrics={"last_row": Metric(value=self.last, unit="rows", n=1, definition="last_row")})
'''


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a text of two topics, and runs of every kind: single tokens, windows, sums of codes."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = tiny_model("gemma2", folder / "model")
    for seed, topic in enumerate(("king", "town")):
        tiny_corpus(folder / "text" / topic, documents=60, words=40, seed=seed)
    at_1, at_3 = (make_manifest(model, folder / "text", layer) for layer in (1, 3))
    runs = folder / "runs"
    make_run(runs, "deep", at_3, sae=random_sae(D, 16, Activation("relu"), 2))
    for name, kind, more in (
        ("txc", TemporalCrosscoder, {"window": 3, "k_of": "window"}),
        ("tfa", TemporalFeatureAnalysis, {"decoder": "free", "heads": 2}),
    ):
        config = SAEConfig(architecture=name, activation="topk", k=4, width=32, **more)
        sae = kind.build(config, D)
        sae.initialise(config, 0)
        make_run(runs, name, at_1, sae=sae.eval(), sae_config=config.model_dump())
    (folder / "mine.py").write_text(METRICS)
    return folder


def config_of(place, out, **more):
    named = {"runs_folder": str(place / "runs"), "plugins": (str(place / "mine.py"),), "out": str(out)}
    return EvaluateConfig(**(named | OPTIONS | more))


@pytest.fixture(scope="module")
def alone(place):
    (outcome,) = evaluate(config_of(place, place / "alone"))
    return outcome.report


def assert_same(found, expected, where=""):
    """Equal up to the rounding of sums."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for at, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{at}]")
    elif isinstance(expected, float) and not math.isnan(expected):
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-9), where
    else:
        assert found == expected or (found != found and expected != expected), where


def assert_same_codes(found, expected):
    for one, other in zip(CodeStore.open(found), CodeStore.open(expected), strict=True):
        for name in ("tokens_RT", "documents_RT", "flags_RT", "indptr", "feature_E"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
        np.testing.assert_allclose(one.value_E, other.value_E, rtol=1e-4, atol=1e-6)


def numbers_of(report):
    return report.model_dump(exclude={"created", "seconds", "peak_memory_bytes", "machine"})


def test_two_workers_give_the_report_of_one_process_though_one_is_killed(place, alone):
    (place / "killed.armed").touch()
    (outcome,) = evaluate(config_of(place, place / "spread", workers=2))
    (place / "killed.armed").unlink()
    assert int((place / "killed").read_text()) != os.getpid()
    assert_same(numbers_of(outcome.report), numbers_of(alone))
    for record in alone.records:
        if record.kind == "sae":
            assert_same_codes(outcome.folder / record.codes, place / "alone" / "model" / record.codes)
    record = outcome.report.record("deep", 3)
    assert record.metrics["last_row"].value == outcome.report.n_rows - 1
    assert record.metrics["probe_topic_passage_k5"].value is not None
    assert record.metrics["temporal_variation"].low < record.metrics["temporal_variation"].high
    assert any(card.passages for card in outcome.report.features["deep"])


# --- what the coordinator does, with workers that are functions of this process


class Future:
    def __init__(self, client, task):
        self.client, self.task = client, task

    def result(self):
        self.client.open.remove(self)
        function, args = pickle.loads(self.task)  # as it would arrive elsewhere
        return pickle.loads(pickle.dumps(function(*args)))


class Client:
    """Four threads of tasks, each run when its result is asked for."""

    def __init__(self):
        self.open, self.most, self.tasks, self.largest = [], 0, 0, 0

    def nthreads(self):
        return {"one": 2, "two": 2}

    def submit(self, function, *args, pure, retries):
        future = Future(self, pickle.dumps((function, args)))
        self.open.append(future)
        self.tasks, self.most = self.tasks + 1, max(self.most, len(self.open))
        self.largest = max(self.largest, len(future.task))
        return future

    def cancel(self, futures):
        for future in futures:
            self.open.remove(future)


@pytest.fixture
def client(monkeypatch):
    client = Client()

    @contextmanager
    def workers_of(config):
        yield client

    monkeypatch.setattr(distributed, "workers_of", workers_of)
    monkeypatch.setattr(distributed, "own_device", lambda device: device)
    distributed._known.clear()
    return client


FEW = {"plugins": (), "only": ("fidelity",), "batches": 16, "references": ("zero_all",), "scheduler": "tcp://nowhere"}


def test_no_more_blocks_are_handed_out_than_are_soon_measured(place, client, tmp_path):
    evaluate(config_of(place, tmp_path, **FEW))
    assert client.tasks == 2 * 16  # of a batch each: a look at the text, and the pass
    assert client.most == 4 * distributed._AHEAD
    assert not client.open


@pytest.mark.parametrize(("rows", "threads"), [(64, 2), (61, 2), (3, 8), (64, 100), (1000, 3)])
def test_blocks_are_whole_batches_that_cover_the_text(rows, threads):
    blocks = blocks_of(rows, 4, threads)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))
    assert all(block.start % 4 == 0 for block in blocks)
    assert len(blocks) <= threads * distributed._BLOCKS


def test_one_bad_sae_is_one_row(place, client, tmp_path, monkeypatch):
    observe = distributed.Candidate.observe

    def fail(self, batch):
        x_hat_BTD = observe(self, batch)
        if self.row.name == "txc" and int(batch.rows_B[0]) >= 20:
            return x_hat_BTD * torch.nan
        return x_hat_BTD

    monkeypatch.setattr(distributed.Candidate, "observe", fail)
    (outcome,) = evaluate(config_of(place, tmp_path, **FEW))
    (failure,) = outcome.report.failures
    assert "txc gives NaN or infinity at layer 1 in rows 20 to 23" in failure.message
    names = {record.name for record in outcome.report.records}
    assert {"deep", "tfa"} <= names
    assert "txc" not in names


def test_what_does_not_fit_into_a_worker_is_measured_in_halves(place, client, tmp_path, monkeypatch):
    run = Measurement.run

    def no_room(self, batch_rows, bar):
        if len(self.candidates) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
        run(self, batch_rows, bar)

    monkeypatch.setattr(Measurement, "run", no_room)
    (outcome,) = evaluate(config_of(place, tmp_path, **FEW))
    assert not outcome.report.failures
    assert any("out of memory" in note for note in outcome.report.notes)
    assert {"deep", "tfa", "txc"} <= {record.name for record in outcome.report.records}


def test_a_worker_with_other_numbers_is_refused(place, client, tmp_path, monkeypatch):
    real, asked = distributed._arithmetic_of, []

    def differ(source, plugins):
        asked.append(1)
        found = real(source, plugins)
        return found if len(asked) == 1 else (*found[:-1], "code of yesterday")

    monkeypatch.setattr(distributed, "_arithmetic_of", differ)
    with pytest.raises(ModelError, match=r"a worker would measure with other numbers .*code of yesterday there, code"):
        evaluate(config_of(place, tmp_path, **FEW))


def test_failures_of_all_are_raised_and_nothing_stays_handed_out(place, client, tmp_path, monkeypatch):
    def fail(self, batch_rows, bar):
        raise RunError("the text is gone")

    monkeypatch.setattr(Measurement, "run", fail)
    with pytest.raises(RunError, match="the text is gone"):
        evaluate(config_of(place, tmp_path, **FEW))
    assert not client.open


def test_a_task_does_not_carry_the_text(place, client, tmp_path):
    evaluate(config_of(place, tmp_path, **FEW))
    assert client.largest < 40_000  # one batch of rows, the rows that are tried, and names


def test_a_scheduler_that_is_not_there_is_one_sentence(place, tmp_path, monkeypatch):
    monkeypatch.setattr("tcsae.cache.cluster.CONNECT_SECONDS", 1)
    with pytest.raises(ResourceError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1: .* or use --workers"):
        evaluate(config_of(place, tmp_path, **FEW | {"scheduler": "tcp://127.0.0.1:1"}))


def test_options_that_contradict_are_refused():
    with pytest.raises(UsageError, match="--workers 0"):
        EvaluateConfig(workers=0)
    with pytest.raises(UsageError, match="give only one of them"):
        EvaluateConfig(workers=2, scheduler="tcp://host:8786")
