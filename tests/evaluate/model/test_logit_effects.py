"""Logit effects are those of the model's own final modules and head, wherever these stand."""

import families
import pytest
import torch
import transformers
from families import loaded
from tcsae.evaluate.model.logit_effects import LogitEffects
from tcsae.evaluate.model.splice import Head, SplicedModel
from tcsae.extract.config import ModelSource
from tcsae.extract.model.hooks import hook_of
from tcsae.extract.model.load import load_language_model
from tcsae.sites import Location

# Families whose final norm is called something else than usual, or is followed by something else.
NAMED_OTHERWISE = ("lfm2", "biogpt", "xglm", "rwkv", "recurrent_gemma", "mamba", "cohere", "opt", "falcon")


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_the_final_norms_gain_is_applied_and_a_layernorms_mean_removed(kind, request):
    folder = request.getfixturevalue(f"tiny_{kind}")
    lm = load_language_model(ModelSource(id=str(folder), device="cpu", dtype="float32"))
    effects = LogitEffects(lm, Head(lm))
    direction = torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(1))
    found = effects(direction)
    assert torch.allclose(effects(direction * 3), found * 3, rtol=1e-3, atol=1e-4)
    gain = 1 + lm.decoder.norm.weight if kind == "gemma2" else lm.decoder.ln_f.weight
    centred = direction if kind == "gemma2" else direction - direction.mean(-1, keepdim=True)
    scale = direction.norm(dim=-1, keepdim=True) / centred.norm(dim=-1, keepdim=True)
    expected = (centred * scale * gain) @ lm.model.get_output_embeddings().weight.T
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def difference(lm, layer, direction):
    """What a small step along the direction, after the last block, does to the model's own logits."""
    tokens, at = families.tokens(), Location(layer)
    caught = {}
    with hook_of(lm, at).keep(caught, at):
        lm.model(input_ids=tokens, use_cache=False)
    x = caught[at]
    basis, _ = torch.linalg.qr(torch.stack([x[0, -1], torch.ones(x.shape[-1])], dim=1))
    step = direction - basis @ (basis.T @ direction)  # a step along x itself, or along ones, norms take away
    logits = []
    for sign in (0.0, 1.0):
        with hook_of(lm, at).replace(x + sign * 1e-2 * x[0, -1].norm() * step / step.norm()):
            logits.append(lm.model(input_ids=tokens, use_cache=False).logits[0, -1].double())
    return step, logits[1] - logits[0]


@pytest.mark.parametrize("family", NAMED_OTHERWISE)
def test_effects_are_a_finite_difference_of_the_real_head(family):
    try:
        lm = loaded(families.build(family), family)
    except families.UnbuiltError as reason:
        pytest.skip(f"this transformers makes no small {family}: {reason}")
    effects = LogitEffects(lm, Head(lm))
    assert effects.note is None
    direction = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(2))
    step, changed = difference(lm, lm.n_layers - 1, direction)
    assert torch.cosine_similarity(effects(step[None])[0].double(), changed, dim=0) > 0.995


def test_a_projection_between_blocks_and_head_is_gone_through():
    """OPT-350m: no final norm, and embeddings of another width than the blocks."""
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).eval().requires_grad_(False)
    lm = loaded(model, "opt-350m")
    assert lm.d_model == 32
    effects = LogitEffects(lm, Head(lm))
    assert effects.note is None
    direction = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    expected = lm.decoder.project_out(direction) @ model.lm_head.weight.T
    assert torch.allclose(effects(direction), expected, rtol=1e-3, atol=1e-6)
    # Its blocks are spliced like any other.
    spliced, tokens, at = SplicedModel(lm), families.tokens(), [Location(1), Location(1, "mlp_out")]
    assert spliced.verify(tokens, at) == []


def test_a_model_that_ends_otherwise_has_no_effects_and_a_note(tiny_llama):
    lm = load_language_model(ModelSource(id=str(tiny_llama), device="cpu", dtype="float32"))
    real = lm.decoder.forward

    def changed(*args, **kwargs):
        answer = real(*args, **kwargs)
        answer.last_hidden_state = answer.last_hidden_state.abs()
        return answer

    lm.decoder.forward = changed
    effects = LogitEffects(lm, Head(lm))
    assert "logit effects are left out for LlamaForCausalLM" in effects.note
    assert effects(torch.randn(2, lm.d_model)) is None
