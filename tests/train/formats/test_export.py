"""Exports: what goes out computes what the run computes, and comes back bit for bit where the format allows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from saes import random_sae
from stores import make_store
from tcsae.errors import RunError, UsageError
from tcsae.pipeline import main
from tcsae.train.formats.export import export
from tcsae.train.formats.locate import load_external
from tcsae.train.formats.model_card import model_card
from tcsae.train.formats.registry import FORMATS
from tcsae.train.presets import build_config
from tcsae.train.run import train
from tcsae.train.run_folder.record import load_run
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE

DICTIONARY_LEARNING = FORMATS.get("dictionary-learning")
KINDS = [Activation("relu"), Activation("topk", k=3), Activation("jumprelu")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    store = make_store(folder / "cache", rows=64, context=16, d_model=8)
    changes = {
        "data.store": str(store),
        "run.out": str(folder / "runs"),
        "data.batch_size": 60,
        "sae.k": 4,
        "run.steps": 3,
    }
    return train(build_config(None, None, changes | {"run.baseline": False})).runs[0]


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
def test_dictionary_learning_round_trip(tmp_path, activation):
    sae = random_sae(activation).eval()
    DICTIONARY_LEARNING.write(sae, tmp_path)
    again = TemporalSAE.load(tmp_path)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again(x).features, sae(x).features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again(x).reconstruction, sae(x).reconstruction, atol=1e-5, rtol=1e-5)
    exact = ("W_enc", "W_dec", "b_dec") if activation.kind == "jumprelu" else ("W_enc", "W_dec", "b_enc", "b_dec")
    for name in exact:
        assert torch.equal(getattr(again, name), getattr(sae, name))
    if activation.kind == "jumprelu":
        assert not again.subtract_b_dec
        DICTIONARY_LEARNING.write(again, tmp_path / "twice")
        for name, value in TemporalSAE.load(tmp_path / "twice").state_dict().items():
            assert torch.equal(value, again.state_dict()[name])


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
def test_the_files_are_the_ones_dictionary_learning_reads(tmp_path, activation):
    DICTIONARY_LEARNING.write(random_sae(activation), tmp_path)
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    linear = {"encoder.weight": [10, 6], "encoder.bias": [10], "decoder.weight": [6, 10]}
    expected = {
        "relu": linear | {"bias": [6]},
        "topk": linear | {"b_dec": [6], "k": [], "threshold": []},
        "jumprelu": {"W_enc": [6, 10], "b_enc": [10], "W_dec": [10, 6], "b_dec": [6], "threshold": [10]},
    }
    assert {name: list(value.shape) for name, value in state.items()} == expected[activation.kind]
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    names = {"relu": "AutoEncoder", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}
    assert (trainer["dict_class"], trainer["k"]) == (names[activation.kind], activation.k)


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
def test_dictionary_learning_itself_computes_the_same(tmp_path, activation):
    utils = pytest.importorskip("dictionary_learning.utils")
    sae = random_sae(activation).eval()
    DICTIONARY_LEARNING.write(sae, tmp_path)
    theirs, _ = utils.load_dictionary(str(tmp_path), "cpu")
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(x), sae(x).reconstruction, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_expressed_is_refused(tmp_path):
    with pytest.raises(RunError, match="export the finished run"):
        DICTIONARY_LEARNING.write(random_sae(Activation("batchtopk", k=2)), tmp_path)
    sae = random_sae()
    sae.subtract_b_dec = False
    with pytest.raises(RunError, match="use saelens"):
        DICTIONARY_LEARNING.write(sae, tmp_path)
    DICTIONARY_LEARNING.write(random_sae(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"trainer": config["trainer"] | {"dict_class": "Transcoder"}}))
    with pytest.raises(RunError, match="of class 'Transcoder'"):
        TemporalSAE.load(tmp_path)


def test_a_saelens_export_is_the_run_folders_weights(run, tmp_path):
    folder = export(run, "saelens", tmp_path / "out")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


def test_the_card_says_where_the_sae_comes_from(run, tmp_path):
    card = (export(run, "dictionary-learning", tmp_path) / "README.md").read_text()
    assert (export(run, "dictionary_learning", tmp_path / "other dash") / "README.md").read_text() == card
    record = load_run(run)
    for words in (record.name, "blocks.3.hook_resid_post", "made up", "pairwise", "topk (k = 4)", "load_dictionary"):
        assert words in card
    assert card.startswith("---\nlibrary_name")


def test_unfinished_runs_and_unknown_formats_are_refused(run, tmp_path):
    with pytest.raises(UsageError, match="'npz' is unknown: choose one of saelens, dictionary-learning"):
        export(run, "npz")
    with pytest.raises(UsageError, match="'gemma-scope' is only read"):
        export(run, "gemma-scope")
    load_run(run).model_copy(update={"finished": False}).save(tmp_path)
    with pytest.raises(RunError, match="finish it with the same train command"):
        export(tmp_path, "saelens")
    with pytest.raises(RunError, match="is no training run"):
        export(tmp_path / "nothing", "saelens")


def test_only_an_earlier_export_of_the_run_is_overwritten(run, tmp_path):
    before = (run / "train.json").read_bytes(), (run / "cfg.json").read_bytes()
    for out in (run, run.parent):
        with pytest.raises(RunError, match=r"is not overwritten: name another folder with --out"):
            export(run, "saelens", out)
    assert before == ((run / "train.json").read_bytes(), (run / "cfg.json").read_bytes())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md.0a1b2c3d.partial").write_text("killed before its first file was there")
    folder = export(run, "saelens", tmp_path / "out")
    assert not list(folder.glob("*.partial"))
    (folder / "cfg.json").unlink()  # as if it had been cut short
    assert export(run, "saelens", folder) == folder
    TemporalSAE.load(folder)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace(f"# {load_run(run).name}", "# another"))
    with pytest.raises(RunError, match=r"holds the model card of another SAE, README.md and is not overwritten"):
        export(run, "saelens", folder)
    random_sae().save(tmp_path / "theirs")
    with pytest.raises(RunError, match="holds other files and is not overwritten"):
        export(run, "saelens", tmp_path / "theirs")


def test_a_card_shows_what_it_quotes_and_does_not_understand_it(run):
    record = load_run(run)
    text = record.store_manifest["text"] | {"dataset": "a | b\n# <img src=x> [here](http://x) `c`"}
    model = record.store_manifest["model"] | {"id": "x\n---\nlicense: mine"}
    changed = record.model_copy(update={"store_manifest": record.store_manifest | {"text": text, "model": model}})
    card = model_card(changed, "saelens")
    assert "| text | a \\| b\\\\x0a\\# \\<img src=x\\> \\[here\\](http://x) \\`c\\`, rows" in card
    assert card.count("\n---\n") == model_card(record, "saelens").count("\n---\n")
    assert "base_model" not in card
    assert "| language model | x\\\\x0a---\\\\x0alicense: mine, from a local folder |" in card


def test_an_uploaded_run_is_read_by_its_name(run, tmp_path, hub):
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--push-to-hub", "me/mine", "--json"]) == 0
    there = hub.repositories["models/me/mine"]
    assert sorted(there) == ["README.md", "cfg.json", "sae_weights.safetensors"]
    again, ours = TemporalSAE.load("me/mine"), TemporalSAE.load(run)
    assert torch.equal(again.W_dec, ours.W_dec)
    assert again.metadata["model_name"] == "tiny"


def test_an_sae_is_uploaded_without_its_run(tmp_path, hub):
    sae = random_sae()
    sae.metadata |= {"model_name": "/home/someone/llama", "dataset_path": "a | b"}
    assert sae.push_to_hub("me/plain", private=True) == f"{hub.url}/me/plain"
    assert hub.private == {"models/me/plain"}
    assert torch.equal(TemporalSAE.load("me/plain").W_enc, sae.W_enc)
    card = hub.repositories["models/me/plain"]["README.md"].decode()
    assert "# plain\n" in card
    assert "| language model | llama, from a local folder |" in card
    assert "| text | a \\| b |" in card
    assert "base_model" not in card


def test_what_the_hub_has_not_is_one_sentence(hub):
    with pytest.raises(RunError, match="there is no SAE at me/none, neither a local path nor on the hub"):
        TemporalSAE.load("me/none")


def test_uploading_without_a_network_is_one_sentence(run, tmp_path):
    with pytest.raises(RunError, match=r"is complete here and not on the hub: it cannot be reached") as caught:
        export(run, "saelens", tmp_path, push_to_hub="me/mine")
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="write OWNER/NAME"):
        export(run, "saelens", tmp_path, push_to_hub="not a name")


def changed_model(run, tmp_path, model):
    """The run, as if its store had been made with another model."""
    folder = shutil.copytree(run, tmp_path / "changed")
    record = load_run(folder)
    manifest = record.store_manifest | {"model": record.store_manifest["model"] | {"id": model}}
    record.model_copy(update={"store_manifest": manifest}).save(folder)
    return folder


@pytest.mark.parametrize(("model", "name"), [
    ("demo", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("demo-gemma3", "google/gemma-3-270m"), ("gpt2", "gpt2"),
    ("google/gemma-2-2b", "google/gemma-2-2b"),
])  # fmt: skip
def test_models_are_named_as_the_hub_does(run, tmp_path, model, name):
    folder = export(changed_model(run, tmp_path, model), "saelens", tmp_path / "out")
    assert f'base_model: "{name}"\n' in (folder / "README.md").read_text()
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert metadata["model_name"] == name
    assert load_external(str(folder)).model_name == model  # which is the one that is loaded here


def test_a_model_of_a_local_folder_is_named_by_the_user_or_by_nobody(run, tmp_path, hub):
    changed = changed_model(run, tmp_path, "/home/someone/llama")
    export(changed, "saelens", tmp_path / "out", push_to_hub="me/mine")
    there = hub.repositories["models/me/mine"]
    assert b"base_model" not in there["README.md"]
    assert b"/home/" not in there["README.md"] + there["cfg.json"]
    named = export(changed, "saelens", tmp_path / "named", base_model="someone/llama")
    assert 'base_model: "someone/llama"' in (named / "README.md").read_text()
    assert TemporalSAE.load(named).metadata["model_name"] == "someone/llama"
    with pytest.raises(UsageError, match="--base-model /home/x is no name of a model on the hub: write OWNER/NAME"):
        export(changed, "saelens", tmp_path / "other", base_model="/home/x")


def test_the_place_is_named_for_the_loader_that_the_files_name(run, tmp_path):
    def metadata(folder):
        kept = json.loads((folder / "cfg.json").read_text())["metadata"]
        return kept["model_class_name"], kept["hook_name"], kept["model_from_pretrained_kwargs"]

    theirs = ("HookedTransformer", "blocks.3.hook_resid_post", {"center_writing_weights": False})
    assert metadata(run) == metadata(export(run, "saelens", tmp_path / "a")) == theirs
    modules = export(run, "saelens", tmp_path / "b", module="model.layers.3")
    assert metadata(modules) == ("AutoModelForCausalLM", "model.layers.3", {})
    assert load_external(str(modules)).at == load_external(str(run)).at
    for module, sentence in (("model.layers.4", "is layer 4, the run is of layer 3"), ("x", "no module of a block")):
        with pytest.raises(UsageError, match=sentence):
            export(run, "saelens", tmp_path / "c", module=module)


def test_the_command_exports_next_to_the_run(run, capsys):
    assert main(["export", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(run / "saelens")
    TemporalSAE.load(run / "saelens")
