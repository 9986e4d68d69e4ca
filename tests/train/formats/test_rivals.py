"""Checkpoints of other groups compute what their own code computes; what cannot be expressed is one sentence."""

from __future__ import annotations

import json

import published
import pytest
import reference
import torch
import yaml
from safetensors.torch import save_file
from tcsae.errors import RunError
from tcsae.train.formats.locate import load_external
from tcsae.train.formats.registry import FORMATS
from tcsae.train.sae.protocol import RowTokens
from tcsae.train.sae.tfa import TemporalFeatureAnalysis
from tcsae.train.sae.txc import TemporalCrosscoder
from torch.nn.functional import relu

D, F, K, SCALE = 4, 16, 3, 0.25


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def x():
    return random(2, 5, D, seed=9)


# --- Temporal Feature Analysis


def published_tfa(folder, *, kind="topk", file="latest_ckpt.pt", tied=True, nested=True, **settings):
    """A folder as their training writes it, and the SAE that it is on scaled inputs."""
    layer = {
        f"attn_layers.0.{name}.{part}": 0.3 * random(*((F, F) if part == "weight" else (F,)), seed=10 * at + len(part))
        for at, name in enumerate(("k_ctx", "q_target", "v_ctx", "c_proj"))
        for part in ("weight", "bias")
    }
    state = {"D": random(F, D, seed=1), "b": 0.1 * random(1, D, seed=2), **layer}
    state |= {} if tied else {"E": random(D, F, seed=3)}
    folder.mkdir(parents=True)
    if file.endswith("safetensors"):
        save_file(state, folder / file)
    else:
        torch.save({"sae": state, "step": 7} if nested else state, folder / file)
    sae = {"exp_factor": F / D, "n_heads": 2, "sae_diff_type": kind, "kval_topk": K, "tied_weights": tied,
           "n_attn_layers": 1, "bottleneck_factor": 1, "scaling_factor": SCALE}  # fmt: skip
    (folder / "conf.yaml").write_text(yaml.safe_dump({"llm": {"dimin": D}, "sae": sae | settings}))
    model = TemporalFeatureAnalysis(D, F, k=K if kind == "topk" else None, heads=2, tied=tied)
    named = {"W_dec": state["D"], "b_dec": state["b"][0]} | ({} if tied else {"encoder": state["E"]})
    for theirs, ours in (("k_ctx", "keys"), ("q_target", "queries"), ("v_ctx", "values"), ("c_proj", "output")):
        named |= {f"{ours}.{part}": state[f"attn_layers.0.{theirs}.{part}"] for part in ("weight", "bias")}
    model.load_state_dict(named)
    return model.double()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"kind": "relu"}, {"tied": False}, {"nested": False}, {"file": "latest_ckpt.safetensors"}],
    ids=str,
)  # fmt: skip
def test_temporal_feature_analysis(tmp_path, options):
    scaled = published_tfa(tmp_path / "layer_12", **options)
    found = load_external(str(tmp_path / "layer_12"), layer=12)
    assert (found.source, found.layer, found.name) == ("temporal-feature-analysis", 12, "layer_12")
    out = found.sae.on_rows(x(), RowTokens.whole(x()))
    for row in range(2):
        predicted, novel, x_hat = reference.tfa_sequence(scaled, SCALE * x()[row].double())
        torch.testing.assert_close(out.parts["predicted"][row], predicted.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.parts["novel"][row], novel.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.reconstruction[row], x_hat.float() / SCALE, rtol=1e-4, atol=1e-4)


