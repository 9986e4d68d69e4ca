"""Fine-tuning on a GPU that is not there: every path by its devices, and the CPU's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_cuda import ON_A_GPU_IF_ASKED, fake_cuda
from tcsae.evaluate.finetune.config import FinetuneConfig
from tcsae.evaluate.finetune.run import finetune_run
from tcsae.pipeline import main
from tcsae.train.run_folder.metrics_log import read_metrics

pytestmark = ON_A_GPU_IF_ASKED


def test_a_run_fine_tuned_on_the_gpu(tmp_path: Path, tiny_gemma2: Path, corpus: Path) -> None:
    what = ["--model", str(tiny_gemma2), "--dataset", str(corpus), "--context", "16", "--tokens", "1k"]
    assert main(["extract", "--layers", "1", *what, "--device", "cpu", "--out", str(tmp_path)]) == 0
    small = ["--steps", "10", "--batch-size", "60", "--width", "32", "--k", "4", "--device", "cpu", "--no-baseline"]
    train = ["train", "--store", f"{tmp_path}/l1.zarr", *small, "--activation", "batchtopk"]
    assert main([*train, "--out", str(tmp_path), "--name", "one"]) == 0
    options = {"tokens": 180, "batch_size": 60, "log_every": 1, "dtype": "float32", "lr": 1e-3}

    def tuned(device: str) -> list[dict[str, float]]:
        out = tmp_path / device
        finetune_run(FinetuneConfig(str(tmp_path / "one"), out=str(out), device=device, **options))
        return read_metrics(out)

    expected = tuned("cpu")
    with fake_cuda() as mode:
        found = tuned("cuda")
    assert mode.n_operations > 500
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("loss", "reconstruction", "temporal", "kl", "kl_weight", "l0", "explained_variance"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), name
