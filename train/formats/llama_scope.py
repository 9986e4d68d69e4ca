"""Llama Scope (OpenMOSS, arXiv 2410.20526): ``hyperparams.json`` and ``checkpoints/final.safetensors``. Read only.

A jumprelu with one threshold θ, on inputs of norm √D on average. A feature fires where its pre-activation times the
norm of its decoder row exceeds θ (``sparsity_include_decoder_norm``), so that θ over that norm is its own threshold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import RunError
from ...system.untrusted_files import read_json, shown
from ..sae.activation import Activation
from ..sae.temporal_sae import TemporalSAE
from .from_weights import count, place_of, plain_sae, positive, transposed
from .registry import SAEFormat, sae_format
from .tensor_files import read_safetensors

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
_MODELS = {r"Llama3_1-8B-Base-": "meta-llama/Llama-3.1-8B"}  # it is in no file, only in the folders' names


@sae_format("llama-scope")
class LlamaScope(SAEFormat):
    """A folder of the release, such as ``Llama3_1-8B-Base-L15R-8x``."""

    files = (CONFIG, WEIGHTS)

    def matches(self, path: Path) -> bool:
        """A folder with both files."""
        return (path / CONFIG).exists() and (path / WEIGHTS).exists()

    def read(self, path: Path) -> TemporalSAE:
        """A jumprelu SAE, for raw activations; transcoders and gated encoders are refused."""
        file, config = path / CONFIG, read_json(path / CONFIG)
        hook = config.get("hook_point_in")
        if config.get("hook_point_out", hook) != hook:
            raise RunError(f"{shown(path)} writes elsewhere than it reads: it is a transcoder and no SAE")
        if config.get("use_glu_encoder"):
            raise RunError(f"{shown(path)} has a gated encoder (use_glu_encoder), which no SAE here has")
        if (kind := config.get("act_fn")) != "jumprelu":
            raise RunError(f"{shown(path)} is of activation '{shown(str(kind))}'; jumprelu can be read")
        weights = {_NAMES.get(name, name): value for name, value in read_safetensors(path / WEIGHTS).items()}
        weights |= {name: transposed(weights[name]) for name in ("W_enc", "W_dec") if name in weights}
        if not config.get("use_decoder_bias", True):
            weights["b_dec"] = torch.zeros(count(file, config, "d_model"))
        weights["threshold"] = torch.tensor(positive(file, config, "jump_relu_threshold"))
        if config.get("sparsity_include_decoder_norm") and weights.get("W_dec", torch.zeros(0)).ndim == 2:
            weights["threshold"] = weights["threshold"] / weights["W_dec"].float().norm(dim=1).clamp(min=1e-12)
        name = next((model for start, model in _MODELS.items() if re.match(start, path.name)), None)
        metadata = {"hook_name": hook, "model_name": name}
        sae = plain_sae(
            path / WEIGHTS,
            weights,
            Activation("jumprelu"),
            subtract_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder")),
            metadata=place_of(file, {key: value for key, value in metadata.items() if value is not None}),
        )
        return sae.rescaled(_scale(file, config)).eval()


def _scale(file: Path, config: Mapping[str, Any]) -> float:
    """What raw activations are multiplied with."""
    how = config.get("norm_activation")
    if how != "dataset-wise":
        raise RunError(f"{shown(file)} normalises inputs by '{shown(str(how))}'; dataset-wise can be read")
    norms = config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise RunError(f"{shown(file)} lacks 'dataset_average_activation_norm': it does not describe an SAE")
    return math.sqrt(count(file, config, "d_model")) / positive(file, norms, "in")
