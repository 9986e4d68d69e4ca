"""What SAELens itself makes of our folders; runs where sae-lens is installed (test_formats pins the format
everywhere).
"""

from __future__ import annotations

import warnings

import pytest
import torch
from saes import KINDS, random_sae
from tcsae.train.sae.temporal_sae import TemporalSAE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
def test_sae_lens_computes_the_same(tmp_path, activation):
    random_sae(activation).save(tmp_path)
    ours, theirs = TemporalSAE.load(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs.encode(x), ours.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), ours(x).reconstruction, rtol=1e-5, atol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "demo"


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
def test_what_sae_lens_saves_we_read(tmp_path, activation):
    random_sae(activation).save(tmp_path / "ours")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    theirs.save_model(tmp_path / "theirs")
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(TemporalSAE.load(tmp_path / "theirs").encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
