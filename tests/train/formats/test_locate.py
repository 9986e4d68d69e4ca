import json
import pickle

import numpy as np
import pytest
import torch
from saes import random_sae
from safetensors.torch import save_file
from tcsae.errors import RunError, UsageError
from tcsae.train.formats.locate import load_external
from tcsae.train.formats.registry import FORMATS
from tcsae.train.sae.temporal_sae import TemporalSAE
from torch.nn.functional import relu

D, F, K = 6, 10, 3
HOOK = {"metadata": {"hook_name": "blocks.7.hook_resid_post", "model_name": "tiny"}}


def weights(seed=0):
    draw = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    return {"W_enc": make(D, F), "W_dec": make(F, D), "b_enc": make(F) * 0.1, "b_dec": make(D) * 0.1}


def saelens(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **HOOK, **config}))
    return str(folder)


def x():
    return torch.randn(5, D, generator=torch.Generator().manual_seed(9))


def agrees(found, z, x_hat):
    with torch.no_grad():
        codes = found.sae.encode(x())
        assert torch.allclose(found.sae.decode(codes), x_hat, atol=1e-5)
        assert torch.allclose(codes, z, atol=1e-5)


def top_k(pre):
    kept = pre.topk(K, dim=-1)
    return torch.zeros_like(pre).scatter(-1, kept.indices, relu(kept.values))


