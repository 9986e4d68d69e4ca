"""The temporal crosscoder equals its definition, position by position; as a coder of tokens it is the window that ends
there.
"""

from __future__ import annotations

import pytest
import reference
import torch
from tcsae.errors import UsageError
from tcsae.train.config import TrainConfig
from tcsae.train.loss.objective import Objective
from tcsae.train.plan import plan_members
from tcsae.train.presets import build_config
from tcsae.train.sae.protocol import RowTokens, SparseAutoencoder
from tcsae.train.sae.txc import TemporalCrosscoder
from tcsae.train.step.autograd import autograd_step
from tcsae.train.step.registry import STEPS

D, F, W = 4, 10, 3


def crosscoder(seed=0, k=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sae = TemporalCrosscoder(D, F, window=W, k=k)
    sae.initialise(TrainConfig().sae, seed, torch.randn(D, generator=generator))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae.to(dtype)


def windows(n=5, seed=1):
    return torch.randn(n, W, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_codes_and_reconstructions_are_the_definition():
    sae, x = crosscoder(), windows()
    out = sae(x)
    for i in range(len(x)):
        z, x_hat, _ = reference.txc_window(sae, x[i])
        torch.testing.assert_close(out.features[i], z)
        torch.testing.assert_close(out.reconstruction[i], x_hat)
    assert (out.features > 0).sum(1).max() <= 3


def test_loss_and_gradient_are_the_definition():
    sae, x, dead = crosscoder(), windows(), torch.zeros(F, dtype=torch.bool)
    dead[[1, 4, 8, 9]] = True
    result = autograd_step(sae, x, Objective(aux_k=2, aux_weight=0.5), dead_F=dead)
    found = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    loss = reference.txc_loss(sae, x, [1, 4, 8, 9], 2, 0.5)
    loss.backward()
    assert float(result.total) == pytest.approx(loss.item())
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("dead", [(), (1, 4, 8, 9)])
@pytest.mark.parametrize("groups", [(), ((4, 0.3), (F, 0.7))])
def test_the_step_by_hand_is_that_of_autograd(dead, groups):
    x, mask = windows(9), torch.zeros(F, dtype=torch.bool)
    mask[list(dead)] = True
    objective = Objective(aux_k=2, aux_weight=0.5, groups=groups)
    found = []
    for step in (autograd_step, STEPS.get("txc").step):
        sae = crosscoder()
        result = step(sae, x, objective, dead_F=mask)
        found.append((result, {name: p.grad for name, p in sae.named_parameters()}))
    (by_autograd, expected), (by_hand, mine) = found
    for name in ("total", "reconstruction", "error", "auxiliary", "sparsity"):
        torch.testing.assert_close(getattr(by_hand, name), getattr(by_autograd, name), msg=name)
    assert torch.equal(by_hand.fired_F, by_autograd.fired_F)
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient)


def test_rows_of_the_decoder_have_norm_1_over_positions_and_width_together():
    sae = crosscoder()
    sae.constrain()
    torch.testing.assert_close(sae.W_dec.view(F, W, D).square().sum((1, 2)), torch.ones(F, dtype=torch.float64))
    fresh = TemporalCrosscoder(D, F, window=W, k=2)
    fresh.initialise(TrainConfig().sae, 3, torch.arange(4.0))
    torch.testing.assert_close(fresh.W_dec.norm(dim=1), torch.ones(F))
    assert torch.equal(fresh.b_dec.view(W, D), torch.arange(4.0).expand(W, D))
    assert torch.equal(fresh.W_enc, fresh.W_dec.T)


def test_a_tokens_code_is_that_of_the_window_that_ends_there():
    sae, coder = crosscoder(), crosscoder().token_coder()
    x = torch.randn(3, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[0, 0] = valid[1, 4] = False
    documents = torch.tensor([[0] * 9, [1] * 9, [2] * 5 + [3] * 4])
    out = coder.on_rows(x, RowTokens.of(valid, documents))
    filling = sae.b_dec.view(W, D)
    n_complete = 0
    for r in range(3):
        for t in range(9):
            window, whole = [x[r, t]], True
            for back in range(1, W):
                s = t - back
                whole = whole and s >= 0 and bool(valid[r, s]) and documents[r, s] == documents[r, t]
                window.insert(0, x[r, s] if whole else filling[W - 1 - back])
            z, x_hat, _ = reference.txc_window(sae, torch.stack(window))
            torch.testing.assert_close(out.features[r, t], z)
            torch.testing.assert_close(out.parts["windows"][r, t], x_hat)
            torch.testing.assert_close(out.reconstruction[r, t], x_hat[-1])
            assert bool(out.parts["complete"][r, t]) == whole
            n_complete += whole
    assert 0 < n_complete < 27
    torch.testing.assert_close(coder.decode(out.features), out.reconstruction)
    assert (coder.W_enc.shape, coder.W_dec.shape, coder.b_dec.shape) == ((D, F), (F, D), (D,))


def test_saved_rescaled_and_loaded_it_is_the_same(tmp_path):
    sae, x = crosscoder(dtype=torch.float32).eval(), windows().float()
    raw = sae.rescaled(4.0)
    torch.testing.assert_close(raw(x / 4).features, sae(x).features)
    torch.testing.assert_close(raw(x / 4).reconstruction * 4, sae(x).reconstruction)
    sae.save(tmp_path)
    again = SparseAutoencoder.load(tmp_path)
    assert isinstance(again, TemporalCrosscoder)
    assert torch.equal(again(x).features, sae(x).features)


def members(**changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    config = build_config(None, None, {"sae.architecture": "txc", "temporal.form": "none"} | dotted)
    return plan_members(config, {}, layer=1, d_model=8, n_tokens=10_000)


@pytest.mark.parametrize(("k_of", "active"), [("token", 15), ("window", 3)])
def test_both_conventions_of_k(k_of, active):
    (plan,) = members(sae__k=3, sae__k_of=k_of)
    assert plan.name == "l1-txc3-none-w5-s0"
    assert plan.config.sae.window == 5
    assert TemporalCrosscoder.build(plan.config.sae, 8).k == active


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sae__k": 20}, r"k is 100 per window of 5, the dictionary has 64 features: give a smaller --k"),
        ({"temporal__form": "pairwise"}, r"txc has one code for a whole window.*use --temporal none"),
        ({"sae__activation": "relu"}, r"txc keeps the k largest of a window, activation 'relu' does not"),
        ({"data__view": "pairs"}, r"architecture 'txc' sees windows, data.view = 'pairs' shows it none"),
        ({"data__view": "rows"}, r"architecture 'txc' sees windows, data.view = 'rows' shows it none"),
    ],
)
def test_what_it_cannot_be_is_one_sentence(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        members(**({"sae__k": 3} | changes))
