"""Models spread over the CPU and the disk, or quantised: the same activations and predictions, and what is recorded."""

import importlib.util
import json

import pytest
import torch
from tcsae.cache.format.manifest import Execution, ModelIdentity
from tcsae.cache.store import ActivationStore
from tcsae.errors import MissingPackageError, ModelError, UsageError
from tcsae.evaluate.model.splice import Head, SplicedModel
from tcsae.extract.config import ModelSource
from tcsae.extract.model.hooks import capture
from tcsae.extract.model.load import load_language_model
from tcsae.pipeline import main
from tcsae.sites import Location

LAYERS = 4
ON_DISK = {"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
ON_DISK |= {f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(LAYERS)}


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """A map that puts half of the blocks, the embedding and the head on the disk."""
    file = tmp_path_factory.mktemp("map") / "places.json"
    file.write_text(json.dumps(ON_DISK))
    return str(file)


@pytest.fixture(scope="module")
def both(tiny_gemma2, spread):
    """The model on one device, and spread."""
    plain = {"id": str(tiny_gemma2), "device": "cpu", "dtype": "float32"}
    return load_language_model(ModelSource(**plain)), load_language_model(ModelSource(**plain, device_map=spread))


def tokens_of(lm):
    return torch.randint(4, lm.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


def test_the_map_is_one(both):
    assert not any(p.is_meta for p in both[0].model.parameters())
    away = {name for name, p in both[1].model.named_parameters() if p.is_meta}
    assert any(name.startswith("model.layers.1.") for name in away)
    assert not any(name.startswith("model.layers.2.") for name in away)
    assert both[1].device == torch.device("cpu")


def test_activations_and_splices_are_those_of_one_device(both):
    everywhere = [Location(layer) for layer in range(LAYERS)]
    tokens = tokens_of(both[0])
    caught = [capture(lm, tokens, everywhere) for lm in both]
    assert all(torch.equal(caught[0][at], caught[1][at]) for at in everywhere)
    found = []
    for lm in both:
        model, head = SplicedModel(lm), Head(lm)
        assert model.verify(tokens, everywhere) == []
        clean = model.clean(tokens, everywhere)
        head.verify(tokens, clean.final_BTD)
        assert head.note is None
        spliced = model.spliced(Location(1), clean.at[Location(1)] * 0.5, tokens, clean)
        found.append((head(spliced.flatten(0, 1)), model.activations(tokens, [Location(1)])[Location(1)]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_inside_a_block_that_is_in_memory_but_not_one_that_is_on_disk(both):
    tokens = tokens_of(both[0])
    at = Location(2, "mlp_out")
    assert torch.equal(capture(both[0], tokens, [at])[at], capture(both[1], tokens, [at])[at])
    with pytest.raises(ModelError, match=r"block 1 of .* is offloaded and cannot be taken apart"):
        capture(both[1], tokens, [Location(1, "mlp_out")])


def test_stores_are_the_same_and_say_how_they_were_made(tiny_gemma2, corpus, spread, tmp_path):
    what = ["extract", "--layers", "1", "2", "--model", str(tiny_gemma2), "--dataset", str(corpus), "--context", "16"]
    what += ["--tokens", "500", "--held-out", "0.3", "--device", "cpu", "--dtype", "float32"]
    maps = {"plain": [], "auto": ["--device-map", "auto"], "file": ["--device-map", spread]}
    for name, more in maps.items():
        assert main([*what, *more, "--out", str(tmp_path / name)]) == 0
    stores = {name: ActivationStore.open(tmp_path / name / "l2.zarr") for name in maps}
    rows = {name: store.rows(0, store.n_rows) for name, store in stores.items()}
    assert all(torch.equal(rows["plain"], each) for each in rows.values())
    said = {name: store.manifest.execution.device_map for name, store in stores.items()}
    assert said == {"plain": "", "auto": "auto", "file": spread}
    assert "device_map" not in (tmp_path / "plain/l2.zarr/zarr.json").read_text()
    assert len({store.fingerprint() for store in stores.values()}) == 1
    train = ["--steps", "3", "--batch-size", "60", "--width", "32", "--k", "4", "--no-baseline", "--device", "cpu"]
    store = f"{tmp_path}/plain/l1.zarr"
    assert main(["train", "--store", store, *train, "--out", str(tmp_path / "runs")]) == 0
    results = []
    for name, more in (("one", []), ("spread", ["--device-map", spread])):
        small = ["--batches", "1", "--batch-size", "4", "--only", "fidelity", "--device", "cpu", "--dtype", "float32"]
        options = ["--runs", str(tmp_path / "runs"), "--references", "mean", "--out", str(tmp_path / name), *small]
        assert main(["evaluate", *options, *more]) == 0
        (file,) = (tmp_path / name).glob("*/results.json")
        results.append([one["metrics"] for one in json.loads(file.read_text())["records"]])
    drop = [[{k: v for k, v in one.items() if not k.startswith(("cost", "train"))} for one in each] for each in results]
    assert drop[0] == drop[1]


def test_records_of_models_on_one_device_are_as_before():
    execution = Execution(batch_size=1, threads=1, device="cpu")
    assert set(execution.model_dump()) == {"batch_size", "threads", "device", "device_name"}
    assert Execution(**execution.model_dump()) == execution
    about = dict.fromkeys(("id", "fingerprint", "architecture", "attn_implementation", "dtype"), "x")
    identity = ModelIdentity(**about, tokenizer_fingerprint="t", n_layers=1, vocab_size=9)
    assert "load_in" not in identity.model_dump(mode="json")
    quantised = identity.model_copy(update={"load_in": "8bit"})
    assert ModelIdentity.model_validate(quantised.model_dump(mode="json")) == quantised != identity


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_one_sentence_names_it(tiny_gemma2):
    with pytest.raises(
        MissingPackageError, match=r"--load-in 8bit needs bitsandbytes.*pip install 'tcsae\[quantised\]'"
    ):
        load_language_model(ModelSource(str(tiny_gemma2), device="cpu", load_in="8bit"))


def test_without_accelerate_one_sentence_names_it(tiny_gemma2, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else real(name))
    with pytest.raises(MissingPackageError, match=r"--device-map needs accelerate.*pip install 'tcsae\[large\]'"):
        load_language_model(ModelSource(str(tiny_gemma2), device="cpu", device_map="auto"))


def test_maps_that_cannot_be(tiny_gemma2, tmp_path):
    with pytest.raises(UsageError, match="--device-map everywhere is unknown: choose one of auto, balanced"):
        ModelSource(device_map="everywhere")
    with pytest.raises(UsageError, match="--load-in 3bit is unknown"):
        ModelSource(load_in="3bit")
    with pytest.raises(UsageError, match="not for GGUF files"):
        ModelSource(id="model.gguf", device_map="auto")
    with pytest.raises(UsageError, match="there is no file"):
        load_language_model(ModelSource(str(tiny_gemma2), device_map=str(tmp_path / "none.json")))
    (tmp_path / "odd.json").write_text('{"model": [1]}')
    with pytest.raises(UsageError, match="is no map of modules to devices"):
        load_language_model(ModelSource(str(tiny_gemma2), device_map=str(tmp_path / "odd.json")))
