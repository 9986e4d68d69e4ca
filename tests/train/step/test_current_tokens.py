"""Temporal SAE's loss: of a pair the current token alone is reconstructed; AuxK normalised; both steps in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import step_terms_and_gradients
from tcsae.train.loss.objective import Objective, TemporalTerm
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE
from tcsae.train.step.autograd import autograd_step
from tcsae.train.step.by_hand import sparse_step

D, F = 5, 24


def random_sae(kind: str, seed: int = 0) -> TemporalSAE:
    generator = torch.Generator().manual_seed(seed)
    sae = TemporalSAE(D, F, Activation(kind, k=3)).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return sae.train()


def pairs(n: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 1, D, generator=generator, dtype=torch.float64)
    return shared + 0.5 * torch.randn(n, 2, D, generator=generator, dtype=torch.float64)


TSAE = {"form": "contrastive", "similarity": "dot", "temperature": 1.0, "partner": "earlier"}
STEPS: dict[str, Any] = {
    "autograd": autograd_step,
    "sparse": lambda *args, **options: sparse_step(*args, dense_above=1.0, **options),
    "dense": lambda *args, **options: sparse_step(*args, dense_above=-1.0, **options),
}


def check(sae: TemporalSAE, x: torch.Tensor, objective: Objective, **options: Any) -> None:
    terms, gradients, fired = step_terms_and_gradients(
        sae, x, objective, options.get("partner_NP"), options.get("dead_F")
    )
    for name, step in STEPS.items():
        sae.zero_grad(set_to_none=True)
        result = step(sae, x, objective, **options)
        for term, value in terms.items():
            torch.testing.assert_close(
                getattr(result, term), value.detach().float(), rtol=1e-5, atol=1e-6, msg=f"{name}: {term}"
            )
        assert torch.equal(result.fired_F, fired), name
        for weight, expected in gradients.items():
            found = getattr(sae, weight).grad
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["topk", "batchtopk"]),
    term=st.sampled_from(
        [TSAE, TSAE | {"similarity": "cosine"}, {"form": "pairwise"}, {"form": "l1"}, {"form": "none"}]
    ),
    groups=st.sampled_from([(), ((5, 0.1), (F, 0.4))]),
    scope=st.sampled_from([F, 5]),
    dead=st.sampled_from([(), (1, 4, 8, 20)]),
    normalised=st.booleans(),
    n=st.integers(1, 7),
    seed=st.integers(0, 9),
)
def test_loss_and_gradient_are_the_definition(
    kind: str, term: dict, groups: tuple, scope: int, dead: tuple, normalised: bool, n: int, seed: int
) -> None:
    mask = torch.zeros(F, dtype=torch.bool)
    mask[list(dead)] = True
    objective = Objective(
        temporal=TemporalTerm(weight=0.3, n_features=scope, **term), aux_k=2, aux_weight=0.5, groups=groups,
        aux_normalised=normalised and n > 1, current_only=True,
    )  # fmt: skip
    check(random_sae(kind, seed), pairs(n, seed), objective, dead_F=mask)


@pytest.mark.parametrize("form", ["pairwise", "cosine", "contrastive"])
def test_partners_of_other_pairs(form: str) -> None:
    """A control compares the earlier token of a pair with any token of the batch, current or earlier."""
    partner = torch.tensor([[3], [0], [-1], [9], [5]])
    objective = Objective(
        temporal=TemporalTerm(form=form, weight=0.5, partner="other_document", n_features=F), current_only=True
    )  # fmt: skip
    if form == "contrastive":
        sae, found = random_sae("batchtopk"), []
        for step in STEPS.values():
            sae.zero_grad(set_to_none=True)
            total = step(sae, pairs(5), objective, partner_NP=partner).total
            found.append([total, *(parameter.grad for parameter in sae.parameters())])
        for each in found[1:]:
            torch.testing.assert_close(each, found[0])
    else:
        check(random_sae("batchtopk"), pairs(5), objective, partner_NP=partner)


def test_the_earlier_token_changes_nothing_without_the_term() -> None:
    x = pairs(6)
    other = torch.stack([100 * torch.randn(6, D, dtype=torch.float64), x[:, 1]], 1)
    for step in STEPS.values():
        found = []
        for each in (x, other):
            sae = random_sae("batchtopk")
            result = step(sae, each, Objective(current_only=True))
            found.append([result.total, result.fired_F, sae.threshold, *(p.grad for p in sae.parameters())])
        torch.testing.assert_close(found[0], found[1])


def test_normalised_auxk_where_all_tokens_are_reconstructed() -> None:
    dead = torch.arange(F) % 5 == 0
    check(random_sae("topk"), pairs(6), Objective(aux_k=3, aux_weight=0.5, aux_normalised=True), dead_F=dead)
