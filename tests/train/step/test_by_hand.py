"""The hand-written step against autograd in float64, sparse and dense, whatever the objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import step_terms_and_gradients
from tcsae.train.loss.objective import Objective, TemporalTerm
from tcsae.train.loss.registry import TERMS as TERMS_OF
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE
from tcsae.train.step.autograd import autograd_step
from tcsae.train.step.by_hand import sparse_step
from tcsae.train.step.registry import GRADIENTS, STEPS

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
SPARSE, DENSE = 1.0, -1.0  # from which density on whole matrices are used: never, always


def random_sae(
    activation: Activation,
    *,
    d: int = 5,
    f: int = 24,
    bias: float = 0.0,
    unit: bool = True,
    seed: int = 0,
    **options: Any,
) -> TemporalSAE:
    """In float64; ``bias`` moves all pre-activations, and so the density of relu."""
    generator = torch.Generator().manual_seed(seed)
    sae = TemporalSAE(d, f, activation, **options).double()
    with torch.no_grad():
        for name in WEIGHTS:
            weight = getattr(sae, name)
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.5)
        if activation.kind == "jumprelu":
            sae.threshold.copy_(torch.rand(f, generator=generator, dtype=torch.float64))
        sae.b_enc.add_(bias)
        if unit:
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae.train()


def windows(n: int, w: int, d: int = 5, seed: int = 1) -> torch.Tensor:
    """Activations whose neighbours resemble each other, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 1, d, generator=generator, dtype=torch.float64)
    return shared + torch.randn(n, w, d, generator=generator, dtype=torch.float64) * 0.3


def check(sae: TemporalSAE, x: torch.Tensor, objective: Objective, *, tolerance: float = 1e-9, **options: Any) -> None:
    """Terms, gradients and counts of the step, both ways, equal those of the reference."""
    partner, dead = options.get("partner_NP"), options.get("dead_F")
    terms, gradients, fired = step_terms_and_gradients(sae, x, objective, partner, dead)
    for above in (SPARSE, DENSE):
        sae.zero_grad(set_to_none=True)
        result = sparse_step(sae, x.to(sae.W_enc.dtype), objective, dense_above=above, **options)
        for name, value in terms.items():
            torch.testing.assert_close(
                getattr(result, name), value.detach().float(), rtol=1e-5, atol=1e-6, msg=f"{name}"
            )
        assert torch.equal(result.fired_F, fired)
        for name in gradients:
            mine = getattr(sae, name)
            assert mine.grad.stride() == mine.stride()
            expected = torch.zeros_like(mine.grad) if gradients[name] is None else gradients[name]
            difference = (mine.grad.double() - expected).abs().max()
            assert difference <= tolerance * (1 + expected.abs().max()), f"{name}, dense above {above}: {difference}"


JUMPRELU = Activation("jumprelu", bandwidth=0.4)
ACTIVATIONS = (Activation("relu"), Activation("topk", k=3), Activation("batchtopk", k=3), JUMPRELU)
TERMS = (
    {"form": "none"},
    {"form": "pairwise"},
    {"form": "pairwise", "lag": 2},
    {"form": "squared_norms"},
    {"form": "window_mean"},
    {"form": "normalised"},
    {"form": "l1"},
    {"form": "cosine"},
)


