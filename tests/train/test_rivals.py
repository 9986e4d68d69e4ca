"""Coders that see tokens, pairs, windows and rows train side by side: one read, each what it is alone, resumable."""

from __future__ import annotations

import pytest
import torch
from stores import make_store
from tcsae.cache.store import ActivationStore
from tcsae.console import speaking
from tcsae.errors import UsageError
from tcsae.train import run
from tcsae.train.loop.batches import BatchReader
from tcsae.train.loop.distributed import World
from tcsae.train.loop.inputs import Inputs
from tcsae.train.loop.memory_plan import member_bytes, step_bytes
from tcsae.train.loop.trainer import Pass
from tcsae.train.plan import plan_members
from tcsae.train.presets import build_config, rivals_of
from tcsae.train.run_folder.metrics_log import read_metrics
from tcsae.train.run_folder.record import load_run
from tcsae.train.sae.protocol import SparseAutoencoder
from tcsae.train.step.autograd import autograd_step

SMALL = {
    "data.batch_size": 60, "data.pool": 256, "sae.k": 4, "sae.width": 32, "run.steps": 20, "run.log_every": 5,
    "run.checkpoint_every": 7, "run.device": "cpu", "run.dtype": "float32", "temporal.form": "none",
}  # fmt: skip
KINDS = {
    "txc": {"sae.architecture": "txc", "loss.dead_after": 300},
    "txc-pooled": {"sae.architecture": "txc", "sae.k_of": "window", "data.window": 3},
    "sae-tsae": {
        "data.pair_loss": "current", "sae.activation": "batchtopk", "sae.groups": (0.25, 1.0),
        "temporal.form": "contrastive", "temporal.partner": "earlier", "temporal.scope": 0.25,
        "temporal.similarity": "dot", "temporal.temperature": 1.0, "temporal.weight": 0.1,
        "loss.aux_normalised": True, "loss.dead_after": 300,
    },
    "tfa": {"sae.architecture": "tfa", "sae.decoder": "free", "optimiser.decay": "cosine"},
    "tfa-term": {
        "sae.architecture": "tfa", "sae.decoder": "free", "temporal.form": "cosine", "temporal.partner": "lag",
        "temporal.lag": 2, "sae.activation": "relu", "loss.l1": 0.1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = make_store(
        tmp_path_factory.mktemp("cache"), rows=64, context=16, d_model=8, documents=12, packing="concat"
    )  # fmt: skip
    ActivationStore.open(path).statistics()
    return path


def config_for(store, out, changes):
    return build_config(None, None, SMALL | {"data.store": str(store), "run.out": str(out)} | changes)


def weights(folder):
    return (folder / "sae_weights.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(store, tmp_path, monkeypatch, kind):
    whole = run.train(config_for(store, tmp_path / "whole", KINDS[kind]))
    halted = config_for(store, tmp_path / "parts", KINDS[kind])
    for after in (9, 10):
        real, calls = BatchReader.next_batches, []

        def next_batches(self, real=real, calls=calls, after=after):
            calls.append(1)
            if len(calls) > after:
                raise RuntimeError("pulled the plug")
            return real(self)

        with monkeypatch.context() as patch:
            patch.setattr(BatchReader, "next_batches", next_batches)
            with pytest.raises(RuntimeError, match="pulled the plug"):
                run.train(halted)
    resumed = run.train(halted)
    for a, b in zip(whole.runs, resumed.runs, strict=True):
        assert weights(a) == weights(b)
        assert [entry["loss"] for entry in read_metrics(a)] == [entry["loss"] for entry in read_metrics(b)]


def test_all_kinds_share_one_read_and_are_what_they_are_alone(store, tmp_path, chunks_read):
    grid = {"sae.architecture": ["sae", "txc", "tfa"]}
    shared = run.train(config_for(store, tmp_path / "shared", {"sae.decoder": "free"}), sweep=grid).runs
    assert len(shared) == 3
    chunks = sum(chunks_read)
    for path in shared:
        chunks_read.clear()
        kind = load_run(path).config["sae"]["architecture"]
        alone = run.train(config_for(store, tmp_path / "alone", {"sae.decoder": "free", "sae.architecture": kind}))
        assert weights(alone.runs[0]) == weights(path)
        assert sum(chunks_read) == chunks


@pytest.mark.parametrize("kind", KINDS)
def test_they_learn_and_log_what_they_are(store, tmp_path, kind):
    longer = {"run.steps": 300, "run.log_every": 100, "optimiser.lr": 3e-3}
    path = run.train(config_for(store, tmp_path, KINDS[kind] | longer)).runs[0]
    first, *_, last = read_metrics(path)
    assert last["reconstruction"] < first["reconstruction"]
    assert last["explained_variance"] > 0.3
    assert (last["temporal_variation"] is None) == kind.startswith("txc")
    if kind != "tfa-term":
        expected = {"txc": 20, "txc-pooled": 4, "tfa": 4, "sae-tsae": 4}[kind]
        assert expected / 2 < last["l0"] <= expected
    sae = SparseAutoencoder.load(path)
    assert sae.architecture == kind.split("-")[0]


def test_several_processes_share_rows_by_their_tokens(store, tmp_path):
    """The gradients of two shares, weighted by their tokens, are that of the whole batch."""
    config = config_for(store, tmp_path, KINDS["tfa"] | {"data.batch_size": 75})  # 5 rows: 2 and 3
    opened = ActivationStore.open(store)
    inputs = Inputs.of(config.data, opened.statistics())
    plans = plan_members(config, {}, layer=3, d_model=8, n_tokens=900)

    def gradients(rank, size):
        work = Pass(plans, opened, inputs, torch.device("cpu"), torch.float32, World(rank, size))
        ((view, batch),) = work.feed.next_batches().items()
        seen = work._own_share(view, batch)
        sae = work.members[0].sae
        autograd_step(sae, seen.x_NWD, work.members[0].objective, rows=seen.rows)
        work.feed.close()
        return seen.share, [p.grad for p in sae.parameters()]

    _, whole = gradients(0, 1)
    shares = [gradients(rank, 2) for rank in range(2)]
    assert sum(share for share, _ in shares) == pytest.approx(1)
    assert shares[0][0] == pytest.approx(0.4)
    for at, expected in enumerate(whole):
        torch.testing.assert_close(
            sum(share * each[at] for share, each in shares), expected, rtol=1e-3, atol=1e-5
        )  # fmt: skip


def test_more_processes_than_rows_are_one_sentence(store, tmp_path):
    config = config_for(store, tmp_path, KINDS["tfa"])
    opened = ActivationStore.open(store)
    inputs = Inputs.of(config.data, opened.statistics())
    plans = plan_members(config, {}, layer=3, d_model=8, n_tokens=900)
    work = Pass(plans, opened, inputs, torch.device("cpu"), torch.float32, World(0, 5))
    ((view, batch),) = work.feed.next_batches().items()
    with pytest.raises(UsageError, match="a batch holds 4 rows for 5 processes: give a larger --batch-size"):
        work._own_share(view, batch)
    work.feed.close()


def test_memory_counts_the_attention_and_is_said_before_the_start(store, tmp_path, capsys):
    config = config_for(store, tmp_path, {**KINDS["tfa"], "run.steps": 2})
    (plan,) = plan_members(config, {}, layer=3, d_model=8, n_tokens=900)
    parameters = 4 * 32 * 32 + 4 * 32 + 32 * 8 + 8
    assert member_bytes(plan) == 16 * parameters
    assert step_bytes(plan) > 60 * 4 * 12 * 32
    with speaking(True):
        run.train(config)
    printed = capsys.readouterr().err
    assert "whole rows" in printed
    assert "no hand-written step for architecture 'tfa'" in printed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({**KINDS["txc"], "data.window": 17, "sae.k": 1}, "windows of 17 tokens .* rows have 16 positions"),
        ({**KINDS["tfa"], "data.batch_size": 8}, "batches of 8 tokens are less than a row"),
    ],
)  # fmt: skip
def test_a_store_that_does_not_fit_is_one_sentence(store, tmp_path, changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        run.train(config_for(store, tmp_path, changes))


def test_rows_of_tiny_documents_are_no_past_to_attend_to(tmp_path):
    path = make_store(tmp_path, rows=64, context=16, d_model=8, documents=600, packing="concat")
    with pytest.raises(
        UsageError, match=r"a token has on average 0\.\d earlier tokens of its document in its row, too few"
    ):
        run.train(config_for(path, tmp_path / "runs", KINDS["tfa"]))


def test_rivals_of_one_width_and_k_train_on_one_read(tmp_path, chunks_read):
    path = make_store(tmp_path, rows=64, documents=12)
    ActivationStore.open(path).statistics()
    chunks_read.clear()
    config = config_for(path, tmp_path / "runs", {"temporal.form": "pairwise", "data.pool": 0})
    done = run.train(rivals_of(config), sweep={"run.seed": ["0", "1"]})
    names = [path.name.removeprefix("l3-").rsplit("-", 1)[0] for path in done.runs]
    assert sorted(set(names)) == sorted([
        "topk4-none", "topk4-pairwise0.03-w5", "tfa4-none", "txc4-none-w5",
        "batchtopk4-groups0.2-1-contrastive0.1-earlier-scope0.2", "batchtopk4-groups0.2-1-none-pairs",
    ])  # fmt: skip
    assert len(names) == 12
    assert len(chunks_read) == 1
    for folder in done.runs:
        record = load_run(folder)
        assert (record.config["sae"]["k"], record.config["sae"]["width"], record.steps) == (4, 32, 20)
        assert record.metrics["l0"] == pytest.approx(4, rel=0.2)
    plain, tc = (load_run(tmp_path / "runs" / f"l3-{name}-s0") for name in ("topk4-none", "topk4-pairwise0.03-w5"))
    assert (plain.role, plain.twin, tc.twin) == ("twin", tc.name, plain.name)
