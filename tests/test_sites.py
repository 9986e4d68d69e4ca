"""What an SAE says of its site is honoured, or refused under the name its users know; never guessed."""

import pytest
from tcsae.errors import RunError, UsageError
from tcsae.sites import HOOK_POINTS, Location, location_of, named_module, site_of

HONOURED = [
    # SAELens, with its metadata or as older versions wrote it
    ({"hook_name": "blocks.12.hook_resid_post"}, "x", (12, "resid_post")),
    ({"hook_name": "blocks.12.hook_resid_pre"}, "x", (12, "resid_pre")),
    ({"hook_name": "blocks.12.hook_resid_mid"}, "x", (12, "resid_mid")),
    (
        {"hook_point": "blocks.3.hook_mlp_out", "hook_point_layer": 3, "hook_point_head_index": None},
        "x",
        (3, "mlp_out"),
    ),
    ({"hook_name": "blocks.7.hook_attn_out", "hook_layer": 7, "hook_head_index": None}, "x", (7, "attn_out")),
    # transformers' paths
    ({"hook_name": "model.layers.4"}, "x", (4, "resid_post")),
    ({"hook_name": "transformer.h.4.mlp"}, "x", (4, "mlp_out")),
    ({"hook_name": "gpt_neox.layers.4.attention"}, "x", (4, "attn_out")),
    ({"hook_name": "model.layers.0.input"}, "x", (0, "resid_pre")),
    # dictionary_learning
    ({"submodule_name": "resid_post_layer_9", "layer": 9}, "x", (9, "resid_post")),
    ({"submodule_name": "mlp_out_layer_9"}, "x", (9, "mlp_out")),
    ({"submodule_name": "model.layers.5", "io": "in"}, "x", (5, "resid_pre")),
    ({"layer": 5}, "x", (5, "resid_post")),
    # Gemma Scope's repositories say the site, its files nothing
    ({}, "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", (20, "resid_post")),
    ({}, "google/gemma-scope-2b-pt-mlp/layer_20/width_16k/average_l0_71", (20, "mlp_out")),
    ({}, "google/gemma-scope-2-1b-pt/mlp_out_all/layer_10_width_16k_l0_small", (10, "mlp_out")),
    (
        {"hf_hook_point_in": "model.layers.17.output", "hf_hook_point_out": "model.layers.17.output"},
        "google/gemma-scope-2-1b-pt/resid_post_all/layer_17_width_16k_l0_small",
        (17, "resid_post"),
    ),
    ({"hf_hook_point_in": "model.layers.11.post_feedforward_layernorm.output"}, "x", (11, "mlp_out")),
    ({}, "release/layer_20/width_16k", (20, "resid_post")),
    ({}, "saes/blocks.8.hook_resid_pre", (8, "resid_pre")),
    # the file counts, whatever the folder is called
    ({"hook_name": "blocks.3.hook_resid_post"}, "gemma-scope-2b-pt-att/layer_9/width_16k", (3, "resid_post")),
    ({"layer": 3}, "release/layer_20/width_16k", (3, "resid_post")),
]


@pytest.mark.parametrize(("metadata", "path", "where"), HONOURED, ids=lambda value: str(value)[:60])
def test_a_supported_site_is_honoured(metadata, path, where):
    assert site_of(metadata, path) == where
    assert site_of(metadata, path, *where) == where