GROUPS = ((), ((24, 0.7),), ((5, 0.1), (24, 0.4)), ((1, 0.0), (2, 0.5), (11, 1.0), (24, 0.2)))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    activation=st.sampled_from(ACTIVATIONS),
    term=st.sampled_from(TERMS),
    groups=st.sampled_from(GROUPS),
    aim=st.sampled_from([0.0, 0.7, 6.0]),
    n=st.integers(1, 6),
    w=st.integers(1, 5),
    bias=st.sampled_from([-50.0, -1.5, 0.0, 50.0]),
    unit=st.booleans(),
    decoder_norms=st.booleans(),
    scope=st.sampled_from([24, 7]),
    centred=st.booleans(),
    seed=st.integers(0, 9),
)
def test_step_equals_autograd(
    activation: Activation,
    term: dict,
    groups: tuple,
    aim: float,
    n: int,
    w: int,
    bias: float,
    unit: bool,
    decoder_norms: bool,
    scope: int,
    centred: bool,
    seed: int,
) -> None:
    sae = random_sae(activation, bias=bias, unit=unit, seed=seed, subtract_b_dec=centred)
    temporal = TemporalTerm(weight=0.3, n_features=scope, **term)
    objective = Objective(0.2, decoder_norms, temporal, groups=groups, l0_aim=aim if activation is JUMPRELU else 0.0)
    check(sae, windows(n, w, seed=seed), objective)


