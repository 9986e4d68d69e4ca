"""Stores on the hub: whole, with a card that shows what it quotes, and one sentence for what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import snapshot_download
from stores import make_manifest, make_store
from tcsae.cache.push import push_stores, store_card
from tcsae.cache.store import ActivationStore
from tcsae.cache.verify import verify
from tcsae.errors import StoreError, UsageError
from tcsae.pipeline import main


def a_store(folder: Path, name: str = "l3.zarr", **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return Path(make_store(folder / f"of {name}", rows=20, **options)).rename(folder / name)


def test_a_pushed_store_comes_back_whole(tmp_path, hub, capsys):
    path = a_store(tmp_path)
    (path / "activations/x.partial").write_bytes(b"in the making")
    (path / "activations/writer.lock").write_bytes(b"")
    assert main(["push", str(path), "--to", "me/acts", "--private", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["page"], facts["stores"]) == (f"{hub.url}/datasets/me/acts", ["l3.zarr"])
    assert hub.private == {"datasets/me/acts"}
    there = hub.repositories["datasets/me/acts"]
    assert not [name for name in there if name.endswith((".partial", ".lock"))]
    again = Path(snapshot_download("me/acts", repo_type="dataset", allow_patterns="l3.zarr/*")) / "l3.zarr"
    assert verify(again).ok
    assert ActivationStore.open(again).fingerprint() == ActivationStore.open(path).fingerprint()


def test_the_card_names_the_stores_of_earlier_pushes_too(tmp_path, hub):
    ActivationStore.open(a_store(tmp_path, "l3.zarr", layer=3)).push_to_hub("me/acts")
    ActivationStore.open(a_store(tmp_path, "l5.zarr", layer=5)).push_to_hub("me/acts")
    card = hub.repositories["datasets/me/acts"]["README.md"].decode()
    assert "| l3.zarr | tiny | blocks.3.hook_resid_post | 20 × 16 × 8 | made up (train), document packing |" in card
    assert "| l5.zarr | tiny | blocks.5.hook_resid_post |" in card


def test_the_card_shows_what_it_quotes_and_no_folder_of_this_machine():
    manifest = make_manifest(model_id="/home/someone/llama")
    text = manifest.text.model_copy(update={"dataset": "a | <img src=x>\n# b"})
    card = store_card("me/acts", {'x".zarr': manifest.model_copy(update={"text": text})})
    assert "| llama, from a local folder |" in card
    assert "| a \\| \\<img src=x\\>\\\\x0a\\# b (train), document packing |" in card
    assert "/home" not in card
    assert 'allow_patterns="x\\".zarr/*"' in card
    demo = store_card("me/acts", {"l3.zarr": make_manifest(model_id="demo")})
    assert "| HuggingFaceTB/SmolLM2-135M-Instruct, a quantised copy (tcsae's demo) |" in demo


@pytest.mark.parametrize(("repository", "token", "sentence"), [
    ("you/acts", "hf_mine", "your token may not write to you/acts; use one with write access to you, or name another"),
    ("me/acts", "hf_other", "it knows no token that may write to me/acts; run `hf auth login`, or set HF_TOKEN"),
    ("no name", "hf_mine", "no name is no name of a hub repository: write OWNER/NAME"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_sentence(tmp_path, hub, monkeypatch, capsys, repository, token, sentence):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(a_store(tmp_path)), "--to", repository, "--quiet"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(StoreError, match=sentence):
        ActivationStore.open(tmp_path / "l3.zarr").push_to_hub(repository)


def test_out_of_reach_is_one_sentence(tmp_path, hub, monkeypatch):
    from huggingface_hub import constants

    store = ActivationStore.open(a_store(tmp_path))
    for name, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")):
        with monkeypatch.context() as patch:
            patch.setattr(constants, name, value)
            with pytest.raises(StoreError, match=r"it cannot be reached \(.*try again$"):
                store.push_to_hub("me/acts")


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(tmp_path, hub, memory):
    unfinished = ActivationStore.open(make_store(tmp_path / "u", rows=8, finish=False), allow_unfinished=True)
    with pytest.raises(StoreError, match="holds 8 of 8 rows: finish it"):
        push_stores([unfinished], "me/acts")
    fsspec.filesystem("memory").put(str(a_store(tmp_path)), f"{memory}/l3.zarr", recursive=True)
    remote = ActivationStore.open(f"{memory}/l3.zarr")
    with pytest.raises(StoreError, match="is not on this machine"):
        push_stores([remote], "me/acts")
    twice = [ActivationStore.open(a_store(tmp_path / folder)) for folder in ("a", "b")]
    with pytest.raises(UsageError, match=r"two of the stores are called l3\.zarr"):
        push_stores(twice, "me/acts")
    assert not hub.repositories
