"""The whole extraction: stopped and resumed it is the same store; it extends, completes, halves its batch, stops at
NaN.
"""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.storage import local
from tcsae.cache.store import ActivationStore
from tcsae.console import speaking
from tcsae.errors import ModelError, ResourceError, StoreError, TextError
from tcsae.extract import run as run_module
from tcsae.extract.config import ModelSource, command_line
from tcsae.extract.model.forward import ForwardPass, choose_batch_size
from tcsae.extract.plan import estimate
from tcsae.extract.run import extract, how_to_go_on
from tcsae.sites import Location
from tiny import tiny_corpus
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.extract.snapshots import contents

CONTEXT = 16


SMALL_SHARDS = """
import os, time
os.fsync = lambda fd: None
from tcsae.cache.format.layout import StoreLayout
from tcsae.extract import plan
from tcsae.extract.model.forward import ForwardPass
plan.plan_layout = lambda d_model, context, *, compression, **_: StoreLayout(d_model, context, 4, 8, compression)
"""
SLOW_PASSES = """
launch = ForwardPass.launch
ForwardPass.launch = lambda self, block: (time.sleep(0.05), launch(self, block))[1]
"""


@pytest.fixture(autouse=True)
def quick(small_shards, monkeypatch):
    """Power failures are the cache's tests' business."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def start(forks, config):
    """The same extraction in a process of its own, slow enough to be stopped in the middle, once two shards are
    committed.
    """
    code = f"{SMALL_SHARDS}{SLOW_PASSES}from tcsae.pipeline import main\nraise SystemExit(main(arguments))"
    process = forks.start(code, *command_line(config).split()[1:])
    log = Path(config.paths[Location(2)]) / "activations" / "commits.jsonl"
    while process.runs() and not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    return process


def stopped_after(monkeypatch, passes, failure=KeyboardInterrupt):
    """Fail in the forward pass after so many of them."""
    real, count = ForwardPass.launch, iter(range(10**6))

    def launch(self, block):
        if next(count) == passes:
            raise failure
        return real(self, block)

    monkeypatch.setattr(ForwardPass, "launch", launch)


def test_fills_the_plan(config):
    done = extract(config)
    assert (done.rows, done.tokens_stored, done.batch_size, done.already_complete) == (100, 1600, 4, False)
    assert done.bytes_written > 2 * 1600 * 24 * 2
    for at, path in config.paths.items():
        store = ActivationStore.open(path)
        assert (store.location, store.n_rows, store.finished) == (at, 100, True)
        assert store.manifest.text.dataset == str(Path(config.text.dataset).resolve())
        assert store.manifest.execution.batch_size == 4


@pytest.mark.parametrize("passes", [0, 1, 7, 20])
def test_stopped_and_resumed_is_the_same_store(config, monkeypatch, tmp_path, passes):
    extract(config)
    other = replace(config, out=str(tmp_path / "b"))
    with monkeypatch.context() as patched:
        stopped_after(patched, passes)
        with pytest.raises(
            KeyboardInterrupt, match=r"rows are committed under .*; to go on: pipeline extract --layers 1 2"
        ):
            extract(other)
    with pytest.raises(StoreError, match="finish it with the same extract command"):
        ActivationStore.open(other.paths[Location(1)])
    extract(other)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_killed_and_resumed_is_the_same_store(config, tmp_path, forks):
    extract(config)
    other = replace(config, out=str(tmp_path / "b"))
    process = start(forks, other)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not json.loads((tmp_path / "b/l1.zarr/zarr.json").read_text())["attributes"]["tcsae"]["finished"]
    extract(other)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_keep_what_is_committed_and_say_how_to_go_on(config, tmp_path, name, forks):
    process = start(forks, config)
    process.send(getattr(signal, name))
    assert process.wait() == 130
    assert "of 100 rows are committed" in process.said
    assert f"to go on: {command_line(config)}" in process.said
    assert "Traceback" not in process.said
    assert ActivationStore.open(config.paths[Location(1)], allow_unfinished=True).n_rows >= 8


def test_a_finished_store_is_complete_and_reads_no_weights(config, monkeypatch):
    extract(config)
    monkeypatch.setattr(run_module, "load_language_model", None)
    again = extract(config)
    assert again.already_complete
    assert (again.rows, again.tokens, again.tokens_per_second) == (100, 0, 0.0)
    assert extract(replace(config, tokens=CONTEXT)).already_complete


def test_more_tokens_extend_a_finished_store_to_the_same_bits(config, tmp_path):
    extract(replace(config, tokens=42 * CONTEXT))
    store = ActivationStore.open(config.paths[Location(2)])
    before, layout = store.rows(0, 42), store.layout
    assert 42 % layout.shard_rows
    done = extract(replace(config, batch_size=None))
    assert (done.rows, done.tokens, done.batch_size) == (100, 58 * CONTEXT, 4)
    grown = ActivationStore.open(config.paths[Location(2)])
    torch.testing.assert_close(grown.rows(0, 42), before, rtol=0, atol=0)
    whole = replace(config, out=str(tmp_path / "b"), tokens=100 * CONTEXT)
    extract(whole)
    torch.testing.assert_close(
        grown.rows(0, 100), ActivationStore.open(whole.paths[Location(2)]).rows(0, 100), rtol=0, atol=0
    )


def test_text_that_ends_finishes_the_store_and_says_so(config, tmp_path):
    few = tiny_corpus(tmp_path / "few", documents=12, words=40)
    config = replace(config, text=replace(config.text, dataset=str(few), held_out=0.2), tokens=10**5)
    done = extract(config)
    assert done.text_ended
    assert done.dropped_tokens > 0
    assert done.held_out_documents > 0
    again = extract(replace(config, tokens=10**7))
    assert again.already_complete
    assert again.rows == done.rows == ActivationStore.open(config.paths[Location(1)]).n_rows


def test_fresh_begins_anew(config):
    extract(config)
    other = replace(config, text=replace(config.text, seed=5))
    with pytest.raises(StoreError, match=r"text.seed: store has 0, you asked for 5"):
        extract(other)
    extract(replace(other, fresh=True))
    assert ActivationStore.open(config.paths[Location(1)]).manifest.text.seed == 5


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text": {"packing": "concat"}}, "text.packing"),
        ({"text": {"held_out": 0.2}}, "text.held_out"),
        ({"text": {"context": 8}}, "context"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
        ({"compression": "zstd"}, "compression"),
    ],
)
def test_another_identity_is_refused_by_name(config, change, field):
    extract(config)
    change = {k: replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in change.items()}
    with pytest.raises(StoreError, match=field):
        extract(replace(config, tokens=10**4, **change))


def test_another_model_under_the_same_name_is_refused(config, tmp_path, tiny_gemma2):
    import shutil

    folder = shutil.copytree(tiny_gemma2, tmp_path / "model")
    config = replace(config, model=replace(config.model, id=str(folder)))
    extract(replace(config, tokens=20 * CONTEXT))
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-7] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(StoreError, match=r"model.fingerprint"):
        extract(config)


def test_out_of_memory_halves_the_batch_and_records_it(config, monkeypatch, tmp_path, capsys):
    real = ForwardPass.launch

    def small_only(self, block):
        if self.batch_size > 2 and block.documents_BT.max() > 3:
            raise torch.OutOfMemoryError("no")
        return real(self, block)

    with monkeypatch.context() as patched:
        patched.setattr(ForwardPass, "launch", small_only)
        done = extract(replace(config, batch_size=8))
    assert "out of memory on cpu: going on with 4 rows at a time" in capsys.readouterr().err
    assert done.batch_size == 2
    store = ActivationStore.open(config.paths[Location(1)])
    recorded = [(c.execution or {"batch_size": 8})["batch_size"] for c in store.commits]
    assert recorded[0] == 8
    assert recorded[-1] == 2
    assert sorted(recorded, reverse=True) == recorded
    plain = replace(config, out=str(tmp_path / "b"))
    extract(plain)
    other = ActivationStore.open(plain.paths[Location(1)])
    np.testing.assert_array_equal(store.tokens(0, 100), other.tokens(0, 100))
    torch.testing.assert_close(store.rows(0, 100), other.rows(0, 100), rtol=2**-6, atol=2**-6)
    grown = extract(replace(config, batch_size=None, tokens=120 * CONTEXT))
    assert grown.batch_size == 2, "the last recorded batch is the one that is reused"


def test_a_row_that_does_not_fit_is_a_sentence(config, monkeypatch):
    stopped_after(monkeypatch, 0, torch.OutOfMemoryError("no"))
    monkeypatch.setattr(ForwardPass, "launch", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(ResourceError, match="runs out of memory on cpu with a single row: use a smaller --context"):
        extract(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_with_the_place_named(config, monkeypatch, value):
    real, count = ForwardPass.launch, iter(range(1000))

    def poisoned(self, block):
        pending = real(self, block)
        if next(count) == 6:
            pending.tensors[Location(2)][1, 3, 5] = value
        return pending

    with monkeypatch.context() as patched:
        patched.setattr(ForwardPass, "launch", poisoned)
        with pytest.raises(
            ModelError, match=r"NaN or Inf at layer 2, row 25, position 3 \(token \d+\) in float32: what was"
        ):
            extract(config)
    store = ActivationStore.open(config.paths[Location(2)], allow_unfinished=True)
    assert 0 < store.n_rows < 26
    extract(config)
    assert torch.isfinite(ActivationStore.open(config.paths[Location(2)]).rows(0, 100)).all()


def test_stopped_before_fresh_replaced_anything_the_old_rows_are_not_called_ours(config):
    extract(config)
    anew = replace(config, fresh=True)
    before, after = how_to_go_on(anew, "9999"), how_to_go_on(anew, "2000")
    assert before.startswith("What --fresh was to replace is still there under ")
    assert before.endswith(f"to go on: {command_line(anew)} --fresh")
    assert after.startswith("100 of 100 rows are committed")
    assert after.endswith(command_line(anew))


def test_a_growing_store_uses_its_own_number_of_threads_and_gives_back_the_callers(config, monkeypatch):
    extract(replace(config, tokens=64))  # the tests have one thread
    used = []
    real = ForwardPass.launch
    monkeypatch.setattr(ForwardPass, "launch", lambda *given: (used.append(torch.get_num_threads()), real(*given))[1])
    torch.set_num_threads(2)
    try:
        extract(replace(config, tokens=512))
        assert (set(used), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(1)


def test_plan_that_does_not_fit_on_the_disk_prints_the_bytes_and_makes_nothing(config, tmp_path, capsys):
    with pytest.raises(ResourceError, match=r"TB more are needed .* are free"), speaking(True):
        extract(replace(config, tokens=10**13))
    assert "together under" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_what_fresh_removes_is_free_for_the_plan(config, tmp_path, monkeypatch, capsys):
    extract(config)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    taken = lambda: sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())  # noqa: E731
    room = taken() * 3 // 2
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: SimpleNamespace(free=room - taken()))
    anew = replace(config, fresh=True, text=replace(config.text, seed=5))
    with monkeypatch.context() as linked:
        for number, path in enumerate(files):  # removing a file that has another name frees nothing
            (tmp_path / f"{number}.kept").hardlink_to(path)
        linked.setattr(local.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(ResourceError, match="1 kB are free once --fresh has removed what is there"):
            extract(anew)
    for path in tmp_path.glob("*.kept"):
        path.unlink()
    with speaking(True):
        extract(anew)
    assert " that --fresh removes" in capsys.readouterr().err
    assert ActivationStore.open(config.paths[Location(1)]).manifest.text.seed == 5


def test_text_without_a_row_makes_no_store(config, tmp_path):
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "one.txt").write_text("The king.")
    with pytest.raises(
        TextError, match="fills not a single row of 16 tokens: use --packing concat or a smaller --context"
    ):
        extract(replace(config, text=replace(config.text, dataset=str(tmp_path / "short"), held_out=0)))
    assert not (tmp_path / "a").exists()


def test_dry_run_measures_and_writes_nothing(config, tmp_path):
    planned = estimate(config)
    assert (planned.rows, planned.tokens, planned.rows_stored) == (100, 1600, 0)
    assert planned.bytes_together == 2 * planned.bytes_per_layer > 2 * 1600 * 48
    assert planned.seconds
    assert not (tmp_path / "a").exists()


def test_dry_run_halves_the_batch_as_the_run_would(config, monkeypatch):
    real = ForwardPass.launch

    def small_only(self, block):
        if self.batch_size > limit:
            raise torch.OutOfMemoryError("no")
        return real(self, block)

    monkeypatch.setattr(ForwardPass, "launch", small_only)
    limit = 2
    planned = estimate(replace(config, batch_size=8))
    assert planned.batch_size == 2
    assert planned.seconds
    limit = 0
    with pytest.raises(ResourceError, match="runs out of memory on cpu with a single row"):
        estimate(config)


def test_batch_size_is_a_power_of_two_within_shard_and_plan(tiny_gpt2):
    from tcsae.extract.model.load import load_language_model

    lm = load_language_model(ModelSource(str(tiny_gpt2), device="cpu"), deepest_layer=0)
    assert choose_batch_size(lm, StoreLayout(24, 128, 16, 512), 10**6) == 8
    assert choose_batch_size(lm, StoreLayout(24, 128, 4, 4), 10**6) == 4
    assert choose_batch_size(lm, StoreLayout(24, 128, 16, 512), 3) == 4
    assert choose_batch_size(lm, StoreLayout(24, 100_000, 1, 1), 9) == 1


def test_short_last_batches_run_at_full_shape(config, monkeypatch):
    """A row's bits may not depend on how many rows came with it: every pass has the same shape."""
    shapes, real = set(), torch.nn.Embedding.forward

    def watched(self, ids):
        shapes.add(tuple(ids.shape))
        return real(self, ids)

    load = run_module.load_language_model

    def loaded(*args, **kwargs):  # loading itself runs a few tokens through the blocks
        lm = load(*args, **kwargs)
        monkeypatch.setattr(torch.nn.Embedding, "forward", watched)
        return lm

    monkeypatch.setattr(run_module, "load_language_model", loaded)
    extract(replace(config, tokens=9 * CONTEXT, batch_size=4))
    assert shapes == {(4, CONTEXT)}


