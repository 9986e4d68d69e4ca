"""Temporal Feature Analysis as its authors publish it: ``conf.yaml`` and ``latest_ckpt.pt`` or ``.safetensors``.
Read only.

The configuration's ``sae.scaling_factor``, by which inputs were multiplied, is folded into the weights. A ``.pt`` that
holds anything beside tensors and plain values is refused, never unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ...errors import RunError
from ...system.untrusted_files import read_bytes, shown
from ..sae.tfa import TemporalFeatureAnalysis
from .from_weights import count, filled, positive
from .registry import SAEFormat, sae_format
from .tensor_files import read_safetensors, read_torch

CONFIG, TORCH, SAFE = "conf.yaml", "latest_ckpt.pt", "latest_ckpt.safetensors"
_MOST_CONFIG = 1 << 16
_LAYERS = {"k_ctx": "keys", "q_target": "queries", "v_ctx": "values", "c_proj": "output"}


@sae_format("temporal-feature-analysis")
class PublishedTFA(SAEFormat):
    """The folder of the two files."""

    files = (CONFIG, TORCH)

    def matches(self, path: Path) -> bool:
        """A folder with a ``conf.yaml`` and a checkpoint beside it."""
        return (path / CONFIG).exists() and ((path / TORCH).exists() or (path / SAFE).exists())

    def read(self, path: Path) -> TemporalFeatureAnalysis:
        """One attention layer, novel part by topk or relu; where it belongs is not in its files."""
        config = _config(path / CONFIG)
        llm, sae = (_table(path / CONFIG, config, name) for name in ("llm", "sae"))
        d_model = count(path / CONFIG, llm, "dimin")
        kind, layers = sae.get("sae_diff_type"), sae.get("n_attn_layers", 1)
        if kind not in ("topk", "relu") or layers != 1:
            what = f"a novel part by '{shown(str(kind))}' and {shown(str(layers))} attention layers"
            raise RunError(f"{shown(path)} has {what}; topk or relu and one layer can be read")
        file = path / SAFE if (path / SAFE).exists() else path / TORCH
        weights = read_safetensors(file) if file.name == SAFE else read_torch(file, inside="sae")
        build = partial(
            TemporalFeatureAnalysis,
            d_model,
            round(d_model * positive(path / CONFIG, sae, "exp_factor")),
            k=count(path / CONFIG, sae, "kval_topk") if kind == "topk" else None,
            heads=count(path / CONFIG, sae, "n_heads"),
            bottleneck=count(path / CONFIG, sae, "bottleneck_factor"),
            tied=bool(sae.get("tied_weights", True)),
        )
        named = {_named(name): value for name, value in weights.items()}
        if "b_dec" in named:
            named["b_dec"] = named["b_dec"].flatten()
        return filled(file, build, named).rescaled(positive(path / CONFIG, sae, "scaling_factor")).eval()


def _named(theirs: str) -> str:
    """``attn_layers.0.k_ctx.weight`` as ``keys.weight``."""
    parts = theirs.split(".")
    if parts[:2] == ["attn_layers", "0"] and len(parts) == 4:
        return f"{_LAYERS.get(parts[2], parts[2])}.{parts[3]}"
    return {"D": "W_dec", "E": "encoder", "b": "b_dec"}.get(theirs, theirs)


def _config(file: Path) -> dict[str, Any]:
    raw = read_bytes(file, most=_MOST_CONFIG, missing=f"{shown(file)} is missing: the SAE is incomplete")
    try:
        found = yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as failure:
        raise RunError(f"{shown(file)} is no YAML: {shown(str(failure).splitlines()[0])}") from failure
    if not isinstance(found, dict):
        raise RunError(f"{shown(file)} holds no settings: it does not describe an SAE")
    return found


def _table(file: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    if not isinstance(found, dict):
        raise RunError(f"{shown(file)} has no '{name}': it does not describe an SAE")
    return found
