"""Stability over seeds enters a study as a metric with a value per seed and an honest spread."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from synthetic_study import World, make_members, study_file
from tcsae.study.analysis import analyse
from tcsae.study.statistics.between_seeds import pseudo_values
from tcsae.train.sae.activation import Activation
from tiny_runs import random_sae

WORLD = World(variants=("next", "none"))
OUTCOMES = [
    {"metric": "stability", "better": "higher", "kind": "features"},
    {"metric": "stability_matched", "better": "higher", "kind": "features"},
]
COMPARISONS = [{"name": "the term", "treatment": "next", "baseline": "none"}]


def save_weights(members) -> None:
    """Every seed of ``next`` finds the same features but for a little; those of ``none`` have nothing in common."""
    for member in members:
        sae = random_sae(64, 32, Activation("topk", k=4), seed=0 if member.variant == "next" else 1 + member.seed)
        if member.variant == "next":
            generator = torch.Generator().manual_seed(member.seed)
            with torch.no_grad():
                sae.W_dec += 0.02 * torch.randn(sae.W_dec.shape, generator=generator)
        sae.save(member.run)


def test_the_same_features_found_again_are_a_benefit(tmp_path):
    members = make_members(tmp_path, WORLD)
    save_weights(members)
    analysis = analyse(study_file(WORLD, outcomes=OUTCOMES, comparisons=COMPARISONS), members)
    cosine, matched = analysis.comparisons[0].outcomes
    assert cosine.treatment > 0.95 > 0.5 > cosine.baseline
    assert (matched.treatment, matched.baseline) == (pytest.approx(1), pytest.approx(0))
    assert cosine.effect.low > 0
    assert cosine.effect.levels.startswith("3 seeds alone")
    assert analysis.decisions[0].verdict == "helps"
    assert "cosine of the decoder row" in analysis.definitions["stability"].text


def test_two_seeds_are_one_pair_and_have_no_spread(tmp_path):
    world = World(variants=("next", "none"), seeds=(0, 1))
    members = make_members(tmp_path, world)
    save_weights(members)
    analysis = analyse(study_file(world, outcomes=OUTCOMES, comparisons=COMPARISONS), members)
    assert {reason.word for reason in analysis.decisions[0].reasons} == {"not measured"}
    assert "stability and stability_matched of next at toy l5 is not measured: it needs three seeds, there are 2" in (
        analysis.notes
    )


def test_weights_that_are_gone_are_named(tmp_path):
    members = make_members(tmp_path, WORLD)
    save_weights(members)
    (members[0].run / "sae_weights.safetensors").unlink()
    analysis = analyse(study_file(WORLD, outcomes=OUTCOMES, comparisons=COMPARISONS), members)
    assert len(analysis.notes) == 1
    assert "of next at toy l5 is not measured:" in analysis.notes[0]


def test_nobody_reads_weights_that_no_outcome_asks_for(tmp_path):
    analysis = analyse(study_file(WORLD, comparisons=COMPARISONS), make_members(tmp_path, WORLD))
    assert "stability" not in analysis.definitions


def test_pseudo_values_give_mean_and_standard_error():
    """Of pairs that are sums of their seeds' own numbers both are known."""
    own = np.random.default_rng(0).normal(0, 1, 6)
    pairs = {(a, b): float(own[a] + own[b]) / 2 for a, b in combinations(range(6), 2)}
    values = pseudo_values(pairs, 6)
    assert np.mean(values) == pytest.approx(own.mean())
    assert values == pytest.approx(own.tolist())
