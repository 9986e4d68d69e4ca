"""Temporal Feature Analysis equals its definition, token by token and head by head, on the sequences that rows hold."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from tcsae.errors import UsageError
from tcsae.train.config import TrainConfig
from tcsae.train.loop.schedule import learning_rate
from tcsae.train.loss.objective import Objective, TemporalTerm, objective_of
from tcsae.train.loss.partners import neighbours_in_rows
from tcsae.train.plan import plan_members
from tcsae.train.presets import build_config
from tcsae.train.sae.protocol import RowTokens, SparseAutoencoder
from tcsae.train.sae.tfa import TemporalFeatureAnalysis
from tcsae.train.step.autograd import autograd_step

D, F = 4, 16


def analysis(seed=0, dtype=torch.float64, **shape):
    generator = torch.Generator().manual_seed(seed)
    sae = TemporalFeatureAnalysis(D, F, **({"k": 3, "heads": 2} | shape))
    sae.initialise(TrainConfig().sae, seed, torch.randn(D, generator=generator))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return sae.to(dtype)


def rows(kind, n=3, t=8, seed=1):
    """Activations and which tokens of them count: all, all behind a first one, or what gaps and documents leave."""
    x = torch.randn(n, t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    valid, documents = torch.ones(n, t, dtype=torch.bool), torch.arange(n)[:, None].repeat(1, t)
    if kind != "whole":
        valid[:, 0] = False
        x[:, 0] *= 100
    if kind == "padded":
        valid[1, 6:] = False
    if kind == "gaps":
        valid[1, 3] = valid[2, 5] = valid[2, 1] = False
        documents[0, 4:] = 7
    return x, RowTokens.of(valid, documents)


KINDS = {"whole": 0, "from 1": 1, "padded": 1, "gaps": None}
SHAPES = ({}, {"k": None}, {"tied": False}, {"bottleneck": 2, "heads": 4})


def by_definition(sae, x, tokens):
    """Of every token that counts: predicted and novel codes and reconstruction, in the order of the mask."""
    predicted, novel, x_hat = (torch.zeros(*x.shape[:2], size, dtype=x.dtype) for size in (F, F, D))
    for sequence in reference.row_sequences(tokens.valid_NT, tokens.documents_NT):
        r, t = zip(*sequence, strict=True)
        predicted[r, t], novel[r, t], x_hat[r, t] = reference.tfa_sequence(sae, x[r, t])
    return tuple(each[tokens.valid_NT] for each in (predicted, novel, x_hat))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_reconstructions_are_the_definition(kind, shape):
    sae, (x, tokens) = analysis(**shape), rows(kind)
    assert tokens.one_run_from == KINDS[kind]
    out = sae(x, tokens).at(tokens.valid_NT)
    predicted, novel, x_hat = by_definition(sae, x, tokens)
    torch.testing.assert_close(out.parts["predicted"], predicted)
    torch.testing.assert_close(out.parts["novel"], novel)
    torch.testing.assert_close(out.features, predicted + novel)
    torch.testing.assert_close(out.reconstruction, x_hat)
    assert torch.equal(out.counted, out.parts["novel"])
    assert (predicted != 0).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_definition(kind, shape):
    sae, (x, tokens) = analysis(**shape), rows(kind)
    gamma = 0.7 if sae.k is None else 0.0
    term = TemporalTerm(form="pairwise", weight=0.3, n_features=F)
    partners = neighbours_in_rows(tokens.valid_NT, tokens.documents_NT, 1)
    result = autograd_step(sae, x, Objective(sparsity_weight=gamma, temporal=term), partner_NP=partners, rows=tokens)
    found = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    predicted, novel, x_hat = by_definition(sae, x, tokens)
    loss = (x[tokens.valid_NT] - x_hat).square().sum(1).mean() + gamma * novel.square().sum(1).sqrt().mean()
    place = {where: i for i, where in enumerate(map(tuple, tokens.valid_NT.nonzero().tolist()))}
    codes, documents = predicted + novel, tokens.documents_NT
    pairs = [(i, place[r, t + 1]) for (r, t), i in place.items()
             if (r, t + 1) in place and documents[r, t] == documents[r, t + 1]]  # fmt: skip
    loss = loss + 0.3 * sum((codes[a] - codes[b]).square().sum() for a, b in pairs) / len(pairs)
    loss.backward()
    assert float(result.total) == pytest.approx(loss.item())
    assert torch.equal(result.fired_F, (novel > 0).sum(0))
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_what_does_not_count_changes_nothing():
    sae, (x, tokens) = analysis(), rows("gaps")
    other = torch.where(tokens.valid_NT[..., None], x, 1e3 * torch.randn_like(x))
    a, b = sae(x, tokens).at(tokens.valid_NT), sae(other, tokens).at(tokens.valid_NT)
    assert torch.equal(a.features, b.features)
    later = x.clone()
    later[:, -1] += 1
    assert torch.equal(sae(later, tokens).features[:, :-1], sae(x, tokens).features[:, :-1])


def test_the_beginning_is_the_published_one():
    sae = TemporalFeatureAnalysis(D, F, k=3, heads=2, bottleneck=2)
    sae.initialise(build_config("tfa").sae, 0)
    assert sae.W_dec.std().item() == pytest.approx(1, abs=0.2)
    assert sae.scale == 1 / (4 * D)
    for layer, norm in ((sae.keys, 1 / math.sqrt(4)), (sae.queries, 1 / math.sqrt(4)),
                        (sae.values, 1 / math.sqrt(F / 2)), (sae.output, 1 / math.sqrt(F))):  # fmt: skip
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.full((layer.out_features,), norm), rtol=1e-4, atol=0)
    assert not sae.b_dec.any()
    assert sum(p.numel() for p in TemporalFeatureAnalysis(D, F, k=3).parameters()) == 4 * F * F + 4 * F + F * D + D


def test_saved_rescaled_and_loaded_it_is_the_same(tmp_path):
    for shape in SHAPES:
        sae, (x, tokens) = analysis(dtype=torch.float32, **shape).eval(), rows("gaps")
        x, raw = x.float(), sae.rescaled(4.0)
        torch.testing.assert_close(raw(x / 4, tokens).features, sae(x, tokens).features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            raw(x / 4, tokens).reconstruction * 4, sae(x, tokens).reconstruction, rtol=1e-4, atol=1e-4
        )
        sae.save(tmp_path)
        again = SparseAutoencoder.load(tmp_path)
        assert isinstance(again, TemporalFeatureAnalysis)
        assert torch.equal(again(x, tokens).features, sae(x, tokens).features)


def test_the_preset_is_the_publication():
    config = build_config("tfa")
    (plan,) = plan_members(config, {}, layer=12, d_model=2304, n_tokens=10_000_000)
    sae, chosen = plan.config.sae, plan.config.optimiser
    assert (sae.width, sae.k, sae.heads, sae.bottleneck, sae.tied) == (4 * 2304, 192, 4, 1, True)
    assert (plan.name, plan.config.data.view, plan.config.run.steps) == ("l12-tfa192-none-s0", "rows", 200)
    assert plan.n_parameters == pytest.approx(4 * 9216**2, rel=0.07)
    assert (chosen.betas, chosen.weight_decay, chosen.clip, chosen.decay_decoder) == ((0.9, 0.95), 1e-4, 1.0, True)
    assert learning_rate(99, 1000, chosen) == pytest.approx(5e-4)
    assert learning_rate(500, 1000, chosen) == pytest.approx(9.5e-4)
    assert learning_rate(999, 1000, chosen) == pytest.approx(9e-4, rel=1e-3)
    objective = objective_of(plan.config, 2304, sae.width)
    assert (objective.sparsity_weight, objective.aux_weight, objective.temporal.active) == (0, 0, False)
    gamma = objective_of(build_config("tfa", None, {"sae.activation": "relu"}), 2304, sae.width)
    assert gamma.sparsity_weight == 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sae.decoder": "unit"}, "tfa's decoder rows are of any norm"),
        ({"sae.activation": "batchtopk"}, "published with topk and with relu, not with activation 'batchtopk'"),
        ({"temporal.form": "pairwise", "temporal.partner": "other_document"}, "partner 'other_document' is not drawn"),
        ({"temporal.form": "contrastive"}, "'contrastive' is no mean over pairs of tokens"),
        ({"temporal.form": "window_mean"}, "'window_mean' is no mean over pairs of tokens"),
        ({"sae.k": 65}, "k is 65, the dictionary has 64 features"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_is_one_sentence(changes, sentence):
    config = build_config("tfa", None, {"sae.width": 64, "sae.k": 4} | changes)
    with pytest.raises(UsageError, match=sentence):
        plan_members(config, {}, layer=1, d_model=8, n_tokens=10_000)


def test_heads_must_divide_the_dictionary():
    with pytest.raises(UsageError, match="66 features cannot be shared by 4 heads"):
        TemporalFeatureAnalysis(D, 66, k=3)
