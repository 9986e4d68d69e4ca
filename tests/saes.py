"""Small random autoencoders of every activation, for the tests of training and of evaluation."""

from __future__ import annotations

import torch
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE

KINDS = [Activation("relu"), Activation("topk", k=3), Activation("batchtopk", k=3), Activation("jumprelu")]


def random_sae(activation=KINDS[0], *, d=6, f=10, seed=0) -> TemporalSAE:
    torch.manual_seed(seed)
    sae = TemporalSAE(
        d, f, activation, metadata={"model_name": "demo", "hook_name": "blocks.3.hook_resid_post", "layer": 3}
    )
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    if sae.threshold is not None:
        sae.threshold.data = sae.threshold.data.abs() + 0.1
    return sae