def test_saelens_standard(tmp_path):
    w = weights()
    found = load_external(saelens(tmp_path / "sae", w, architecture="standard", apply_b_dec_to_input=True))
    z = relu((x() - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    agrees(found, z, z @ w["W_dec"] + w["b_dec"])
    assert (found.layer, found.source, found.name, found.model_name) == (7, "saelens", "sae", "tiny")


@pytest.mark.parametrize("rescale", [False, True])
def test_saelens_topk(tmp_path, rescale):
    w = weights()
    config = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": False}
    found = load_external(saelens(tmp_path / "sae", w, **config))
    norms = w["W_dec"].norm(dim=1) if rescale else torch.ones(F)
    z = top_k((x() @ w["W_enc"] + w["b_enc"]) * norms)
    agrees(found, z, (z / norms) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize(
    ("architecture", "name"), [("jumprelu", "threshold"), ("matryoshka_batchtopk", "topk_threshold")]
)
def test_saelens_thresholds(tmp_path, architecture, name):
    w = weights() | {name: torch.full((F,), 0.7) if name == "threshold" else torch.tensor(0.7)}
    found = load_external(saelens(tmp_path / "sae", w, architecture=architecture, apply_b_dec_to_input=True))
    pre = (x() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    z = relu(pre) * (pre > 0.7)
    agrees(found, z, z @ w["W_dec"] + w["b_dec"])


def test_saelens_gated(tmp_path):
    w = weights()
    gated = {"W_enc": w["W_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    gated |= {
        name: torch.randn(F, generator=torch.Generator().manual_seed(at))
        for at, name in enumerate(["r_mag", "b_gate", "b_mag"])
    }
    found = load_external(saelens(tmp_path / "sae", gated, architecture="gated", apply_b_dec_to_input=True))
    inner = x() - w["b_dec"]
    gate = inner @ w["W_enc"] + gated["b_gate"] > 0
    z = gate * relu(inner @ (w["W_enc"] * gated["r_mag"].exp()) + gated["b_mag"])
    agrees(found, z, z @ w["W_dec"] + w["b_dec"])


def test_gemma_scope(tmp_path):
    w = weights() | {"threshold": torch.full((F,), 0.4)}
    folder = tmp_path / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in w.items()})
    pre = x() @ w["W_enc"] + w["b_enc"]
    z = relu(pre) * (pre > 0.4)
    for path in (folder, folder / "params.npz"):
        found = load_external(str(path))
        agrees(found, z, z @ w["W_dec"] + w["b_dec"])
        assert (found.layer, found.name) == (12, "layer_12/width_16k/average_l0_82")


def dictionary(folder, tensors, kind, **trainer):
    folder.mkdir()
    torch.save(tensors, folder / "ae.pt")
    if kind:
        (folder / "config.json").write_text(
            json.dumps({"trainer": {"dict_class": kind, "layer": 3, "lm_name": "lm", **trainer}})
        )
    return str(folder)


def linear(w):
    return {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}


def test_dictionary_learning(tmp_path):
    w = weights()
    pre = (x() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    decoded = lambda z: z @ w["W_dec"] + w["b_dec"]  # noqa: E731
    plain = load_external(dictionary(tmp_path / "relu", linear(w) | {"bias": w["b_dec"]}, "AutoEncoder"))
    agrees(plain, relu(pre), decoded(relu(pre)))
    counted = linear(w) | {"b_dec": w["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(0.5)}
    agrees(load_external(dictionary(tmp_path / "topk", counted, "AutoEncoderTopK")), top_k(pre), decoded(top_k(pre)))
    z = relu(pre) * (pre > 0.5)
    agrees(load_external(dictionary(tmp_path / "batch", counted, "BatchTopKSAE")), z, decoded(z))
    jump = w | {"threshold": torch.full((F,), 0.5)}
    raw = x() @ w["W_enc"] + w["b_enc"]
    found = load_external(dictionary(tmp_path / "jump", jump, None), 4)
    agrees(found, relu(raw) * (raw > 0.5), decoded(relu(raw) * (raw > 0.5)))
    assert (plain.layer, found.layer, plain.model_name) == (3, 4, "lm")
    with pytest.raises(RunError, match=r"TopK or BatchTopK: put the config\.json"):
        load_external(dictionary(tmp_path / "bare", counted, None), 1)


def test_layer_must_be_known_and_agree(tmp_path):
    path = saelens(tmp_path / "a", weights(), architecture="standard")
    with pytest.raises(UsageError, match="belongs to layer 7"):
        load_external(path, 3)
    (tmp_path / "a" / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, "architecture": "standard"}))
    with pytest.raises(UsageError, match="give --layer"):
        load_external(path)
    assert load_external(path, 3).layer == 3


def test_bad_saes_are_one_sentence(tmp_path):
    with pytest.raises(RunError, match="there is no SAE at"):
        load_external("./nothing/here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="holds no SAE of a known format"):
        load_external(str(tmp_path / "empty"), 0)
    incomplete = weights()
    del incomplete["b_enc"]
    with pytest.raises(RunError, match="has no 'b_enc'"):
        load_external(saelens(tmp_path / "b", incomplete, architecture="standard"))
    with pytest.raises(RunError, match=r"'b_dec' has shape \[10\]"):
        load_external(saelens(tmp_path / "c", weights() | {"b_dec": torch.zeros(F)}, architecture="standard"))
    with pytest.raises(RunError, match="NaN or infinity"):
        load_external(
            saelens(tmp_path / "d", weights() | {"b_enc": torch.full((F,), torch.nan)}, architecture="standard")
        )
    with pytest.raises(RunError, match="architecture 'transcoder'"):
        load_external(saelens(tmp_path / "e", weights(), architecture="transcoder"))
    with pytest.raises(RunError, match="normalises its inputs by 'layer_norm'"):
        load_external(saelens(tmp_path / "f", weights(), architecture="standard", normalize_activations="layer_norm"))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(RunError, match="is damaged or not an npz file"):
        load_external(str(tmp_path / "torn.npz"), 0)


def test_topk_of_before_sae_lens_6_is_topk(tmp_path):
    w = weights()
    old = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    found = load_external(saelens(tmp_path / "sae", w, **old, apply_b_dec_to_input=True))
    z = top_k((x() - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    agrees(found, z, z @ w["W_dec"] + w["b_dec"])


def test_gated_saes_are_read_and_written_but_no_temporal_saes(tmp_path):
    w = weights()
    tensors = {"W_enc": w["W_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    tensors |= {name: torch.full((F,), 0.1) for name in ("r_mag", "b_gate", "b_mag")}
    path = saelens(tmp_path / "sae", tensors, architecture="gated")
    sae = load_external(path).sae
    FORMATS.get("saelens").write(sae, tmp_path / "again")
    again = load_external(str(tmp_path / "again")).sae
    assert torch.equal(again.encode(x()), sae.encode(x()))
    with pytest.raises(RunError, match="holds a GatedSAE, which is no TemporalSAE"):
        TemporalSAE.load(path)


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_that_is_written_is_read_again(tmp_path, name):
    if not FORMATS.get(name).writable:
        pytest.skip("only read")
    sae = random_sae().eval()
    FORMATS.get(name).write(sae, tmp_path)
    found = load_external(str(tmp_path), 3)
    assert (found.source, found.layer, found.model_name) == (name, 3, "demo")
    agrees(found, *(part.detach() for part in (sae.encode(x()), sae.decode(sae.encode(x())))))
    assert {file.name for file in tmp_path.iterdir()} == set(FORMATS.get(name).files)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


def test_nothing_is_unpickled(tmp_path):
    with (tmp_path / "ae.pt").open("wb") as file:
        pickle.dump(Trap(), file, protocol=2)
    np.savez(tmp_path / "params.npz", W_enc=np.array([Trap()], dtype=object))
    for name in ("ae.pt", "params.npz"):
        with pytest.raises(RunError):
            load_external(str(tmp_path / name), 0)


def test_the_hub_is_asked_only_for_what_was_named(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repository, allow_patterns):
        asked.update(repository=repository, patterns=allow_patterns)
        target = tmp_path / "snapshot" / "layer_2" / "width"
        if not target.exists():
            target.mkdir(parents=True)
            np.savez(
                target / "params.npz", **{k: v.numpy() for k, v in (weights() | {"threshold": torch.zeros(F)}).items()}
            )
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_external("owner/release/layer_2/width").layer == 2
    assert asked == {"repository": "owner/release", "patterns": ["layer_2/width", "layer_2/width/*"]}
    with pytest.raises(RunError, match="has nothing under 'layer_3'"):
        load_external("owner/release/layer_3")
