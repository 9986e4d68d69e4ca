"""Run folders with random SAEs of every architecture, and stores of activations that they can be encoded over."""

from __future__ import annotations

from pathlib import Path

import torch
from stores import make_store
from tcsae.cache.store import ActivationStore
from tcsae.train.config import SAEConfig
from tcsae.train.run_folder.record import RunRecord
from tcsae.train.sae.registry import ACTIVATIONS, ARCHITECTURES

KINDS = [("sae", activation) for activation in ACTIVATIONS] + [
    (name, "topk") for name in ARCHITECTURES if name not in ("sae", "gated")
]
KINDS += [("gated", "relu")] if "gated" in ARCHITECTURES else []
WIDTH = 24


def random_run(folder: Path, store: Path, kind: tuple[str, str] = ("sae", "topk"), *, seed: int = 0, **record) -> Path:
    """A finished run of a random SAE on all rows of a store; ``record`` replaces fields of its record."""
    opened = ActivationStore.open(store)
    architecture, activation = kind
    window = 3 if architecture == "txc" else 0
    config = SAEConfig(architecture=architecture, activation=activation, width=WIDTH, k=3, window=window)
    sae = ARCHITECTURES.get(architecture).build(config, opened.d_model)
    sae.initialise(config, seed)
    with torch.no_grad():
        if sae.running_threshold is not None:
            sae.running_threshold.fill_(0.5)
    sae.eval().save(folder)
    about = {
        "name": folder.name, "role": "tc", "twin": None, "layer": opened.layer, "store": str(store),
        "store_fingerprint": opened.fingerprint(), "store_rows": opened.n_rows,
        "store_manifest": opened.manifest.model_dump(mode="json"),
        "config": {"sae": {"architecture": architecture, "activation": activation, "k": 3}},
        "input_scale": 1.0, "seed": seed, "steps": 10, "planned_steps": 10, "tokens": 1000, "finished": True,
        "metrics": {}, "versions": {}, "created": "2026-01-01",
    }  # fmt: skip
    RunRecord.model_validate(about | record).save(folder)
    return folder


def coded(tmp_path: Path, kind: tuple[str, str] = ("sae", "topk"), *, rows: int = 40, **record) -> tuple[Path, Path]:
    """(run, store), not encoded yet."""
    store = make_store(tmp_path, rows=rows, packing="concat", documents=6)
    return random_run(tmp_path / "run", store, kind, **record), store
