"""Gemma Scope: one ``params.npz`` per SAE, a jumprelu without subtraction of b_dec before the encoder. Read only."""

from __future__ import annotations

from pathlib import Path

from ..sae.activation import Activation
from ..sae.temporal_sae import TemporalSAE
from .from_weights import plain_sae
from .registry import SAEFormat, sae_format
from .tensor_files import read_npz

FILE = "params.npz"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


@sae_format("gemma-scope")
class GemmaScope(SAEFormat):
    """An npz file of the five weights of a jumprelu SAE (arXiv 2408.05147), or the folder it lies in."""

    files = (FILE,)

    def matches(self, path: Path) -> bool:
        """An ``.npz`` file, or a folder with a ``params.npz``."""
        return path.suffix == ".npz" or (path / FILE).exists()

    def read(self, path: Path) -> TemporalSAE:
        """A jumprelu SAE; its place is not in the file but in its path."""
        file = path if path.suffix == ".npz" else path / FILE
        return plain_sae(file, read_npz(file, _NAMES), Activation("jumprelu"), subtract_b_dec=False)