class Harmless:
    """Stands for any object that a pickle may make."""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n_attn_layers": 2}, "and 2 attention layers; topk or relu and one layer can be read"),
        ({"kind": "batchtopk"}, "a novel part by 'batchtopk'"),
        ({"exp_factor": 8}, r"'W_dec' has shape \[16, 4\], the other weights need \[32, 4\]"),
        ({"exp_factor": 1e5}, r"'W_dec' has shape \[16, 4\], the other weights need \[400000, 4\]"),
        ({"exp_factor": "four"}, "'exp_factor' is 'four', a positive number was expected"),
        ({"scaling_factor": None}, "'scaling_factor' is None, a positive number"),
        ({"n_heads": 3}, "16 features cannot be shared by 3 heads"),
        ({"kval_topk": 17}, "k = 17 active features does not fit 16"),
    ],
)
def test_temporal_feature_analysis_that_does_not_fit(tmp_path, change, sentence):
    published_tfa(tmp_path / "sae", **change)
    with pytest.raises(RunError, match=sentence):
        load_external(str(tmp_path / "sae"), layer=1)


def test_a_checkpoint_with_more_than_weights_is_never_unpickled(tmp_path):
    published_tfa(tmp_path / "sae")
    torch.save({"sae": {}, "config": Harmless()}, tmp_path / "sae" / "latest_ckpt.pt")
    with pytest.raises(RunError, match="holds more than weights and is not loaded, for safety"):
        load_external(str(tmp_path / "sae"), layer=1)


@pytest.mark.parametrize("text", ["sae: [", "just words", "!!python/object:os.system {}", "llm: {dimin: 4}"])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    published_tfa(tmp_path / "sae")
    (tmp_path / "sae" / "conf.yaml").write_text(text)
    with pytest.raises(RunError, match=r"conf\.yaml"):
        load_external(str(tmp_path / "sae"), layer=1)


# --- plain SAEs


def weights():
    return {"W_enc": random(D, F, seed=1), "W_dec": random(F, D, seed=2), "b_enc": random(F, seed=3) * 0.1,
            "b_dec": random(D, seed=4) * 0.1}  # fmt: skip


def agrees(found, z, x_hat):
    with torch.no_grad():
        torch.testing.assert_close(found.sae.encode(x()), z)
        torch.testing.assert_close(found.sae.decode(z), x_hat)


@pytest.mark.parametrize("kind", ["TemporalMatryoshkaBatchTopKSAE", "TemporalBatchTopKSAE", None])
def test_temporal_sae(tmp_path, kind):
    w, folder = weights(), tmp_path / "trainer_0"
    folder.mkdir()
    sizes = torch.tensor([4, 12])
    torch.save(w | {"k": torch.tensor(K), "threshold": torch.tensor(0.6), "group_sizes": sizes}, folder / "ae.pt")
    if kind:
        trainer = {
            "dict_class": kind,
            "layer": 12,
            "lm_name": "google/gemma-2-2b",
            "submodule_name": "resid_post_layer_12",
        }
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    found = load_external(str(folder), layer=12)
    pre = relu((x() - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    z = pre * (pre > 0.6)
    agrees(found, z, z @ w["W_dec"] + w["b_dec"])
    assert found.sae.prefix_sizes == (4, 16)
    assert (found.source, found.layer) == ("dictionary-learning", 12)


def test_groups_that_are_no_sizes_are_refused(tmp_path):
    torch.save(weights() | {"k": torch.tensor(K), "threshold": torch.tensor(0.6), "group_sizes": torch.tensor([4, -1])},
               tmp_path / "ae.pt")  # fmt: skip
    with pytest.raises(RunError, match="'group_sizes' are no sizes of groups"):
        load_external(str(tmp_path), layer=1)


@pytest.mark.parametrize("as_file", [False, True])
def test_gemma_scope_2(tmp_path, as_file):
    w, folder = weights(), tmp_path / "resid_post" / "layer_22_width_16k_l0_small"
    folder.mkdir(parents=True)
    threshold = random(F, seed=5).abs()
    save_file(
        {name.lower(): value for name, value in (w | {"threshold": threshold}).items()}, folder / "params.safetensors"
    )
    (folder / "config.json").write_text(
        json.dumps({"hf_hook_point_in": "model.layers.22.output", "model_name": "google/gemma-3-1b-pt"})
    )  # fmt: skip
    found = load_external(str(folder / "params.safetensors" if as_file else folder))
    pre = x() @ w["W_enc"] + w["b_enc"]
    z = relu(pre) * (pre > threshold)
    agrees(found, z, z @ w["W_dec"] + w["b_dec"])
    assert (found.source, found.layer, found.model_name) == ("gemma-scope", 22, "google/gemma-3-1b-pt")
    (folder / "config.json").write_text(json.dumps({"affine_connection": True}))
    with pytest.raises(RunError, match="it is a transcoder and no SAE"):
        load_external(str(folder), layer=22)


def published_sparsify(folder, **config):
    w = weights()
    folder.mkdir(parents=True)
    encoder = {"encoder.weight": w["W_enc"].t().contiguous(), "encoder.bias": w["b_enc"]}
    save_file(encoder | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "k": K, "expansion_factor": 4} | config))
    return w