@pytest.mark.parametrize("form", [form for form in GRADIENTS if TERMS_OF.get(form).degree is not None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scope", [24, 7])
def test_features_may_have_weights_of_their_own(activation: Activation, form: str, scope: int) -> None:
    weights = torch.rand(24, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    weights[4] = 0.0
    temporal = TemporalTerm(form=form, weight=0.5, n_features=scope, feature_weights=weights)
    check(random_sae(activation, bias=0.5), windows(5, 4), Objective(0.1, False, temporal))
    sae, x = random_sae(activation), windows(6, 5)
    found = [
        step(sae, x, Objective(temporal=replace(temporal, feature_weights=each))).temporal
        for step in (autograd_step, sparse_step)
        for each in (None, torch.ones(24), 2 * torch.ones(24))
    ]
    torch.testing.assert_close(found, [found[0], found[0], 2 * found[0]] * 2)


@pytest.mark.parametrize("form", list(GRADIENTS))
@pytest.mark.parametrize("kind", STEPS.get("sae").activations)
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("groups", [(), ((5, 0.1), (24, 0.4))])
def test_every_registered_gradient_equals_autograd(kind: str, form: str, dense_above: float, groups: tuple) -> None:
    """What is registered as derived by hand, against the step that is always right; in float64."""
    activation = next(each for each in ACTIVATIONS if each.kind == kind)
    mine, theirs = random_sae(activation, seed=4), random_sae(activation, seed=4)
    x, temporal = windows(6, 5, seed=4), TemporalTerm(form=form, weight=0.5, n_features=20)
    objective = Objective(0.2, True, temporal, aux_k=3, aux_weight=0.3, groups=groups)
    dead = torch.arange(24) % 5 == 0
    found = sparse_step(mine, x, objective, dead_F=dead, dense_above=dense_above)
    expected = autograd_step(theirs, x, objective, dead_F=dead)
    for name in ("total", "reconstruction", "sparsity", "temporal", "auxiliary", "error"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-9)
    assert torch.equal(found.fired_F, expected.fired_F)
    for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    activation=st.sampled_from(ACTIVATIONS),
    form=st.sampled_from(["pairwise", "l1", "cosine", "normalised"]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_partners_may_be_anyone(activation: Activation, form: Any, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, w = 5, 4
    partner = torch.randint(n * w, (n, w - 1), generator=generator)
    partner[torch.rand(n, w - 1, generator=generator) > share] = -1
    temporal = TemporalTerm(form=form, weight=0.5, partner="other_document", n_features=24)
    check(random_sae(activation, seed=seed), windows(n, w), Objective(0.1, False, temporal), partner_NP=partner)


@pytest.mark.parametrize("n_dead", [0, 1, 4, 20])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_auxiliary_loss_revives_dead_features(activation: Activation, n_dead: int) -> None:
    dead = torch.zeros(24, dtype=torch.bool)
    dead[torch.randperm(24, generator=torch.Generator().manual_seed(n_dead))[:n_dead]] = True
    for groups in GROUPS[:3]:
        objective = Objective(aux_k=4, aux_weight=0.5, groups=groups)
        check(random_sae(activation), windows(4, 5), objective, dead_F=dead)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_agrees_within_its_own_precision(activation: Activation) -> None:
    sae = random_sae(activation, d=16, f=64).float()
    x = windows(20, 5, d=16)
    temporal = TemporalTerm(form="pairwise", weight=0.3, n_features=64)
    check(sae, x.float(), Objective(0.05, False, temporal), tolerance=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_contrastive_term_equals_the_autograd_step(activation: Activation) -> None:
    sae = random_sae(activation).float()
    x = windows(6, 4).float()
    objective = Objective(temporal=TemporalTerm(form="contrastive", weight=0.5, n_features=24))
    expected = autograd_step(sae, x, objective)
    gradients = {name: getattr(sae, name).grad.clone() for name in WEIGHTS}
    sae.zero_grad(set_to_none=True)
    result = sparse_step(sae, x, objective, dense_above=SPARSE)
    torch.testing.assert_close(result.temporal, expected.temporal)
    for name in WEIGHTS:
        torch.testing.assert_close(getattr(sae, name).grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_gradients_accumulate_and_fit_any_layout() -> None:
    sae = random_sae(Activation("relu"))
    sae.W_enc = torch.nn.Parameter(sae.W_enc.detach().contiguous())
    objective = Objective(0.2)
    x = windows(3, 5)
    sparse_step(sae, x, objective, dense_above=SPARSE)
    once = {name: getattr(sae, name).grad.clone() for name in WEIGHTS}
    sparse_step(sae, x, objective, dense_above=DENSE)
    for name in WEIGHTS:
        torch.testing.assert_close(getattr(sae, name).grad, 2 * once[name])
        assert getattr(sae, name).grad.stride() == getattr(sae, name).stride()


def test_batchtopk_follows_the_threshold_of_the_autograd_step() -> None:
    mine, theirs = (random_sae(Activation("batchtopk", k=3)).float() for _ in range(2))
    for seed in range(3):
        x = windows(4, 5, seed=seed).float()
        sparse_step(mine, x, Objective())
        autograd_step(theirs, x, Objective())
    assert mine.threshold is not None
    torch.testing.assert_close(mine.threshold, theirs.threshold)


@pytest.mark.parametrize("above", [SPARSE, DENSE])
@pytest.mark.parametrize("where", ["weight", "input"])
def test_nan_reaches_the_loss(above: float, where: str) -> None:
    sae, x = random_sae(Activation("relu")), windows(3, 5)
    with torch.no_grad():
        (sae.W_enc if where == "weight" else x)[2, 1] = torch.nan
    assert torch.isnan(sparse_step(sae, x, Objective(), dense_above=above).total)


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("bandwidth", [0.05, 1.0])
@pytest.mark.parametrize("aim", [0.0, 3.0])
def test_thresholds_learn_what_the_autograd_step_teaches_them(threshold: float, bandwidth: float, aim: float) -> None:
    sae = random_sae(Activation("jumprelu", bandwidth=bandwidth)).float()
    with torch.no_grad():
        sae.threshold.fill_(threshold)  # type: ignore[union-attr]
    x, temporal = windows(20, 5).float(), TemporalTerm(form="pairwise", weight=0.3, n_features=24)
    objective, found = Objective(0.4, False, temporal, l0_aim=aim), []
    for step, options in (
        (autograd_step, {}),
        (sparse_step, {"dense_above": SPARSE}),
        (sparse_step, {"dense_above": DENSE}),
    ):
        sae.zero_grad(set_to_none=True)
        result = step(sae, x, objective, **options)
        found.append([result.total, result.sparsity, *(parameter.grad for parameter in sae.parameters())])
    assert found[0][-1].count_nonzero() > 0 or threshold == 5.0
    for mine in found[1:]:
        torch.testing.assert_close(mine, found[0], rtol=1e-4, atol=1e-5)
