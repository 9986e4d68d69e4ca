"""Thresholds that are multiplied by one factor so that L0 is what was asked for."""

import pytest
import torch
from tcsae.train.loop.threshold import _TimesThreshold
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE


def sae_with(threshold: float, b_enc: float = 0.0) -> tuple[TemporalSAE, torch.nn.Parameter]:
    torch.manual_seed(0)
    sae = TemporalSAE(8, 64, Activation("jumprelu"))
    assert isinstance(sae.threshold, torch.nn.Parameter)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(8, 64))
        sae.threshold.fill_(threshold)
        sae.b_enc.fill_(b_enc)
    return sae, sae.threshold


@torch.no_grad()
@pytest.mark.parametrize("l0", [2, 5, 9])
def test_it_gives_the_l0_that_it_says(l0):
    sae, threshold_F = sae_with(3.0)
    x = torch.randn(50, 5, 8)
    times = _TimesThreshold(sae, threshold_F)
    times.add(x[:20])
    times.add(x[20:])
    said = times.scale_to(l0)
    assert said == pytest.approx(l0, rel=0.03)
    assert (sae.encode(x) > 0).sum(-1).double().mean() == pytest.approx(said, rel=1e-3)


@torch.no_grad()
def test_thresholds_of_a_dictionary_that_never_fires_stay():
    sae, threshold_F = sae_with(0.5, b_enc=-1e3)
    times = _TimesThreshold(sae, threshold_F)
    times.add(torch.randn(50, 5, 8))
    assert times.scale_to(5) == 0
    assert threshold_F.tolist() == pytest.approx([0.5] * 64)
