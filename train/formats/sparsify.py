"""sparsify (EleutherAI): ``cfg.json`` and ``sae.safetensors``, a topk SAE. Read only."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import RunError
from ...system.untrusted_files import read_json, shown
from ..sae.activation import Activation
from ..sae.temporal_sae import TemporalSAE
from .from_weights import count, plain_sae, transposed
from .registry import SAEFormat, sae_format
from .tensor_files import read_safetensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_REFUSED = {"transcode": "is a transcoder", "skip_connection": "has a skip connection", "signed": "has signed codes"}


@sae_format("sparsify")
class Sparsify(SAEFormat):
    """A folder as ``SparseCoder.load_from_disk`` of sparsify opens it."""

    files = (CONFIG, WEIGHTS)

    def matches(self, path: Path) -> bool:
        """A folder with an ``sae.safetensors`` beside a ``cfg.json``."""
        return (path / CONFIG).exists() and (path / WEIGHTS).exists()

    def read(self, path: Path) -> TemporalSAE:
        """A topk SAE; its place is the folder's name, ``layers.23`` or ``layers.23.mlp``."""
        config, weights = read_json(path / CONFIG), read_safetensors(path / WEIGHTS)
        for option, what in _REFUSED.items():
            if config.get(option):
                raise RunError(f"{shown(path)} {what} ({option}), which no SAE here has")
        if (kind := config.get("activation", "topk")) != "topk":
            raise RunError(f"{shown(path)} is of activation '{shown(str(kind))}'; topk can be read")
        if "encoder.weight" in weights:
            weights |= {"W_enc": transposed(weights.pop("encoder.weight"))}
        if "encoder.bias" in weights:
            weights |= {"b_enc": weights.pop("encoder.bias")}
        named = re.fullmatch(r"[a-z]+\.\d+(?:\.\w+)*", path.name)  # the module whose output it reads: layers.23.mlp
        metadata = {"hook_name": path.name} if named else {}
        k = count(path / CONFIG, config, "k")
        return plain_sae(path / WEIGHTS, weights, Activation("topk", k=k), metadata=metadata)
