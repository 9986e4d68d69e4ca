"""Where b_dec begins: the geometric median is the point of least mean distance, of tokens that count, in
scaled units.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import make_store
from tcsae.cache.store import ActivationStore
from tcsae.train import run
from tcsae.train.loop import geometric_median as median_module
from tcsae.train.loop.geometric_median import geometric_median, sample_tokens
from tcsae.train.loop.inputs import Inputs
from tcsae.train.presets import build_config
from tcsae.train.run_folder.record import load_run
from tcsae.train.sae.temporal_sae import TemporalSAE

coordinates = st.integers(-5, 5)


def mean_distance(x_ND, at_D):
    return float(torch.linalg.vector_norm(x_ND.double() - at_D.double(), dim=1).mean())


def least_mean_distance(x_ND):
    """By descent on distances rounded off at 0, ever less, and by trying every token: slow, but nothing to get stuck
    at.
    """
    x_ND = x_ND.double()
    at_D = x_ND.mean(0).clone().requires_grad_()
    for rounding in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        descent = torch.optim.LBFGS([at_D], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def distance(descent=descent, rounding=rounding):
            descent.zero_grad()
            mean = ((x_ND - at_D).square().sum(1) + rounding**2).sqrt().mean()
            mean.backward()
            return mean

        descent.step(distance)
    return min(mean_distance(x_ND, place) for place in (*x_ND, at_D.detach()))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda d: st.lists(st.lists(coordinates, min_size=d, max_size=d), min_size=1, max_size=12)
    )
)
@example([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.1, 0.1]])  # the median is a token
@example([[0.0], [0.0], [0.0], [10.0]])  # several tokens in one place
@example(
    [[0.0, 0.0], [2.0, 0.0], [1.0, 3.0], [1.0, 1.0]]
)  # the mean, where it begins, is a token that is not the median
@example([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [1.0, 3.0]])
@example([[0.0], [1.0], [5.0], [9.0]])  # all between 1 and 5 are medians
def test_no_point_is_nearer_on_average(points):
    x_ND = torch.tensor(points, dtype=torch.float32)
    found, best = mean_distance(x_ND, geometric_median(x_ND)), least_mean_distance(x_ND)
    assert found <= best + 1e-4 * (1 + best)  # the last steps towards a token that is the median are short


def test_it_moves_with_the_tokens_and_hardly_with_outliers():
    x_ND = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    plain = geometric_median(x_ND)
    torch.testing.assert_close(geometric_median(3 * x_ND + 7), 3 * plain + 7, atol=1e-4, rtol=0)
    outlying = torch.cat([x_ND, torch.full((25, 16), 1e4)])
    assert (geometric_median(outlying) - plain).norm() < 0.5
    assert (outlying.mean(0) - plain).norm() > 1000


def test_it_stops_when_the_pulls_balance(monkeypatch):
    x_ND = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    away = x_ND.double() - geometric_median(x_ND, tolerance=1e-5).double()
    assert (away / away.norm(dim=1, keepdim=True)).mean(0).norm() <= 2e-5
    monkeypatch.setattr(median_module, "_MOST_STEPS", 0)
    torch.testing.assert_close(geometric_median(x_ND), x_ND.mean(0))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("cache"), rows=64, context=16, d_model=8, documents=12)


def test_the_sample_holds_only_tokens_that_count_evenly_spaced(store, monkeypatch):
    opened = ActivationStore.open(store)
    everything = sample_tokens(opened, 64, None)  # fewer tokens than the sample may hold
    torch.testing.assert_close(everything, opened.rows(0, 64, dtype=torch.float32)[:, 1:].flatten(0, 1))  # but BOS
    assert len(sample_tokens(opened, 30, None)) == 30 * 15
    assert len(sample_tokens(opened, 64, 0.0)) == 0
    monkeypatch.setattr(median_module, "SAMPLE_CHUNKS", 3)
    monkeypatch.setattr(median_module, "SAMPLE_TOKENS", 30)
    fewer = sample_tokens(opened, 64, None)
    assert len(fewer) == 30
    for part, chunk in zip(fewer.split(10), (0, 8, 15), strict=True):
        rows = opened.rows(4 * chunk, 4 * chunk + 4, dtype=torch.float32)[:, 1:].flatten(0, 1)
        assert torch.equal(part[0], rows[0])
        assert torch.equal(part[-1], rows[-1])
    assert torch.equal(fewer, sample_tokens(opened, 64, None))


def test_a_run_begins_at_the_median_of_its_scaled_inputs_and_says_so(store, tmp_path):
    config = build_config(
        None, None, {"data.store": str(store), "sae.b_dec": "geometric_median", "sae.k": 4, "sae.width": 16,
        "run.steps": 1,
                     "data.batch_size": 60, "run.out": str(tmp_path), "optimiser.lr": 1e-20, "run.device": "cpu"},
    )  # fmt: skip
    opened = ActivationStore.open(store)
    x_ND = opened.rows(0, 64, dtype=torch.float32)[:, 1:].flatten(0, 1)
    for path in run.train(config).runs:
        assert load_run(path).config["sae"]["b_dec"] == "geometric_median"
        torch.testing.assert_close(TemporalSAE.load(path).b_dec.detach(), geometric_median(x_ND), rtol=1e-4, atol=1e-4)
    inputs = Inputs.of(config.data, opened.statistics()).with_median(opened)
    assert not torch.allclose(inputs.median_D, inputs.mean_D, atol=1e-3)
    assert torch.equal(Inputs.from_state_dict(inputs.state_dict()).median_D, inputs.median_D)
    for kind, centre in (("mean", inputs.mean_D), ("geometric_median", inputs.median_D), ("zero", torch.zeros(8))):
        sae, chosen = TemporalSAE(8, 16), config.sae.model_copy(update={"b_dec": kind})
        sae.initialise(chosen, 0, inputs.centre(chosen))
        assert torch.equal(sae.b_dec.detach(), centre)
