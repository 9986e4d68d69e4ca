"""Gemma Scope: one file per SAE, ``params.npz`` or, of its second edition, ``params.safetensors`` with ``config.json``.

A jumprelu without subtraction of b_dec before the encoder. Read only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import RunError
from ...system.untrusted_files import read_json, shown
from ..sae.activation import Activation
from ..sae.temporal_sae import TemporalSAE
from .from_weights import place_of, plain_sae
from .registry import SAEFormat, sae_format
from .tensor_files import read_npz, read_safetensors

FILE, SAFE, CONFIG = "params.npz", "params.safetensors", "config.json"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_PLACE = ("model_name", "hf_hook_point_in", "layer")


@sae_format("gemma-scope")
class GemmaScope(SAEFormat):
    """A file of the five weights of a jumprelu SAE (arXiv 2408.05147), or the folder it lies in."""

    files = (FILE, SAFE)

    def matches(self, path: Path) -> bool:
        """An ``.npz`` file, a ``params.safetensors``, or a folder with one of the two."""
        return path.suffix == ".npz" or path.name == SAFE or any((path / name).exists() for name in (FILE, SAFE))

    def read(self, path: Path) -> TemporalSAE:
        """A jumprelu SAE; its place is in its path, of the second edition also in its ``config.json``."""
        file = path if path.is_file() else path / (FILE if (path / FILE).exists() else SAFE)
        if file.name != SAFE:
            return plain_sae(file, read_npz(file, _NAMES), Activation("jumprelu"), subtract_b_dec=False)
        ours = {name.lower(): name for name in _NAMES}
        weights = {ours.get(name, name): value for name, value in read_safetensors(file).items()}
        if any("affine" in name for name in weights):
            raise RunError(f"{shown(file)} has an affine connection beside its codes: it is a transcoder and no SAE")
        metadata = _place(file.with_name(CONFIG))
        return plain_sae(file, weights, Activation("jumprelu"), subtract_b_dec=False, metadata=metadata)


def _place(config: Path) -> dict[str, Any]:
    if not config.exists():
        return {}
    said = read_json(config)
    if said.get("affine_connection"):
        raise RunError(f"{shown(config)} says it has an affine connection: it is a transcoder and no SAE")
    return place_of(config, {name: said[name] for name in _PLACE if said.get(name) is not None})
