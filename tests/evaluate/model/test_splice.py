import math

import pytest
import torch
from reference import eval_losses
from tcsae.evaluate.metrics.fidelity import LogitBuffers, token_losses
from tcsae.evaluate.model.splice import Head, SplicedModel
from tcsae.extract.config import ModelSource
from tcsae.extract.model.hooks import hook_of
from tcsae.extract.model.load import load_language_model
from tcsae.sites import HOOK_POINTS, Location
from tiny import KINDS

ROWS, CONTEXT = 3, 20


@pytest.fixture(scope="module")
def loaded(request):
    """kind → (language model, tokens [B, T]); loaded once per module."""
    models = {}

    def get(kind: str):
        if kind not in models:
            folder = request.getfixturevalue(f"tiny_{kind}")
            lm = load_language_model(ModelSource(id=str(folder), device="cpu", dtype="float32"))
            tokens = torch.randint(4, lm.vocab_size, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))
            if lm.bos_token_id is not None:
                tokens[:, 0] = lm.bos_token_id
            models[kind] = (lm, tokens)
        return models[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_splice_equals_a_full_run_with_a_hook(kind, loaded):
    lm, tokens = loaded(kind)
    model = SplicedModel(lm)
    everywhere = [Location(layer) for layer in range(lm.n_layers)]
    clean = model.clean(tokens, everywhere)
    own = lm.model(input_ids=tokens, output_hidden_states=True)
    for at in everywhere:
        if at.layer + 1 < lm.n_layers:  # the last entry of hidden_states is after the final norm
            assert torch.equal(clean.at[at], own.hidden_states[at.layer + 1])
        assert torch.equal(model.activations(tokens, [Location(0), at])[at], clean.at[at])
        changed = clean.at[at].flip(0) * 1.3 + 0.1
        by_prefix, by_hook = model.spliced(at, changed, tokens, clean), model.spliced_by_hook(at, changed, tokens)
        assert torch.equal(by_prefix, by_hook)
        assert not torch.allclose(by_prefix, clean.final_BTD, atol=1e-2), "the splice changed nothing"
        assert torch.equal(model.spliced(at, clean.at[at], tokens, clean), clean.final_BTD)
    assert model.verify(tokens, everywhere) == []
    assert torch.equal(lm.model(input_ids=tokens).logits, own.logits), "the real blocks are back in place"


@pytest.mark.parametrize("kind", KINDS)
def test_head_gives_the_models_own_logits(kind, loaded):
    lm, tokens = loaded(kind)
    model, head = SplicedModel(lm), Head(lm)
    final = model.clean(tokens, []).final_BTD
    head.verify(tokens, final)
    assert head.note is None
    own = lm.model(input_ids=tokens).logits.flatten(0, 1)
    assert torch.allclose(head(final.flatten(0, 1)), own, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splice_in_bfloat16_models_too(dtype, loaded, tiny_gemma2):
    lm = load_language_model(ModelSource(id=str(tiny_gemma2), device="cpu", dtype=str(dtype).removeprefix("torch.")))
    _, tokens = loaded("gemma2")
    model = SplicedModel(lm)
    chosen = [Location(0), Location(2, "mlp_out"), Location(3)]
    clean = model.clean(tokens, chosen)
    for at, x in clean.at.items():
        assert torch.equal(model.spliced(at, x.float(), tokens, clean), clean.final_BTD)
    assert model.verify(tokens, chosen) == []


def test_identity_kl_is_exactly_zero_and_zero_all_is_uniform(loaded):
    lm, tokens = loaded("gemma2")
    model, head = SplicedModel(lm), Head(lm)
    at = Location(1)
    clean = model.clean(tokens, [at])
    x, final = clean.at[at], clean.final_BTD
    special = torch.zeros_like(tokens, dtype=torch.bool)
    special[:, 0] = True
    same = model.spliced(at, x, tokens, clean)
    zero_all = model.spliced(at, torch.zeros_like(x), tokens, clean)
    zero = model.spliced(at, torch.where(special[..., None], x, 0), tokens, clean)
    flat = [one[:, :-1].flatten(0, 1) for one in (final, same, zero_all, zero)]
    targets = tokens[:, 1:].flatten()
    _, ((_, kl_same), (ce_all, kl_all), (ce_none, kl_none), (ce_zero, _)) = token_losses(
        head, flat[0], [flat[1], flat[2], None, flat[3]], targets
    )
    assert (kl_same == 0).all()
    assert torch.allclose(ce_all, torch.full_like(ce_all, math.log(lm.vocab_size)), atol=1e-5)
    assert torch.equal(ce_all, ce_none)
    assert torch.equal(kl_all, kl_none)
    assert not torch.allclose(ce_zero, torch.full_like(ce_zero, math.log(lm.vocab_size)), atol=0.05)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_losses_equal_brute_force_in_float64_however_many_tokens_at_once(at_once, loaded):
    lm, tokens = loaded("gemma2")
    model, head = SplicedModel(lm), Head(lm)
    at = Location(2)
    clean = model.clean(tokens, [at])
    final = clean.final_BTD
    spliced = [model.spliced(at, clean.at[at] * factor, tokens, clean) for factor in (0.5, 1.01)]
    flat = [one.flatten(0, 1)[:40] for one in (final, *spliced)]
    targets = tokens.flatten()[1:41]
    ce, losses = token_losses(head, flat[0], flat[1:], targets, LogitBuffers(16 * lm.vocab_size * at_once))
    weight, cap = lm.model.get_output_embeddings().weight, lm.model.config.final_logit_softcapping
    expected = [eval_losses(flat[0], one, weight, cap, targets) for one in flat[1:]]
    for (ces, kls), (ce_true, ces_true, kls_true) in zip(losses, expected, strict=True):
        assert torch.allclose(ce.double(), ce_true, atol=1e-5)
        assert torch.allclose(ces.double(), ces_true, atol=1e-5)
        assert torch.allclose(kls.double(), kls_true, atol=1e-5)


def test_an_architecture_that_refuses_stand_ins_falls_back_to_hooks_and_says_so(loaded):
    lm, tokens = loaded("llama")
    model = SplicedModel(lm)
    at = Location(2)
    clean = model.clean(tokens, [at])
    lower, real = lm.blocks[0], lm.decoder.forward

    def fussy(*args, **kwargs):
        assert lm.blocks[0] is lower, "this model looks after its own layers"
        return real(*args, **kwargs)

    lm.decoder.forward = fussy
    try:
        (note,) = model.verify(tokens, [at])
        assert "layer 2" in note
        assert "looks after its own layers" in note
        changed = clean.at[at] * 0.3
        assert torch.equal(model.spliced(at, changed, tokens, clean), model.spliced_by_hook(at, changed, tokens))
    finally:
        del lm.decoder.forward


def test_a_model_that_ignores_stand_ins_is_found_out(loaded):
    lm, tokens = loaded("llama")
    model = SplicedModel(lm)
    kept, real = list(lm.blocks), lm.decoder.forward

    def stubborn(*args, **kwargs):
        now = list(lm.blocks)
        for at, block in enumerate(kept):
            lm.blocks[at] = block
        try:
            return real(*args, **kwargs)
        finally:
            for at, block in enumerate(now):
                lm.blocks[at] = block

    lm.decoder.forward = stubborn
    try:
        (note,) = model.verify(tokens, [Location(1)])
        assert "differs from a full run" in note
    finally:
        del lm.decoder.forward


def test_an_unknown_head_is_used_as_it_is(loaded):
    lm, tokens = loaded("llama")
    model = SplicedModel(lm)
    final = model.clean(tokens, []).final_BTD
    head = Head(lm)
    real = lm.model.lm_head.forward
    lm.model.lm_head.forward = lambda states: real(states).abs()
    try:
        head.verify(tokens, final)
        assert "not a plain product" in (head.note or "")
        assert torch.equal(head(final.flatten(0, 1)), lm.model(input_ids=tokens).logits.flatten(0, 1))
        assert not head.uniform_at_zero
    finally:
        del lm.model.lm_head.forward
    assert torch.equal(lm.model(input_ids=tokens).logits.flatten(0, 1), Head(lm)(final.flatten(0, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_spliced_on_a_shared_prefix_equals_a_full_run_with_a_hook(kind, loaded):
    lm, tokens = loaded(kind)
    model = SplicedModel(lm)
    sites = [site for site in HOOK_POINTS if (kind, site) != ("gpt_neox", "resid_mid")]
    everywhere = [Location(layer, site) for layer in range(lm.n_layers) for site in sites]
    clean = model.clean(tokens, everywhere)
    assert model.verify(tokens, everywhere) == []
    for at in everywhere:
        assert torch.equal(model.spliced(at, clean.at[at], tokens, clean), clean.final_BTD)
        assert torch.equal(model.activations(tokens, [at])[at], clean.at[at])
        changed = clean.at[at].flip(0) * 1.3 + 0.1
        final = model.spliced(at, changed, tokens, clean)
        assert torch.equal(final, model.spliced_by_hook(at, changed, tokens))
        assert not torch.allclose(final, clean.final_BTD, atol=1e-3), "the splice changed nothing"
        if at.layer and at.site == "resid_pre":
            assert torch.equal(final, model.spliced(Location(at.layer - 1), changed, tokens, clean))


def test_a_replaced_middle_reaches_the_mlp_and_the_stream_beside_it(loaded):
    """resid_post is the middle plus what the MLP makes of it, so both must see the new tensor."""
    lm, tokens = loaded("gemma2")
    middle, post = Location(1, "resid_mid"), Location(1)
    block = lm.blocks[1]
    given = torch.randn(*tokens.shape, lm.d_model, generator=torch.Generator().manual_seed(3))
    caught = {}
    with hook_of(lm, middle).replace(given), hook_of(lm, post).keep(caught, post):
        lm.decoder(input_ids=tokens, use_cache=False)
    mlp = block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(given)))
    assert torch.equal(caught[post], given + mlp)


def test_what_is_replaced_is_what_is_added(loaded):
    lm, tokens = loaded("llama")
    given = torch.randn(*tokens.shape, lm.d_model, generator=torch.Generator().manual_seed(3))
    for site, base in (("mlp_out", "resid_mid"), ("attn_out", "resid_pre")):
        caught, at, base, after = {}, Location(2, site), Location(2, base), Location(2)
        with (
            hook_of(lm, at).replace(given),
            hook_of(lm, base).keep(caught, base),
            hook_of(lm, after).keep(caught, after),
        ):
            lm.decoder(input_ids=tokens, use_cache=False)
        mlp = lm.blocks[2].mlp(lm.blocks[2].post_attention_layernorm(caught[base] + given))
        expected = caught[base] + given if site == "mlp_out" else caught[base] + given + mlp
        assert torch.equal(caught[after], expected)
