"""λ2 of every feature: the running statistics against loops, and what the rules are for."""

from __future__ import annotations

import pytest
import reference
import torch
from stores import make_store
from tcsae.train import run
from tcsae.train.loop.feature_weights import EVERY, FeatureWeights, neighbour_sums
from tcsae.train.presets import build_config
from tcsae.train.run_folder.metrics_log import read_metrics


def slow_and_fast(seed: int = 0) -> torch.Tensor:
    """Codes [200, 5, 6]: features 0 and 1 stay as they are in a window, 2 and 3 change, 4 is rare, 5 never fires."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(200, 5, 6, generator=generator, dtype=torch.float64)
    z[..., :2] = torch.rand(200, 1, 2, generator=generator, dtype=torch.float64)
    z *= torch.rand(200, 5, 6, generator=generator) < torch.tensor([1.0, 0.9, 0.5, 0.2, 0.008, 0.0])
    return z


@pytest.mark.parametrize("rule", ["density", "autocorrelation"])
def test_weights_are_those_of_the_definition(rule):
    z = slow_and_fast()
    fired = (z > 0).sum((0, 1))
    weights = FeatureWeights(rule, 6, torch.device("cpu"))
    weights.count(fired, 1000)
    weights.compare(neighbour_sums(z))
    weights.settle()
    expected = reference.feature_weights(z.tolist(), fired.tolist(), 1000, rule)
    assert weights.value_F.tolist() == pytest.approx(expected, rel=1e-4)
    assert weights.value_F[4:].tolist() == [1.0, 1.0]  # too rare to be known
    if rule == "autocorrelation":
        assert weights.value_F[:2].min() > 1 > weights.value_F[2:4].max()
    else:
        assert weights.value_F[:4].tolist() == sorted(weights.value_F[:4].tolist())
    active = fired[:4] * weights.value_F[:4]
    assert active.sum().item() == pytest.approx(
        fired[:4].sum().item(), rel=0.05
    )  # before limits, λ2 is what it was on average


def test_nothing_known_is_no_difference():
    weights = FeatureWeights("autocorrelation", 6, torch.device("cpu"))
    assert weights.value_F.tolist() == [1.0] * 6
    weights.count(torch.zeros(6, dtype=torch.int64), 1000)
    weights.settle()
    assert weights.value_F.tolist() == [1.0] * 6


@pytest.mark.parametrize("rule", ["density", "autocorrelation"])
def test_statistics_follow_and_go_on_from_a_checkpoint(rule):
    whole, parts = (FeatureWeights(rule, 6, torch.device("cpu")) for _ in range(2))
    for step in range(8 * EVERY):
        z = slow_and_fast(step // EVERY)
        if step == 5 * EVERY + 3:
            state, parts = parts.state_dict(), FeatureWeights(rule, 6, torch.device("cpu"))
            parts.load_state_dict(state)
        for weights in (whole, parts):
            weights.count((z > 0).sum((0, 1)), 1000)
            if step % EVERY == 0:
                weights.compare(neighbour_sums(z))
                weights.settle()
    assert torch.equal(whole.value_F, parts.value_F)
    for _ in range(200):  # what was slow becomes fast
        weights = whole
        swapped = slow_and_fast()[..., [2, 3, 0, 1, 4, 5]]
        weights.count((swapped > 0).sum((0, 1)), 1000)
        weights.compare(neighbour_sums(swapped))
        weights.settle()
    if rule == "autocorrelation":
        assert whole.value_F[2:4].min() > 1 > whole.value_F[:2].max()


def test_deciles_of_the_weights_are_logged_with_the_weight_itself(tmp_path):
    store = make_store(tmp_path / "cache", rows=64, d_model=8, documents=12)
    small = {"data.store": str(store), "run.out": str(tmp_path / "runs"), "data.batch_size": 60, "sae.width": 32,
             "sae.k": 4, "run.steps": 60, "run.log_every": 10, "run.device": "cpu", "run.dtype": "float32",
             "temporal.weight": 0.3, "temporal.warmup": 0.5}  # fmt: skip
    rule = {"temporal.per_feature": "density"}
    tc, twin = run.train(build_config(None, None, small | rule)).runs
    logged = read_metrics(tc)
    assert [entry["temporal_weight"] for entry in logged] == pytest.approx(
        [0.3 * min(1, s / 30) for s in range(9, 60, 10)]
    )
    last = logged[-1]
    assert last["temporal_weight_p10"] < last["temporal_weight_median"] < last["temporal_weight_p90"]
    assert "temporal_weight" not in read_metrics(twin)[-1]
    (tc, _) = run.train(build_config(None, None, small | {"run.out": str(tmp_path / "alike")})).runs
    assert read_metrics(tc)[-1]["temporal_weight"] == pytest.approx(0.3)
    assert "temporal_weight_median" not in read_metrics(tc)[-1]
