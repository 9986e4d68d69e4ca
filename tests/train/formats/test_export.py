"""Exports: what goes out computes what the run computes, and comes back bit for bit where the format allows."""

from __future__ import annotations

import json

import pytest
import torch
from saes import random_sae
from stores import make_store
from tcsae.errors import RunError, UsageError
from tcsae.pipeline import main
from tcsae.train.formats.export import export, model_card
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
    folder = export(run, "saelens", tmp_path / "out")
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
    assert 'base_model: "x\\n---\\nlicense: mine"' in card


def test_uploading_makes_the_repository_and_sends_the_folder(run, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo, exist_ok: calls.append(("create", repo))
    )
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda self, repo_id, folder_path: calls.append((repo_id, folder_path))
    )
    assert main(["export", str(run), "--out", str(tmp_path), "--push-to-hub", "me/mine", "--json"]) == 0
    assert calls == [("create", "me/mine"), ("me/mine", str(tmp_path))]


def test_uploading_without_a_network_is_one_sentence(run, tmp_path):
    with pytest.raises(RunError, match=r"the hub refuses me/mine .* is complete") as caught:
        export(run, "saelens", tmp_path, push_to_hub="me/mine")
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="write OWNER/NAME"):
        export(run, "saelens", tmp_path, push_to_hub="not a name")


def test_the_command_exports_next_to_the_run(run, capsys):
    assert main(["export", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(run / "saelens")
    TemporalSAE.load(run / "saelens")
