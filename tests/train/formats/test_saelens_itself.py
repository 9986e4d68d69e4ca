"""What SAELens itself makes of our folders; runs where sae-lens is installed (test_formats pins the format
everywhere).
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from saes import KINDS, random_sae
from stores import make_store
from tcsae.train import run
from tcsae.train.formats.export import export
from tcsae.train.presets import build_config
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


def test_a_matryoshka_run_and_its_export_are_its_jumprelu(tmp_path):
    """Nested groups with batchtopk: matryoshka_batchtopk in SAELens' words, jumprelu outside training."""
    small = {"data.store": str(make_store(tmp_path / "cache", rows=64, d_model=8, documents=12)), "sae.width": 32,
             "sae.k": 4, "sae.activation": "batchtopk", "sae.groups": (0.25, 1.0), "data.batch_size": 60,
             "run.steps": 40, "run.out": str(tmp_path / "runs"), "run.device": "cpu", "run.dtype": "float32",
             "temporal.form": "none"}  # fmt: skip
    path = run.train(build_config(None, None, small)).runs[0]
    ours, x = TemporalSAE.load(path), 3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert ours.prefix_sizes == (8, 32)
    for folder in (path, export(path, "saelens", tmp_path / "export")):
        theirs = sae_lens.SAE.load_from_disk(folder)
        assert theirs.cfg.architecture() == "jumprelu"
        assert theirs.cfg.metadata.matryoshka_widths == [8, 32]
        torch.testing.assert_close(theirs.encode(x), ours.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(x), ours(x).reconstruction, rtol=1e-5, atol=1e-5)
    assert (ours.encode(x) > 0).any()


def test_a_matryoshka_that_sae_lens_trained_is_read(tmp_path):
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    config = MatryoshkaBatchTopKTrainingSAEConfig(d_in=6, d_sae=10, k=3, matryoshka_widths=[4, 10])
    trained = MatryoshkaBatchTopKTrainingSAE(config)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        trained.topk_threshold.fill_(0.8)
    trained.save_inference_model(tmp_path / "inference")
    trained.save_model(tmp_path / "training")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    for name in ("inference", "training"):
        ours = TemporalSAE.load(tmp_path / name)
        torch.testing.assert_close(ours(x).reconstruction, theirs(x), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "training" / "cfg.json").read_text())["architecture"] == "matryoshka_batchtopk"
    assert TemporalSAE.load(tmp_path / "training").prefix_sizes == (4, 10)
