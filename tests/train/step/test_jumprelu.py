"""JumpReLU's thresholds learn at a rate of their own, since they are √D times the size of a weight."""

from __future__ import annotations

import math

import pytest
import torch
from stores import make_store
from tcsae.train import run
from tcsae.train.presets import build_config
from tcsae.train.sae.temporal_sae import TemporalSAE

LR = 1e-3


@pytest.mark.parametrize("optimiser", ["adamw", "adam"])
@pytest.mark.parametrize(("rate", "times"), [(0.0, math.sqrt(8)), (1.0, 1.0)])
def test_a_first_step_moves_thresholds_by_their_own_rate(tmp_path, optimiser, rate, times):
    store = make_store(tmp_path, rows=16, context=16, d_model=8)
    config = build_config(None, None, {
        "data.store": str(store), "data.scale": "none", "data.batch_size": 60, "sae.activation": "jumprelu",
        "sae.width": 32,
        "sae.threshold": 0.5, "sae.bandwidth": 2.0, "sae.b_dec": "zero", "loss.l1_warmup": 0.0,
        "optimiser.name": optimiser,
        "optimiser.lr": LR, "optimiser.warmup": 0, "optimiser.decay_share": 0.0, "optimiser.threshold_rate": rate,
        "run.steps": 1, "run.baseline": False, "run.out": str(tmp_path / "runs"), "run.device": "cpu",
        "run.dtype": "float32",
    })  # fmt: skip
    sae = TemporalSAE.load(run.train(config).runs[0])
    # Adam's first step is the rate itself, with the sign of the gradient.
    assert (sae.threshold - 0.5).abs().max().item() == pytest.approx(LR * times, rel=1e-3)
    assert sae.b_dec.abs().max().item() == pytest.approx(LR, rel=1e-3)
    assert torch.isfinite(sae.W_enc).all()


def test_even_a_short_run_ends_at_an_l0_that_lambda_decides(tmp_path):
    store = make_store(tmp_path, rows=128, context=32, d_model=64, documents=24)
    base = {
        "data.store": str(store), "data.batch_size": 512, "sae.activation": "jumprelu", "sae.width": 128,
        "run.steps": 100,
        "run.log_every": 100, "optimiser.lr": 1e-3, "run.baseline": False, "run.out": str(tmp_path / "runs"),
        "run.device": "cpu", "run.dtype": "float32",
    }  # fmt: skip
    done = run.train(build_config(None, None, base), sweep={"loss.l1": ("0.05", "3")})
    weak, strong = (done.metrics[path.name]["l0"] for path in done.runs)
    assert weak is not None
    assert strong is not None
    assert weak > 3 * strong
