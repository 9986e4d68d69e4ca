"""Run folders: what is written is what SAELens reads, bit for bit, and damage is refused in one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from saes import KINDS, random_sae
from safetensors.torch import load_file, save_file
from tcsae.errors import RunError, UsageError
from tcsae.train.run_folder.record import RunRecord, find_runs, load_run
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
def test_saved_and_loaded_weights_are_the_same_bits(tmp_path, activation):
    sae = random_sae(activation).eval()
    sae.save(tmp_path / "run")
    again = TemporalSAE.load(tmp_path / "run")
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(sae, name))
    x = torch.randn(7, 6)
    assert torch.equal(again(x).features, sae(x).features)
    assert torch.equal(again(x).reconstruction, sae(x).reconstruction)
    again.save(tmp_path / "twice")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_the_folder_has_the_keys_sae_lens_reads(tmp_path):
    random_sae(Activation("topk", k=3)).save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "topk"
    assert (config["k"], config["d_in"], config["d_sae"]) == (3, 6, 10)
    assert config["apply_b_dec_to_input"] is True
    assert config["normalize_activations"] == config["reshape_activations"] == "none"
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert config["metadata"]["layer"] == 3
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": [6, 10], "b_enc": [10], "W_dec": [10, 6], "b_dec": [6]}


def test_sizes_of_nested_groups_are_kept_and_read_where_sae_lens_has_them(tmp_path):
    sae = random_sae(Activation("batchtopk", k=3)).eval()
    sae.metadata["matryoshka_widths"] = [2, 10]
    sae.save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["metadata"]["matryoshka_widths"]) == ("jumprelu", [2, 10])
    assert TemporalSAE.load(tmp_path).prefix_sizes == (2, 10)
    metadata = {key: value for key, value in config["metadata"].items() if key != "matryoshka_widths"}
    edit(tmp_path, architecture="matryoshka_batchtopk", metadata=metadata, matryoshka_widths=[5, 10])
    assert TemporalSAE.load(tmp_path).prefix_sizes == (5, 10)
    assert random_sae().prefix_sizes == (10,)


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
def test_rescaling_moves_the_input_scale_into_the_weights(activation):
    sae = random_sae(activation).double().eval()
    x = torch.randn(50, 6, dtype=torch.float64)
    raw = sae.rescaled(0.37).double()
    assert torch.equal(raw.W_enc, sae.W_enc * 0.37)
    assert torch.equal(raw.W_dec, sae.W_dec / 0.37)
    assert torch.equal(raw.b_enc, sae.b_enc)
    torch.testing.assert_close(raw(x).features, sae(x * 0.37).features)
    torch.testing.assert_close(raw(x).reconstruction, sae(x * 0.37).reconstruction / 0.37)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "cfg.json").unlink(), "holds no SAE"),
        (lambda folder: (folder / "cfg.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "cfg.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "cfg.json").write_text("{}"), "lacks 'd_in'"),
        (lambda folder: (folder / "sae_weights.safetensors").unlink(), "incomplete"),
        (lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"torn"), "damaged"),
        (lambda folder: edit(folder, architecture="transcoder"), "'transcoder'"),
        (lambda folder: edit(folder, architecture="gated"), "has no 'r_mag'"),
        (lambda folder: edit(folder, d_in="6"), "'d_in' is '6', a whole number"),
        (lambda folder: edit(folder, architecture="topk"), "lacks 'k'"),
        (lambda folder: edit(folder, architecture="topk", k=11), "k = 11 features of a token, but has only 10"),
        (lambda folder: edit(folder, activation_fn_str="tanh-relu"), "activation 'tanh-relu'"),
        (lambda folder: edit(folder, finetuning_scaling_factor=True), "scales its features"),
        (lambda folder: edit(folder, metadata=[]), "'metadata' is \\[\\]"),
        (lambda folder: edit(folder, metadata={"layer": "3"}), "'layer' is '3'"),
        (lambda folder: edit(folder, matryoshka_widths=[3, 2, 10]), r"'matryoshka_widths' is \[3, 2, 10\], sizes of"),
        (lambda folder: edit(folder, d_sae=11), "different SAEs"),
        (lambda folder: edit(folder, normalize_activations="layer_norm"), "layer_norm"),
        (lambda folder: poison(folder), "NaN or infinity"),
    ],
)
def test_damage_is_one_sentence(tmp_path, damage, sentence):
    random_sae().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(RunError, match=sentence) as caught:
        TemporalSAE.load(tmp_path)
    assert "\n" not in str(caught.value)


def edit(folder, **changes):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def poison(folder):
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["b_enc"][0] = float("nan")
    save_file(tensors, path)


def test_another_width_is_refused_naming_both():
    with pytest.raises(RunError, match=r"are 5 wide, the SAE expects 6"):
        random_sae().encode(torch.randn(2, 5))


@pytest.mark.parametrize(
    "bad", [{"kind": "swish"}, {"kind": "topk"}, {"kind": "topk", "k": 0}, {"kind": "relu", "k": 3}]
)
def test_meaningless_activations_are_refused(bad):
    with pytest.raises(UsageError):
        Activation(**bad)


def a_record(name: str, **changes) -> RunRecord:
    fields = {
        "name": name, "role": "tc", "twin": None, "layer": 3, "store": "cache/l3.zarr", "store_fingerprint": "f",
        "store_rows": 4, "store_manifest": {}, "config": {}, "input_scale": 1.0, "seed": 0,
        "steps": 5, "planned_steps": 5, "tokens": 10,
        "finished": True, "metrics": {"l0": 3.0, "cosine": None}, "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return RunRecord(**(fields | changes))


def test_records_come_back_and_unfinished_runs_are_not_found(tmp_path):
    a_record("b").save(tmp_path / "b")
    a_record("a").save(tmp_path / "a")
    a_record("c", finished=False).save(tmp_path / "c")
    assert load_run(tmp_path / "a") == a_record("a")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/train.json").write_text("{")
    assert [path.name for path in find_runs(tmp_path)] == ["a", "b", "d"], (
        "a damaged one is for its reader to complain of"
    )
    assert find_runs(tmp_path / "nowhere") == []


def test_damaged_records_are_one_sentence(tmp_path):
    with pytest.raises(RunError, match="is no training run"):
        load_run(tmp_path)
    (tmp_path / "train.json").write_text('{"format_version": 2}')
    with pytest.raises(RunError, match="update tcsae"):
        load_run(tmp_path)
    (tmp_path / "train.json").write_text('{"name": "x"}')
    with pytest.raises(RunError, match="not a valid run record"):
        load_run(tmp_path)
