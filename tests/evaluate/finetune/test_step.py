"""The step of fine-tuning against a slow twin: the whole model with hooks that replace one layer's output, all logits
at once, the temporal term in a loop.
"""

import itertools
from contextlib import contextmanager

import pytest
import torch
from tcsae.cache.store import ActivationStore
from tcsae.cache.views import Rows
from tcsae.evaluate.finetune.step import KLStep, RowBatches, mean_kl
from tcsae.evaluate.model.splice import Head, SplicedModel
from tcsae.extract.config import ModelSource
from tcsae.extract.model.load import load_language_model
from tcsae.pipeline import main
from tcsae.train.config import TrainConfig
from tcsae.train.loop.batches import BatchReader, TokenStream
from tcsae.train.loop.inputs import Inputs
from tcsae.train.loop.member import Member
from tcsae.train.plan import MemberPlan
from tcsae.train.presets import changed
from tcsae.train.step.autograd import autograd_step
from torch.nn import functional

CPU = torch.device("cpu")
VIEW = Rows()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_gemma2, corpus):
    """A tiny Gemma 2 in float32, verified for splicing after layer 1, and a store of that layer."""
    folder = tmp_path_factory.mktemp("finetune")
    what = ["--model", str(tiny_gemma2), "--dataset", str(corpus), "--context", "16", "--tokens", "2k"]
    assert main(["extract", "--layers", "1", *what, "--device", "cpu", "--dtype", "float32", "--out", str(folder)]) == 0
    store = ActivationStore.open(folder / "l1.zarr")
    lm = load_language_model(ModelSource(str(tiny_gemma2), device="cpu", dtype="float32"))
    model, head = SplicedModel(lm), Head(lm)
    tokens = torch.from_numpy(store.tokens(0, 2)).long()
    assert model.verify(tokens, [store.location]) == []
    head.verify(tokens, model.clean(tokens, []).final_BTD)
    return store, model, head


def a_member(store, **options) -> tuple[Member, Inputs]:
    base = {"data.store": str(store.path), "data.batch_size": 60, "sae.width": 32, "sae.k": 4, "run.steps": 9}
    base |= {"temporal.form": "pairwise", "temporal.weight": 0.1, "temporal.partner": "next", "loss.l1": 0.3}
    config = changed(TrainConfig(), base | options)
    inputs = Inputs.of(config.data, store.statistics())
    member = Member(MemberPlan("one", config, "tc", None, store.d_model), inputs.mean_D, CPU, torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():  # away from a tied, unbiased beginning
        for parameter in member.sae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return member, inputs


def a_batch(store, member, inputs, *, step=0):
    data = member.config.data
    stream = TokenStream(store, [VIEW], tokens_per_batch=data.batch_size, seed=0, norm_limit=inputs.norm_limit)
    reader = BatchReader(stream, CPU)
    batch = reader.next_batches()[VIEW]
    reader.close()
    return RowBatches(store, member, CPU).of(batch, inputs.prepare(batch.x_NWD, CPU), step)


def stepped(world, member, inputs, share=0.5, balance="step"):
    """Result, KL, weight, and gradients by name."""
    store, model, head = world
    step = KLStep(model, head, store.location, inputs.scale, share, balance)
    step.batch = a_batch(store, member, inputs)
    member.sae.zero_grad()
    result = step(member.sae, step.batch.x_NTD, member.objective, partner_NP=step.batch.partner, rows=step.batch.rows)
    return result, step, {name: p.grad.clone() for name, p in member.sae.named_parameters()}


@contextmanager
def output_replaced(block, x_BTD):
    handle = block.register_forward_hook(lambda _m, _i, out: x_BTD if torch.is_tensor(out) else (x_BTD, *out[1:]))
    try:
        yield
    finally:
        handle.remove()


def all_logits(lm, layer, x_BTD, tokens):
    with output_replaced(lm.blocks[layer], x_BTD):
        return lm.model(input_ids=tokens, use_cache=False).logits


def twin(world, member, inputs, batch, share):
    """Loss and gradients, by the definitions."""
    store, model, _ = world
    sae, objective, valid = member.sae, member.objective, batch.rows.valid_NT
    raw, scaled = batch.batch.x_NWD.float(), batch.x_NTD
    sae.zero_grad()
    out = sae(scaled[valid])
    spliced, at = [], 0
    for row in range(len(raw)):
        for position in range(raw.shape[1]):
            if valid[row, position]:
                spliced.append(out.reconstruction[at] / inputs.scale)
                at += 1
            else:
                spliced.append(raw[row, position])
    spliced = torch.stack(spliced).view_as(raw)
    clean = all_logits(model.lm, store.layer, raw, batch.tokens_NT).detach()
    changed_ = all_logits(model.lm, store.layer, spliced, batch.tokens_NT)
    log_p, log_q = functional.log_softmax(clean, -1), functional.log_softmax(changed_, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[valid].mean()
    mse = (scaled[valid] - out.reconstruction).pow(2).sum(-1).mean()
    places = {}
    for row in range(len(raw)):
        for position in range(raw.shape[1]):
            if valid[row, position]:
                places[len(places)] = (row, position)
    pairs = []
    for window in batch.compared_MW.tolist():
        for a, b in itertools.pairwise(window):
            assert places[b] == (places[a][0], places[a][1] + 1), "the two of a pair are neighbours"
            pairs.append((out.features[a] - out.features[b]).pow(2).sum())
    total = (1 - share) * mse + share * (mse / kl).detach() * kl
    total = total + objective.temporal.weight * torch.stack(pairs).mean()
    if objective.sparsity_weight:
        total = total + objective.sparsity_weight * sae.sparsity_loss(out, objective)
    total.backward()
    return total.detach(), kl.detach(), {name: p.grad.clone() for name, p in sae.named_parameters()}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_loss_and_gradients_are_those_of_a_full_run_with_a_hook(world, activation, share):
    member, inputs = a_member(world[0], **{"sae.activation": activation})
    result, step, gradients = stepped(world, member, inputs, share)
    total, kl, expected = twin(world, member, inputs, step.batch, share)
    assert float(step.kl) == pytest.approx(float(kl), rel=1e-4)
    assert float(kl) > 0.01, "the splice changes predictions"
    assert float(result.total) == pytest.approx(float(total), rel=1e-4)
    assert float(result.temporal) > 0
    for name, found in gradients.items():
        assert torch.allclose(found, expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].abs().max())), name
    assert all(not p.requires_grad and p.grad is None for p in world[1].lm.model.parameters())


