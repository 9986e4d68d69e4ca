"""Extraction on a GPU that is not there: every path by its devices, and the same stores as on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from fake_cuda import ON_A_GPU_IF_ASKED, fake_cuda
from stores import bits_of
from tcsae.cache.store import ActivationStore
from tcsae.extract.run import extract

pytestmark = ON_A_GPU_IF_ASKED


def test_a_store_from_the_gpu(config: Any, small_shards: None) -> None:
    config = replace(config, tokens=320)
    extract(replace(config, out=f"{config.out}-cpu"))
    with fake_cuda() as mode:
        extract(replace(config, model=replace(config.model, device="cuda"), batch_size=None))
    assert mode.n_operations > 50
    for layer in (1, 2):
        mine, theirs = (ActivationStore.open(f"{config.out}{end}/l{layer}.zarr") for end in ("", "-cpu"))
        assert mine.manifest.execution.device == "cuda"
        np.testing.assert_array_equal(mine.tokens(0, mine.n_rows), theirs.tokens(0, theirs.n_rows))
        found, expected = (torch.from_numpy(bits_of(each)).view(torch.bfloat16) for each in (mine, theirs))
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