REFUSED = [
    ({"hook_name": "blocks.3.attn.hook_z"}, "x", "the attention heads"),
    ({"hook_name": "blocks.3.hook_resid_post", "hook_head_index": 2}, "x", "one attention head"),
    ({"hf_hook_point_in": "model.layers.11.self_attn.o_proj.input"}, "x", "the attention heads"),
    ({"hook_name": "blocks.3.ln2.hook_normalized"}, "x", "a normalised activation"),
    ({"hook_name": "blocks.3.mlp.hook_post"}, "x", "the inside of an MLP"),
    ({"hook_name": "hook_embed"}, "x", "the token embedding"),
    ({"hook_name": "vision_tower.encoder.layers.11"}, "x", "a vision tower"),
    ({"hook_name": "blocks.9.hook_resid_post", "model_class_name": "HookedViT"}, "x", "a vision tower"),
    ({"hook_name": "blocks.3.hook_mlp_out", "hook_name_out": "blocks.3.hook_resid_post"}, "x", "is a transcoder"),
    (
        {
            "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
            "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
        },
        "x",
        "is a transcoder",
    ),
    ({"submodule_name": "model.layers.5.mlp", "io": "in_and_out"}, "x", "is a transcoder"),
    ({"submodule_name": "model.layers.5.mlp", "io": "in"}, "x", "none of the hook points"),
    ({"hook_name": "model.layers.5.mlp.down_proj"}, "x", "none of the hook points"),
    ({"hook_name": "blocks.3.hook_resid_somewhere"}, "x", "none of the hook points"),
    ({"hook_name": "blocks.3.hook_resid_post", "layer": 4}, "x", "contradicts itself"),
    ({}, "google/gemma-scope-2b-pt-att/layer_20/width_16k/average_l0_71", "the attention heads"),
    ({}, "google/gemma-scope-2b-pt-transcoders/layer_20/width_16k/average_l0_71", "the input of an MLP"),
    ({}, "google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "the token embedding"),
    ({}, "google/gemma-scope-2-1b-pt/transcoder_all/layer_10_width_16k_l0_small", "a transcoder"),
    ({}, "saes/blocks.8.hook_k", "none of the hook points"),
]


@pytest.mark.parametrize(("metadata", "path", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_any_other_site_is_refused_by_name(metadata, path, words):
    with pytest.raises(RunError, match=words):
        site_of(metadata, path, 3)


def test_what_the_user_says_fills_in_and_may_not_contradict():
    assert site_of({}, "somewhere", 4, "mlp_out") == Location(4, "mlp_out")
    assert site_of({"layer": 4}, "somewhere", site="attn_out") == Location(4, "attn_out")
    with pytest.raises(UsageError, match="does not say which layer it belongs to: give --layer"):
        site_of({}, "somewhere")
    with pytest.raises(UsageError, match=r"--site mlp_out was given for x, but it belongs to site resid_post \(hook_"):
        site_of({"hook_name": "blocks.3.hook_resid_post"}, "x", site="mlp_out")
    with pytest.raises(UsageError, match=r"--layer 2 was given for x, but it belongs to layer 3 \(hook_name 'blocks"):
        site_of({"hook_name": "blocks.3.hook_resid_post"}, "x", 2)
    with pytest.raises(UsageError, match="there is no hook point 'hook_z'"):
        site_of({"layer": 4}, "x", site="hook_z")


def test_names_of_our_own():
    for site in HOOK_POINTS:
        at = Location(12, site)
        assert location_of(at.hook_name) == at
    assert Location(12, "mlp_out").hook_name == "blocks.12.hook_mlp_out"
    assert (Location(12).short, Location(12, "mlp_out").short) == ("l12", "l12.mlp_out")
    assert (str(Location(12)), str(Location(12, "mlp_out"))) == ("12", "12 mlp_out")
    # of a plug-in that is not loaded
    assert location_of("blocks.4.ln2.hook_normalized") == (4, "ln2.hook_normalized")
    assert location_of("blocks.4.hook_mine") == (4, "mine")
    with pytest.raises(RunError, match="is no hook name"):
        location_of("layer four")


def test_a_module_that_an_sae_names():
    assert named_module({"hook_name": "model.layers.4.mlp.output"}) == "model.layers.4.mlp"
    assert named_module({"hook_name": "transformer.h.4"}) == "transformer.h.4"
    assert named_module({"hf_hook_point_in": "model.layers.22.output"}) == "model.layers.22"  # Gemma Scope 2
    assert named_module({"hook_name": "blocks.4.hook_mlp_out"}) is None
    assert named_module({"hook_name": "model.layers.4.input"}) is None
    assert named_module({"submodule_name": "model.layers.4", "io": "in"}) is None
    assert named_module({}) is None