def test_sparsify(tmp_path):
    w = published_sparsify(tmp_path / "layers.5")
    found = load_external(str(tmp_path / "layers.5"), layer=5)
    kept = relu((x() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).topk(K, dim=-1)
    z = torch.zeros(2, 5, F).scatter(-1, kept.indices, kept.values)
    agrees(found, z, z @ w["W_dec"] + w["b_dec"])
    assert (found.source, found.name) == ("sparsify", "layers.5")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"transcode": True}, "is a transcoder"),
        ({"skip_connection": True}, "has a skip connection"),
        ({"activation": "groupmax"}, "of activation 'groupmax'; topk can be read"),
        ({"k": 17}, "keeps k = 17 features of a token, but has only 16"),
    ],
)
def test_sparsify_that_does_not_fit(tmp_path, config, sentence):
    published_sparsify(tmp_path / "sae", **config)
    with pytest.raises(RunError, match=sentence):
        load_external(str(tmp_path / "sae"), layer=1)


# --- Llama Scope, temporal crosscoders


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
def test_llama_scope(tmp_path, with_norm, subtract):
    said = {"sparsity_include_decoder_norm": with_norm, "apply_decoder_bias_to_pre_encoder": subtract}
    folder = published.llama_scope(tmp_path, D, F, said=said)
    found = load_external(str(folder))
    w = {name: value.bfloat16().float() for name, value in published._plain(D, F).items()}
    scaled = x() * (D**0.5 / 3.0)
    pre = (scaled - w["b_dec"] if subtract else scaled) @ w["W_enc"] + w["b_enc"]
    fires = pre * (w["W_dec"].norm(dim=1) if with_norm else 1.0) > 0.2
    z = pre * fires
    with torch.no_grad():
        torch.testing.assert_close(found.sae.encode(x()), z)
        torch.testing.assert_close(found.sae.decode(z), (z @ w["W_dec"] + w["b_dec"]) / (D**0.5 / 3.0))
    assert 0 < fires.float().mean() < 0.6
    assert (found.source, found.layer, found.site) == ("llama-scope", 1, "resid_post")
    assert found.model_name == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"hook_point_out": "blocks.1.hook_mlp_out"}, "writes elsewhere than it reads: it is a transcoder"),
        ({"use_glu_encoder": True}, "has a gated encoder"),
        ({"act_fn": "topk"}, "of activation 'topk'; jumprelu can be read"),
        ({"norm_activation": "token-wise"}, "normalises inputs by 'token-wise'; dataset-wise can be read"),
        ({"dataset_average_activation_norm": None}, "lacks 'dataset_average_activation_norm'"),
        ({"jump_relu_threshold": "much"}, "'jump_relu_threshold' is 'much', a positive number was expected"),
    ],
)
def test_llama_scope_that_does_not_fit(tmp_path, said, sentence):
    with pytest.raises(RunError, match=sentence):
        load_external(str(published.llama_scope(tmp_path, D, F, said=said)), layer=1)


