"""What is tapped and stored is, bit for bit, what transformers computes when asked in its own way."""

import numpy as np
import pytest
import torch
from tcsae.cache.format.layout import SPECIAL
from tcsae.cache.store import ActivationStore
from tcsae.errors import ModelError
from tcsae.extract.config import ExtractConfig, ModelSource, TextSource
from tcsae.extract.model.hooks import ResidualTap, capture
from tcsae.extract.model.load import find_blocks, load_language_model
from tcsae.extract.run import extract
from tiny import KINDS
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 4


def own_states(folder, kind, tokens_BT, dtype):
    """Residual streams after every block by transformers' own output_hidden_states; the last block by a hook of our
    own.
    """
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    blocks = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(kind, "model.layers")
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
    assert torch.equal(capture(lm, tokens, [1])[1], capture(whole, tokens, [1])[1])
    with pytest.raises(ModelError, match=r"layer 2 cannot be tapped: .* is loaded with 2 layers"):
        capture(lm, tokens, [2])


def test_tap_takes_tuples_as_older_transformers_put_out():
    class Block(torch.nn.Module):
        def forward(self, x):
            return (x + 1, None)

    blocks = torch.nn.ModuleList([Block(), Block()])
    with ResidualTap(blocks, [1]) as tap:
        blocks[1](blocks[0](torch.zeros(1, 2, 3))[0])
    assert torch.equal(tap.caught[1], torch.full((1, 2, 3), 2.0))
    assert not blocks[1]._forward_hooks


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
    decoder, name = find_blocks(model, 3)
    assert getattr(decoder, name) is model.model.language_model.layers


def test_a_block_list_that_is_not_there_is_a_sentence(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(ModelError, match="keeps its 7 blocks in no list beside its embedding"):
        find_blocks(model, 7)