def test_special_tokens_keep_their_activation_and_have_no_term(world):
    member, inputs = a_member(world[0])
    _, step, _ = stepped(world, member, inputs)
    batch = step.batch
    assert not batch.rows.valid_NT[:, 0].any()
    assert batch.rows.n_tokens == int(batch.rows.valid_NT.sum()) > 30
    x_hat = torch.zeros(batch.rows.n_tokens, world[0].d_model)
    stored = batch.batch.x_NWD[batch.rows.valid_NT].float()
    assert float(step.divergence(batch, stored)) == 0.0
    assert float(step.divergence(batch, x_hat)) > float(step.kl)


def test_kl_some_tokens_at_a_time_is_that_of_all(world):
    _, model, head = world
    final, clean = torch.randn(2, 11, model.lm.d_model, generator=torch.Generator().manual_seed(1))
    found = []
    for limit in (1, 4 * 8 * head.vocab_size * 3, 1 << 30):
        states = final.clone().requires_grad_()
        kl = mean_kl(states, clean, head, limit_bytes=limit)
        (3 * kl).backward()
        found.append((kl.detach(), states.grad))
    for kl, gradient in found[1:]:
        assert torch.allclose(kl, found[0][0])
        assert torch.allclose(gradient, found[0][1], atol=1e-6)


def test_the_weight_of_kl_follows_every_batch_or_stays(world):
    store, model, head = world
    for balance in ("step", "start"):
        member, inputs = a_member(store)
        step = KLStep(model, head, store.location, inputs.scale, 0.5, balance)
        weights = []
        for _ in range(2):
            step.batch = a_batch(store, member, inputs)
            result = step(member.sae, step.batch.x_NTD, member.objective, rows=step.batch.rows)
            weights.append(float(step.weight))
            sizes = weights[-1] * float(step.kl), float(result.reconstruction)
            if balance == "step" or len(weights) == 1:
                assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)
            with torch.no_grad():
                member.sae.W_dec.mul_(0.7)
        assert (weights[0] == weights[1]) == (balance == "start")


def test_controls_compare_what_the_run_was_trained_to_compare(world):
    store = world[0]
    member, inputs = a_member(store, **{"temporal.partner": "other_document"})
    batch = a_batch(store, member, inputs)
    documents = torch.from_numpy(store.documents(0, store.n_rows))
    rows, positions = batch.rows.valid_NT.nonzero(as_tuple=True)
    of_token = documents[batch.batch.rows_N[rows], positions]
    of_item = of_token[batch.compared_MW]
    drawn = batch.partner >= 0
    assert drawn.any()
    assert (of_item[:, :-1][drawn] != of_item.flatten()[batch.partner[drawn]]).all()
    again = a_batch(store, member, inputs)
    assert torch.equal(again.partner, batch.partner)
    assert not torch.equal(a_batch(store, member, inputs, step=1).compared_MW, batch.compared_MW)


def test_pairs_of_an_earlier_token_are_drawn_inside_a_row(world):
    store = world[0]
    options = {"temporal.partner": "earlier", "data.view": "pairs", "data.window": 2, "data.pair_loss": "both"}
    member, inputs = a_member(store, **options)
    batch = a_batch(store, member, inputs)
    rows, positions = batch.rows.valid_NT.nonzero(as_tuple=True)
    earlier, later = batch.compared_MW.T
    assert torch.equal(rows[earlier], rows[later])
    assert (positions[earlier] < positions[later]).all()


def test_sae_that_sees_whole_rows(world):
    """Temporal Feature Analysis: the same as its own step where KL has no share, with KL where it has."""
    store, _, _ = world
    options = {"sae.architecture": "tfa", "data.view": "rows", "sae.decoder": "free", "loss.aux_weight": 0.0}
    member, inputs = a_member(store, **options)
    result, step, gradients = stepped(world, member, inputs, 0.0)
    member.sae.zero_grad()
    own = autograd_step(
        member.sae, step.batch.x_NTD, member.objective, partner_NP=step.batch.partner, rows=step.batch.rows
    )
    assert float(result.total) == pytest.approx(float(own.total), rel=1e-6)
    assert float(own.temporal) > 0
    for name, p in member.sae.named_parameters():
        assert torch.allclose(gradients[name], p.grad, atol=1e-6), name
    with_kl = stepped(world, member, inputs, 0.5)[2]
    assert not torch.allclose(with_kl["W_dec"], gradients["W_dec"], atol=1e-4)