@torch.no_grad()
@pytest.mark.parametrize("beside", [True, False])
def test_temporal_crosscoder(tmp_path, beside):
    file = published.crosscoder(tmp_path, D, F)
    if beside:
        (tmp_path / "training_logs" / "txc.json").rename(file.with_suffix(".json"))
    found = load_external(str(file))
    assert (found.source, found.layer, found.sae.sees) == ("temporal-crosscoder", 1, "window")
    theirs = TemporalCrosscoder(D, F, window=3, k=4).double()  # its weights position by position, in their layout
    enc, dec = (published.random(*shape, seed=seed).half().double() for shape, seed in (((3, D, F), 1), ((F, 3, D), 2)))
    for name, value in (("W_enc", enc.reshape(3 * D, F)), ("W_dec", dec.reshape(F, 3 * D))):
        getattr(theirs, name).copy_(value)
    theirs.b_enc.copy_((published.random(F, seed=3) / 10).half())
    theirs.b_dec.copy_((published.random(3, D, seed=4) / 10).half().flatten())
    windows = random(6, 3, D, seed=8)
    out = found.sae(windows)
    for i, window in enumerate(windows):
        pre = sum(window[p].double() @ enc[p] for p in range(3)) + theirs.b_enc
        kept = pre.topk(4)
        z = torch.zeros(F, dtype=torch.float64).scatter(0, kept.indices, relu(kept.values))
        x_hat = torch.stack([z @ dec[:, p] for p in range(3)]) + theirs.b_dec.view(3, D)
        torch.testing.assert_close(out.features[i], z.float())
        torch.testing.assert_close(out.reconstruction[i], x_hat.float())
        torch.testing.assert_close(reference.txc_window(theirs, window.double())[1], x_hat)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"src_class": "MatryoshkaTXCDR"}, "is a MatryoshkaTXCDR; TXCBareAntidead and TemporalCrosscoder can be read"),
        ({"T": 5}, r"'W_enc' has shape \[3, 4, 16\], the log needs \[5, 4, 16\]"),
        ({"k_win": 17}, "k = 17 active features does not fit 16"),
        ({"k_win": None}, "'k_win' is None, a whole number from 1 was expected"),
        ({"d_sae": 1 << 30}, r"'W_enc' has shape \[3, 4, 16\], the log needs \[3, 4, 1073741824\]"),
    ],
)
def test_temporal_crosscoder_that_does_not_fit(tmp_path, said, sentence):
    with pytest.raises(RunError, match=sentence):
        load_external(str(published.crosscoder(tmp_path, D, F, said=said)), layer=1)


def test_the_log_of_a_crosscoder_comes_from_the_hub_with_it(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        if not (tmp_path / "snapshot").exists():
            published.crosscoder(tmp_path / "snapshot", D, F)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_external("owner/release/ckpts/txc.pt").source == "temporal-crosscoder"
    assert asked == [("owner/release", ["ckpts/txc.pt", "ckpts/txc.pt/*", "training_logs/txc.json"])]


# --- all of them


WRONG = {
    "dictionary-learning": ["W_dec", "b_enc", "threshold"],
    "temporal-feature-analysis": ["D", "attn_layers.0.k_ctx.weight", "b"],
    "temporal-crosscoder": ["W_enc", "W_dec", "b_enc", "b_dec"],
    "llama-scope": ["encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias"],
    "gemma-scope": ["W_enc", "W_dec", "threshold"],
    "sparsify": ["W_dec", "encoder.bias", "encoder.weight"],
}


@pytest.mark.parametrize("kind", published.PUBLISHED)
@pytest.mark.parametrize("shape", [(F + 1, D + 1), (5,), (2, 2, 2)])
def test_shapes_that_disagree_are_one_sentence(tmp_path, kind, shape):
    for name in WRONG[kind]:
        path = published.PUBLISHED[kind](tmp_path / name.replace(".", "-"), D, F, **{name: published.random(*shape)})
        with pytest.raises(RunError) as caught:
            load_external(str(path), layer=1)
        assert "\n" not in str(caught.value)
        assert "different SAEs" in str(caught.value) or "no encoder matrix" in str(caught.value), (name, caught.value)


def test_every_kind_that_is_read_has_a_published_layout_here():
    assert set(published.PUBLISHED) == set(FORMATS) - {"saelens"}