@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family_has_a_batch_size_on_a_gpu(family, monkeypatch):
    """By what its configuration says of itself: without heads, with sizes per layer, by other names."""
    try:
        config = CONFIG_MAPPING[family]()
        config.get_text_config()
    except Exception as unmade:
        pytest.skip(f"no configuration of one text model by default: {unmade}")
    sizes = {}
    for attention in ("sdpa", "eager"):
        for free in (2**34, 2**37):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
            lm = SimpleNamespace(
                model=SimpleNamespace(config=config), d_model=2304, device=torch.device("cuda"), dtype=torch.bfloat16,
                identity=SimpleNamespace(attn_implementation=attention),
            )  # fmt: skip
            sizes[attention, free] = choose_batch_size(lm, StoreLayout(2304, 1024, 16, 512), 10**6)
    assert all(1 <= size <= 32 and size & (size - 1) == 0 for size in sizes.values())
    for attention in ("sdpa", "eager"):
        assert sizes[attention, 2**34] <= sizes[attention, 2**37]
    assert sizes["eager", 2**34] <= sizes["sdpa", 2**34]


@pytest.mark.skipif(not hasattr(PretrainedConfig, "is_heterogeneous"), reason="no sizes by layer in this transformers")
def test_layers_that_differ_are_counted_by_their_largest(monkeypatch):
    """Transformers refuses to name one number of heads for such a model."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**34, 2**34))

    def size(heads, per_layer=None):
        config = CONFIG_MAPPING["llama"](num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=heads)
        config.per_layer_config = per_layer
        lm = SimpleNamespace(
            model=SimpleNamespace(config=config), d_model=2304, device=torch.device("cuda"), dtype=torch.bfloat16,
            identity=SimpleNamespace(attn_implementation="eager"),
        )  # fmt: skip
        return choose_batch_size(lm, StoreLayout(2304, 1024, 16, 512), 10**6)

    assert size(512) < size(32)
    assert size(32, per_layer={1: {"num_attention_heads": 512}}) == size(512)
