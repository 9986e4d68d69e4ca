"""Every term of the loss: its value against plain loops in float64, its gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcsae.train.loss import terms
from tcsae.train.loss.objective import TemporalTerm
from tcsae.train.loss.registry import TERMS
from tcsae.train.sae.activation import batch_top_k, jump_relu, step_function, top_k

FORMS = list(TERMS)
examples = settings(max_examples=15, deadline=None)


def codes(n, w, f, seed, *, sparse=True):
    z = torch.randn(n, w, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.relu() if sparse else z.abs() + 0.1


def term(form, f, **changes):
    return TemporalTerm(**({"form": form, "weight": 1.0, "n_features": f} | changes))


@examples
@given(
    n=st.integers(1, 4), w=st.integers(2, 5), f=st.integers(1, 6), seed=st.integers(0, 99), form=st.sampled_from(FORMS)
)
def test_every_form_equals_its_loops(n, w, f, seed, form):
    z = codes(n, w, f, seed)
    pairs = reference.loss_pairs(n, w)
    group = [place[0] for place, _ in pairs]
    expected = reference.loss_temporal(form, z, pairs, group=group) if form != "normalised" or z.any() else 0.0
    assert terms.temporal(z, term(form, f)).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@examples
@given(
    w=st.integers(3, 6),
    lag=st.integers(1, 2),
    seed=st.integers(0, 99),
    form=st.sampled_from(["pairwise", "l1", "cosine"]),
)
def test_a_lag_compares_tokens_that_far_apart(w, lag, seed, form):
    z = codes(3, w, 5, seed)
    expected = reference.loss_temporal(form, z, reference.loss_pairs(3, w, lag))
    assert terms.temporal(z, term(form, 5, partner="lag", lag=lag)).item() == pytest.approx(
        expected, rel=1e-6, abs=1e-9
    )


@examples
@given(seed=st.integers(0, 99), form=st.sampled_from(["pairwise", "normalised", "cosine", "l1", "contrastive"]))
def test_partners_are_taken_from_where_the_index_says(seed, form):
    z = codes(4, 3, 5, seed, sparse=False)
    partner = torch.randint(-1, 12, (4, 2), generator=torch.Generator().manual_seed(seed))
    expected = reference.loss_temporal(form, z, reference.loss_pairs(4, 3, partner=partner))
    assert terms.temporal(z, term(form, 5, partner="shuffled"), partner).item() == pytest.approx(
        expected, rel=1e-6, abs=1e-9
    )


@examples
@given(seed=st.integers(0, 99), form=st.sampled_from([form for form in FORMS if TERMS.get(form).degree is not None]))
def test_features_may_have_weights_of_their_own(seed, form):
    z = codes(3, 4, 5, seed)
    weights = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = reference.loss_temporal(form, z, reference.loss_pairs(3, 4), weights=weights)
    found = terms.temporal(z, term(form, 5, feature_weights=weights)).item()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert terms.temporal(z, term(form, 3, feature_weights=weights)).item() == pytest.approx(
        reference.loss_temporal(form, z[..., :3], reference.loss_pairs(3, 4), weights=weights[:3]), rel=1e-6, abs=1e-9
    )


def test_a_batch_without_pairs_costs_nothing_and_has_a_gradient():
    z = codes(2, 3, 4, 0).requires_grad_()
    loss = terms.temporal(z, term("pairwise", 4, partner="same_document"), torch.full((2, 2), -1))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_l2_is_the_pairwise_term_without_its_cross_term():
    z = codes(3, 4, 6, 1)
    a, b = z[:, :-1], z[:, 1:]
    whole = terms.temporal(z, term("pairwise", 6)) + 2 * (a * b).sum(-1).mean()
    assert terms.temporal(z, term("squared_norms", 6)).item() == pytest.approx(whole.item())
    assert terms.temporal(z, term("squared_norms", 6)).item() == pytest.approx(
        reference.loss_temporal("squared_norms", z, reference.loss_pairs(3, 4))
    )


@pytest.mark.parametrize("form", FORMS)
def test_scope_is_the_first_part_of_the_dictionary(form):
    z = codes(3, 4, 10, 2)
    assert torch.equal(terms.temporal(z, term(form, 4)), terms.temporal(z[..., :4], term(form, 4)))
    z.requires_grad_()
    terms.temporal(z, term(form, 4)).backward()
    assert z.grad[..., :4].any()
    assert not z.grad[..., 4:].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("partner", ["next", "given"])
def test_gradients_agree_with_finite_differences(form, partner):
    if TERMS.get(form).whole_windows and partner == "given":
        pytest.skip("it has no partners")
    z = codes(3, 3, 4, 5, sparse=False).requires_grad_()
    index = torch.tensor([[4, 8], [-1, 0], [1, 2]]) if partner == "given" else None
    spec = term(form, 3, temperature=0.5, similarity="dot")
    assert torch.autograd.gradcheck(lambda z: terms.temporal(z, spec, index), z)


@pytest.mark.parametrize("form", ["cosine", "contrastive", "normalised"])
def test_all_zero_codes_give_finite_losses_and_gradients(form):
    z = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True)
    loss = terms.temporal(z, term(form, 4))
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(z.grad).all()


def test_constant_codes_have_no_variation_and_scaling_does_not_help_the_normalised_form():
    z = codes(4, 1, 6, 3).expand(4, 5, 6)
    for form in ("pairwise", "window_mean", "normalised", "l1"):
        assert terms.temporal(z, term(form, 6)).item() == pytest.approx(0, abs=1e-12)
    z = codes(4, 5, 6, 3)
    for form in ("normalised", "cosine"):
        assert terms.temporal(z * 0.01, term(form, 6)).item() == pytest.approx(terms.temporal(z, term(form, 6)).item())


def test_tokens_of_one_window_are_no_negatives_of_each_other():
    z = codes(2, 4, 6, 3, sparse=False)
    same = z[:, :1].expand(2, 4, 6)  # neighbours identical: only the other window's tokens compete
    unit = same / same.norm(dim=-1, keepdim=True)
    across = (unit[0, 0] * unit[1, 0]).sum().item() / 0.1
    expected = math.log(math.exp(10) + 3 * math.exp(across)) - 10
    assert terms.temporal(same, term("contrastive", 6)).item() == pytest.approx(expected)


@examples
@given(n=st.integers(1, 3), w=st.integers(1, 4), seed=st.integers(0, 99))
def test_reconstruction_and_sparsity_are_sums_over_width_and_means_over_tokens(n, w, seed):
    x, y = codes(n, w, 5, seed), codes(n, w, 5, seed + 100)
    norms = codes(1, 1, 5, seed + 200)[0, 0]
    squares = sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
    assert terms.reconstruction(x, y).item() == pytest.approx(squares / (n * w))
    assert terms.l1(x).item() == pytest.approx(sum(x.flatten().tolist()) / (n * w))
    weighed = sum(a * b for token in x.flatten(0, 1).tolist() for a, b in zip(token, norms.tolist(), strict=True))
    assert terms.l1(x, norms).item() == pytest.approx(weighed / (n * w))


@examples
@given(n=st.integers(1, 4), f=st.integers(2, 8), k=st.integers(1, 2), seed=st.integers(0, 99))
def test_activations_equal_their_sorted_definitions(n, f, k, seed):
    pre = codes(n, 1, f, seed, sparse=False)[:, 0] - 0.6
    threshold = codes(1, 1, f, seed + 1)[0, 0]
    for found, kind in (
        (top_k(pre, k), "topk"),
        (batch_top_k(pre, k), "batchtopk"),
        (jump_relu(pre, threshold, 0.1), "jumprelu"),
    ):
        assert found.tolist() == reference.sae_codes(pre, kind, k, threshold)


@pytest.mark.parametrize("activate", [top_k, batch_top_k])
def test_gradient_reaches_exactly_the_kept_entries(activate):
    pre = codes(5, 1, 8, 7, sparse=False)[:, 0].requires_grad_()
    z = activate(pre, 3)
    z.sum().backward()
    assert torch.equal(pre.grad, (z > 0).double())
    assert (z > 0).sum() == 15


def test_the_threshold_gradient_is_the_papers_pseudo_derivative():
    pre = torch.tensor([[0.30, 0.52, 0.90], [0.48, 0.10, 0.51]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    (jump_relu(pre, threshold, 0.1) * upstream).sum().backward()
    # inside the rectangle (0.45, 0.55): (1, 0) = 0.48, (0, 1) = 0.52, (1, 2) = 0.51; each −θ/ε times its upstream
    # gradient
    assert threshold.grad.tolist() == pytest.approx([-5.0 * 4, -5.0 * 2, -5.0 * 6])
    assert pre.grad.tolist() == [[0, 2, 3], [0, 0, 6]]
    threshold.grad = None
    (step_function(pre, threshold, 0.1) * upstream).sum().backward()
    assert threshold.grad.tolist() == pytest.approx([-10.0 * 4, -10.0 * 2, -10.0 * 6])


@examples
@given(n=st.integers(1, 4), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_aux_k_rebuilds_the_residual_from_dead_features(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    pre, decoder = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, 6), (6, 3)))
    residual = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    dead = torch.rand(6, generator=generator) < 0.5
    loss = terms.aux_k(residual, pre, decoder, dead, k)
    assert loss.item() == pytest.approx(reference.aux_k_loss(residual, pre, decoder, dead, k))


def test_aux_k_gradient_reaches_dead_features_only():
    pre = codes(4, 1, 6, 1, sparse=False)[:, 0].requires_grad_()
    decoder = codes(6, 1, 3, 2)[:, 0].requires_grad_()
    dead = torch.tensor([True, False, True, False, False, True])
    terms.aux_k(codes(4, 1, 3, 3)[:, 0], pre, decoder, dead, 2).backward()
    assert not pre.grad[:, ~dead].any()
    assert not decoder.grad[~dead].any()
    assert pre.grad[:, dead].any()
