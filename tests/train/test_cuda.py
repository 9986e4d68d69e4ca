"""Training on a GPU that is not there: every path by its devices, and its numbers against the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import ON_A_GPU_IF_ASKED, fake_cuda
from safetensors.torch import load_file
from stores import make_store
from tcsae.train import run
from tcsae.train.loop import trainer
from tcsae.train.loss.registry import PARTNERS, TERMS
from tcsae.train.presets import PRESETS, build_config
from tcsae.train.run_folder.metrics_log import read_metrics
from tcsae.train.run_folder.record import load_run
from tcsae.train.sae.registry import ACTIVATIONS
from tcsae.train.step import active_entries

pytestmark = ON_A_GPU_IF_ASKED

WEIGHTS = "sae_weights.safetensors"
BASE = {
    "data.batch_size": 60, "data.pool": 256, "sae.k": 3, "sae.width": 24, "run.steps": 2, "run.log_every": 2,
    "run.baseline": False, "run.dtype": "float32", "run.checkpoint_minutes": 0, }  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("cache"), rows=64, context=16, d_model=8, documents=12)


def trained(
    store: Path, out: Path, device: str, changes: dict[str, Any], grid: dict[str, tuple[str, ...]]
) -> list[Path]:
    asked = BASE | changes | {"data.store": str(store), "run.out": str(out), "run.device": device}
    return run.train(build_config(asked.pop("preset", None), None, asked), sweep=grid).runs


def check_as_on_cpu(store: Path, folder: Path, changes: dict[str, Any], grid: Any = None) -> None:
    """The GPU's runs are the CPU's up to rounding: weights, and what was logged."""
    on_cpu = trained(store, folder / "cpu", "cpu", changes, grid or {})
    with fake_cuda() as mode:
        on_gpu = trained(store, folder / "gpu", "cuda", changes, grid or {})
    assert mode.n_operations > 100
    for mine, theirs in zip(on_gpu, on_cpu, strict=True):
        assert mine.name == theirs.name
        assert load_run(mine).finished
        found, expected = (load_file(each / WEIGHTS) for each in (mine, theirs))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=f"{name} of {mine.name}")
        logged = [(a["loss"], b["loss"]) for a, b in zip(read_metrics(mine), read_metrics(theirs), strict=True)]
        for a, b in logged:
            assert a == pytest.approx(b, rel=1e-3)


@pytest.fixture(params=["matrices", "entries"])
def kind_of_codes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "entries":
        monkeypatch.setattr(active_entries, "_TOO_SMALL", 0)
        monkeypatch.setattr(active_entries, "DENSE_ABOVE", {"cpu": 1.0, "cuda": 1.0})


ALL_TERMS, TWO_SEEDS = {"temporal.form": tuple(TERMS)}, {"run.seed": ("0", "1")}


@pytest.mark.parametrize("step", ["autograd", "fast"])
def test_every_term(store: Path, tmp_path: Path, step: str) -> None:
    check_as_on_cpu(store, tmp_path, {"run.step": step}, ALL_TERMS)


@pytest.mark.parametrize("step", ["autograd", "auto"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(store: Path, tmp_path: Path, preset: str, step: str) -> None:
    check_as_on_cpu(store, tmp_path, {"preset": preset, "run.step": step, "sae.threshold_rule": "calibrated"})


def test_gated(store: Path, tmp_path: Path) -> None:
    check_as_on_cpu(store, tmp_path, {"sae.architecture": "gated", "sae.activation": "relu"})


@pytest.mark.usefixtures("kind_of_codes")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_by_hand_in_stacks(store: Path, tmp_path: Path, activation: str) -> None:
    changes = {"sae.activation": activation, "run.step": "fast", "loss.l1": 0.1, "loss.l1_warmup": 0.0}
    check_as_on_cpu(store, tmp_path, changes, {"temporal.form": ("pairwise", "cosine"), **TWO_SEEDS})


def test_every_partner(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_entries, "_TOO_SMALL", 0)
    check_as_on_cpu(store, tmp_path, {}, {"temporal.partner": tuple(PARTNERS)})


def test_a_resumed_run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of tensors on the GPU, and back."""
    with fake_cuda():
        (whole,) = trained(store, tmp_path / "whole", "cuda", {"run.steps": 3}, {})
        real = trainer.Pass._train_batch

        def stopped(self: trainer.Pass, *rest: Any) -> None:
            if self.step == 2:
                raise KeyboardInterrupt
            real(self, *rest)

        monkeypatch.setattr(trainer.Pass, "_train_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            trained(store, tmp_path / "two", "cuda", {"run.steps": 3, "run.checkpoint_every": 1}, {})
        monkeypatch.setattr(trainer.Pass, "_train_batch", real)
        (resumed,) = trained(store, tmp_path / "two", "cuda", {"run.steps": 3, "run.checkpoint_every": 1}, {})
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.mark.parametrize("changes", [
    {"sae.groups": "0.2,0.5,1"},
    {"temporal.scope": 0.4},
    {"temporal.per_feature": "density"},
    {"temporal.per_feature": "autocorrelation"},
    {"sae.activation": "relu", "loss.target_l0": 4.0, "loss.l1_warmup": 0.0},
    {"loss.dead_after": 1},
    {"sae.activation": "relu", "sae.decoder": "free", "temporal.weight": 0.0},
    {"data.view": "pairs", "data.pair_loss": "current", "temporal.partner": "earlier"},
    {"sae.b_dec": "geometric_median", "data.scale": "rms"},
], ids=lambda changes: "-".join(map(str, changes)))  # fmt: skip
def test_options(store: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_entries, "_TOO_SMALL", 0)
    monkeypatch.setattr(active_entries, "DENSE_ABOVE", {"cpu": 1.0, "cuda": 1.0})
    check_as_on_cpu(store, tmp_path, changes, TWO_SEEDS)
