"""What is tapped and stored is, bit for bit, what transformers computes when asked in its own way."""

import numpy as np
import pytest
import torch
from tcsae.cache.format.layout import SPECIAL
from tcsae.cache.store import ActivationStore
from tcsae.errors import ModelError, UsageError
from tcsae.extract.config import ExtractConfig, ModelSource, TextSource
from tcsae.extract.model.block import Block
from tcsae.extract.model.blocks import verified_blocks
from tcsae.extract.model.fast_linear import speed_up
from tcsae.extract.model.hooks import capture, deepest_block, hook_of, module_path
from tcsae.extract.model.load import load_language_model
from tcsae.extract.model.module_hook import ModuleHook
from tcsae.extract.run import extract
from tcsae.sites import Location
from tiny import KINDS
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 4


def own_states(folder, kind, tokens_BT, dtype):
    """Residual streams after every block by transformers' own output_hidden_states; the last block by a hook of our
    own. In float32 with the products that ours has (test_fast_linear.py holds them to torch's).
    """
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    blocks = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(kind, "model.layers")
    speed_up(model)
    last = []
    model.get_submodule(blocks)[-1].register_forward_hook(
        lambda _m, _i, out: last.append(out if torch.is_tensor(out) else out[0])
    )
    with torch.no_grad():
        states = model(torch.as_tensor(tokens_BT).long(), output_hidden_states=True).hidden_states
    return [*states[1:-1], last[0]], states[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_bits_are_transformers_hidden_states(kind, dtype, request, corpus, tmp_path):
    folder = request.getfixturevalue(f"tiny_{kind}")
    source = ModelSource(str(folder), dtype=dtype, device="cpu")
    text = TextSource(str(corpus), context=16, held_out=0.0)
    extract(
        ExtractConfig((0, 1, 2, 3), source, text, tokens=16 * 24, batch_size=BATCH, out=str(tmp_path), shard_bytes=8192)
    )
    stores = [ActivationStore.open(tmp_path / f"l{layer}.zarr") for layer in range(4)]
    tokens = stores[0].tokens(0, 24)
    assert stores[0].manifest.model.attn_implementation == ("eager" if kind == "gemma2" else "sdpa")
    for start in range(0, 24, BATCH):
        wanted, after_norm = own_states(folder, kind, tokens[start : start + BATCH], getattr(torch, dtype))
        for store, x_BTD in zip(stores, wanted, strict=True):
            stored = store.rows(start, start + BATCH)
            torch.testing.assert_close(stored, x_BTD.to(torch.bfloat16), rtol=0, atol=0)
        assert not torch.equal(stored, after_norm.to(torch.bfloat16))  # the last layer's, before the final norm


@pytest.mark.parametrize("kind", KINDS)
def test_rows_begin_with_bos_and_hold_consecutive_tokens(kind, request, corpus, tmp_path):
    folder = request.getfixturevalue(f"tiny_{kind}")
    text = TextSource(str(corpus), context=16, held_out=0.0)
    extract(ExtractConfig((1,), ModelSource(str(folder)), text, tokens=400, out=str(tmp_path)))
    store = ActivationStore.open(tmp_path / "l1.zarr")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, documents, flags = (read(0, store.n_rows) for read in (store.tokens, store.documents, store.flags))
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert (flags[:, 0] == SPECIAL).all()
    assert not flags[:, 1:].any()
    assert (documents == documents[:, :1]).all()
    texts = [path.read_text() for path in corpus.iterdir()]
    for number in np.unique(documents):
        rows = tokens[documents[:, 0] == number]
        assert any(text.startswith(tokenizer.decode(rows[:, 1:].reshape(-1))[:-3]) for text in texts)


def test_a_truncated_model_has_no_upper_blocks_and_no_head(tiny_gemma2):
    lm = load_language_model(ModelSource(str(tiny_gemma2)), deepest_layer=1)
    whole = load_language_model(ModelSource(str(tiny_gemma2)))
    assert (len(lm.blocks), lm.n_layers, len(whole.blocks)) == (2, 4, 4)
    assert not hasattr(lm.model, "lm_head")
    assert hasattr(whole.model, "lm_head")
    assert lm.identity == whole.identity
    tokens = torch.randint(4, 400, (2, 8))
    at = Location(1)
    assert torch.equal(capture(lm, tokens, [at])[at], capture(whole, tokens, [at])[at])
    with pytest.raises(ModelError, match=r"layer 2 cannot be tapped: .* is loaded with 2 layers"):
        capture(lm, tokens, [Location(2)])


@pytest.mark.parametrize("kind", [tuple, list])
def test_blocks_may_answer_with_tuples_and_lists(kind):
    """Tuples as transformers 4 did everywhere, lists as its GPT-1 does to this day."""

    class Block(torch.nn.Module):
        def forward(self, x):
            return kind((x + 1, None))

    block, caught = Block(), {}
    with ModuleHook(block).keep(caught, 1):
        block(torch.ones(1, 2, 3))
    assert torch.equal(caught[1], torch.full((1, 2, 3), 2.0))
    with ModuleHook(block).replace(torch.zeros(1, 2, 3)):
        answer = block(torch.ones(1, 2, 3))
    assert type(answer) is kind
    assert torch.equal(answer[0], torch.zeros(1, 2, 3))
    assert not block._forward_hooks


def test_blocks_of_a_multimodal_model_are_those_of_its_text_half(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        hidden_size=24, num_hidden_layers=3, intermediate_size=32, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8,
        vocab_size=64, sliding_window=4, query_pre_attn_scalar=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, num_hidden_layers=3, intermediate_size=16, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63)
    model = Gemma3ForConditionalGeneration(config)
    assert verified_blocks(model.eval(), 3, 24).blocks is model.model.language_model.layers


def test_a_block_list_that_is_not_there_is_a_sentence(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(ModelError, match="keeps its 7 blocks in no list beside its embedding"):
        verified_blocks(model, 7, 24)


# What is added to the residual stream, by the modules that add it: behind Gemma's post-norms.
ADDS = {
    "gemma2": ("model.layers.{}.post_attention_layernorm", "model.layers.{}.post_feedforward_layernorm"),
    "gemma3": ("model.layers.{}.post_attention_layernorm", "model.layers.{}.post_feedforward_layernorm"),
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.mlp"),
    "gpt_neox": ("gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.mlp"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_what_the_block_adds_and_what_it_adds_it_to(kind, request):
    lm = load_language_model(ModelSource(str(request.getfixturevalue(f"tiny_{kind}")), dtype="float32"))
    tokens = torch.randint(4, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    for layer in range(4):
        attention, mlp = (name.format(layer) for name in ADDS[kind])
        assert module_path(lm, Location(layer, "attn_out")) == attention
        assert module_path(lm, Location(layer, "mlp_out")) == mlp
        sites = ["resid_pre", "attn_out", "mlp_out", "resid_post"] + ["resid_mid"] * (kind != "gpt_neox")
        own = {}
        handles = [
            lm.model.get_submodule(name).register_forward_hook(
                lambda _m, _i, out, name=name, own=own: own.update(
                    {name: (out if torch.is_tensor(out) else out[0]).clone()}
                )
            )
            for name in (attention, mlp)
        ]
        found = {at.site: x for at, x in capture(lm, tokens, [Location(layer, site) for site in sites]).items()}
        for handle in handles:
            handle.remove()
        assert torch.equal(found["attn_out"], own[attention])
        assert torch.equal(found["mlp_out"], own[mlp])
        if kind == "gpt_neox":
            both = found["mlp_out"] + found["attn_out"] + found["resid_pre"]
            assert torch.equal(found["resid_post"], both)
        else:
            assert torch.equal(found["resid_mid"], found["resid_pre"] + found["attn_out"])
            assert torch.equal(found["resid_post"], found["resid_mid"] + found["mlp_out"])
        if layer:
            before = Location(layer - 1)
            assert torch.equal(found["resid_pre"], capture(lm, tokens, [before])[before])


def test_what_a_block_does_not_have_is_refused_in_a_sentence(tiny_gpt_neox, tiny_llama):
    lm = load_language_model(ModelSource(str(tiny_gpt_neox)))
    with pytest.raises(ModelError, match=r"block 2 of GPTNeoX.* lets attention and MLP read the same input"):
        hook_of(lm, Location(2, "resid_mid"))
    with pytest.raises(UsageError, match=r"there is no hook point 'hook_z': choose one of resid_post, resid_pre"):
        hook_of(lm, Location(2, "hook_z"))
    lm = load_language_model(ModelSource(str(tiny_llama)))
    with pytest.raises(ModelError, match=r"block 1 of Llama.* has no moe or experts, only self_attn, mlp"):
        Block.of(lm, 1).child("moe", "experts")


def test_a_pass_for_resid_pre_ends_a_block_earlier(tiny_llama, corpus, tmp_path):
    assert deepest_block([Location(2, "resid_pre")]) == 1
    assert deepest_block([Location(0, "resid_pre")]) == 0
    assert deepest_block([Location(2, "resid_pre"), Location(2, "mlp_out")]) == 2
    text = TextSource(str(corpus), context=16, held_out=0.0)
    model = ModelSource(str(tiny_llama), dtype="float32")
    both = ExtractConfig((2,), model, text, tokens=200, out=str(tmp_path), sites=("resid_pre",))
    extract(both)
    extract(ExtractConfig((1,), model, text, tokens=200, out=str(tmp_path)))
    pre, post = (ActivationStore.open(tmp_path / name) for name in ("l2.resid_pre.zarr", "l1.zarr"))
    assert torch.equal(pre.rows(0, pre.n_rows), post.rows(0, post.n_rows))
