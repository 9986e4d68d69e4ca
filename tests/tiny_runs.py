"""Finished run folders without training: random SAEs with records that point at a tiny model and text."""

import json
from pathlib import Path

import torch
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.format.manifest import Execution, StoreManifest
from tcsae.extract.config import ModelSource, TextSource
from tcsae.extract.model.load import identify_model, outline_model
from tcsae.extract.text.open import resolve_text
from tcsae.train.run_folder.record import RunRecord
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.protocol import SparseAutoencoder
from tcsae.train.sae.temporal_sae import TemporalSAE

CONTEXT = 16


def make_manifest(
    model: Path, text: Path, layer: int, *, held_out: float = 0.5, context: int = CONTEXT, chat_template: bool = False
) -> StoreManifest:
    outline = outline_model(ModelSource(id=str(model), device="cpu", dtype="float32"))
    source = TextSource(dataset=str(text), context=context, held_out=held_out, chat_template=chat_template)
    return StoreManifest(
        layer=layer,
        d_model=outline.d_model,
        model=identify_model(outline),
        text=resolve_text(source, outline),
        execution=Execution(batch_size=4, threads=1, device="cpu"),
        layout=StoreLayout(d_model=outline.d_model, context=context, chunk_rows=4, shard_rows=8),
        planned_rows=8,
        finished=True,
    )


def random_sae(d_model: int, n_features: int, activation: Activation, seed: int = 0) -> TemporalSAE:
    """Tied random weights: not trained, but its features fire sparsely and its reconstruction points the right way."""
    generator = torch.Generator().manual_seed(seed)
    sae = TemporalSAE(d_model, n_features, activation)
    rows = torch.nn.functional.normalize(torch.randn(n_features, d_model, generator=generator), dim=-1)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
    return sae.eval()


def make_run(
    runs: Path,
    name: str,
    manifest: StoreManifest,
    *,
    sae: SparseAutoencoder | None = None,
    sae_config: dict | None = None,
    role="tc",
    twin=None,
    seed=0,
    finished=True,
) -> Path:
    sae = sae or random_sae(manifest.d_model, 32, Activation("topk", k=6), seed)
    folder = runs / name
    sae_config = sae_config or {"activation": sae.activation.kind, "k": sae.activation.k or 1}
    sae.save(folder)
    RunRecord(
        name=name, role=role, twin=twin, layer=manifest.layer, store="cache/gone.zarr", store_fingerprint="f",
        store_rows=8,
        store_manifest=manifest.model_dump(mode="json"), config={"sae": sae_config},
        input_scale=1.0,
        seed=seed, steps=10, planned_steps=10, tokens=1000, finished=finished, metrics={}, versions={},
        created="2026-01-01",
    ).save(folder)  # fmt: skip
    logged = {"loss": 2.0, "reconstruction": 1.5, "temporal": 5.0, "temporal_share": 0.25, "reconstruction_share": 0.75}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, **logged}) + "\n" for step in (1, 2)))
    return folder
