"""Reading SAEs that other programs wrote: SAELens folders, Gemma Scope npz files, dictionary_learning checkpoints.

Nothing is unpickled: safetensors, npz without pickles, torch with ``weights_only``. Everything becomes a
:class:`~tcsae.train.sae.temporal_sae.TemporalSAE` where one of its activations fits, and a :class:`GatedSAE` otherwise.

Shapes: D model width, F features; any leading dimensions.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import RunError
from ..sae.activation import Activation
from ..sae.temporal_sae import TemporalSAE

SAELENS_CONFIG, SAELENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"
GEMMA_SCOPE, CHECKPOINT = "params.npz", "ae.pt"


class GatedSAE(nn.Module):
    """z = [x' W_enc + b_gate > 0] · relu(x' W_enc · exp(r_mag) + b_mag) with x' = x − b_dec (arXiv
    2404.16014, eq 5–8).
    """

    def __init__(
        self, weights: Mapping[str, Tensor], *, subtract_b_dec: bool = True, metadata: dict[str, Any] | None = None
    ):
        super().__init__()
        self.W_enc, self.W_dec = nn.Parameter(weights["W_enc"]), nn.Parameter(weights["W_dec"])
        self.b_dec, self.r_mag = nn.Parameter(weights["b_dec"]), nn.Parameter(weights["r_mag"])
        self.b_gate, self.b_mag = nn.Parameter(weights["b_gate"]), nn.Parameter(weights["b_mag"])
        self.d_model, self.n_features = self.W_enc.shape
        self.subtract_b_dec, self.metadata = subtract_b_dec, dict(metadata or {})

    def encode(self, x: Tensor) -> Tensor:
        """Activations [.., D] → codes [.., F]."""
        shared = ((x - self.b_dec) if self.subtract_b_dec else x) @ self.W_enc
        return (shared + self.b_gate > 0) * torch.relu(shared * self.r_mag.exp() + self.b_mag)

    def decode(self, z: Tensor) -> Tensor:
        """Codes [.., F] → reconstruction [.., D]."""
        return z @ self.W_dec + self.b_dec


AnySAE = TemporalSAE | GatedSAE


def read_saelens(folder: Path) -> AnySAE:
    """A SAELens folder: standard, topk (with or without decoder-norm rescaling), batchtopk, jumprelu, gated,
    matryoshka.

    Raises:
        RunError: damaged, incomplete, or of a kind that has no meaning here.

    """
    config = _json(folder / SAELENS_CONFIG)
    weights = _guarded(folder / SAELENS_WEIGHTS, lambda file: load_file(file))
    if config.get("normalize_activations", "none") not in ("none", None):
        how = config["normalize_activations"]
        raise RunError(
            f"{folder} normalises its inputs by '{how}' at run time: fold that into the weights with SAELens first"
        )
    metadata = dict(config.get("metadata") or {})
    metadata |= {key: config[key] for key in ("hook_name", "model_name") if config.get(key) and key not in metadata}
    common: dict[str, Any] = {"subtract_b_dec": bool(config.get("apply_b_dec_to_input", True)), "metadata": metadata}
    architecture = config.get("architecture", "standard")
    if architecture == "gated":
        return _gated(folder, weights, **common)
    if architecture == "standard":
        return _plain(folder, weights, Activation("relu"), **common)
    if architecture == "topk":
        if config.get("rescale_acts_by_decoder_norm"):
            weights = _unit_decoder(weights)
        return _plain(folder, weights, Activation("topk", k=int(config["k"])), **common)
    if architecture in ("jumprelu", "batchtopk", "matryoshka_batchtopk"):
        if "threshold" not in weights and "topk_threshold" in weights:
            weights = weights | {"threshold": weights["topk_threshold"]}
        if config.get("rescale_acts_by_decoder_norm"):
            weights = _unit_decoder(weights)
        return _plain(folder, weights, Activation("jumprelu"), **common)
    known = "standard, topk, batchtopk, matryoshka_batchtopk, jumprelu and gated"
    raise RunError(f"{folder} is a SAELens SAE of architecture '{architecture}'; {known} can be evaluated")


def read_gemma_scope(file: Path) -> AnySAE:
    """A Gemma Scope ``params.npz``: jumprelu without subtraction of b_dec before the encoder.

    Raises:
        RunError: damaged, or not of that kind.

    """

    def read(path: Path) -> dict[str, Tensor]:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files}

    return _plain(file, _guarded(file, read), Activation("jumprelu"), subtract_b_dec=False)


def read_checkpoint(file: Path) -> AnySAE:
    """A dictionary_learning ``ae.pt`` with its ``config.json`` beside it.

    Raises:
        RunError: damaged, or its class is ambiguous or unknown.

    """
    weights: dict[str, Any] = _guarded(file, lambda path: torch.load(path, map_location="cpu", weights_only=True))
    beside = file.with_name("config.json")
    trainer: dict[str, Any] = _json(beside).get("trainer", {}) if beside.exists() else {}
    metadata = {"model_name": trainer.get("lm_name"), "hook_name": trainer.get("submodule_name")}
    if trainer.get("layer") is not None:
        metadata["layer"] = trainer["layer"]
    kind = trainer.get("dict_class") or _kind_of(file, weights)
    named = _own_names(weights)
    if kind == "AutoEncoder":
        return _plain(file, named, Activation("relu"), metadata=metadata)
    if kind == "AutoEncoderTopK":
        return _plain(file, named, Activation("topk", k=int(weights["k"])), metadata=metadata)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        return _plain(file, named, Activation("jumprelu"), metadata=metadata)
    if kind == "JumpReluAutoEncoder":
        return _plain(file, named, Activation("jumprelu"), subtract_b_dec=False, metadata=metadata)
    if kind == "GatedAutoEncoder":
        return _gated(file, named, metadata=metadata)
    raise RunError(
        f"{file} is a dictionary of class {kind}: AutoEncoder, TopK, BatchTopK, Matryoshka, JumpRelu, "
        "Gated can be evaluated"
    )


def _kind_of(file: Path, weights: Mapping[str, Any]) -> str:
    if "r_mag" in weights:
        return "GatedAutoEncoder"
    if "W_enc" in weights:
        return "MatryoshkaBatchTopKSAE" if "k" in weights else "JumpReluAutoEncoder"
    if "k" not in weights:
        return "AutoEncoder"
    raise RunError(f"{file} may be TopK or BatchTopK: put the config.json that was saved with it beside it")


def _own_names(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """dictionary_learning's names and layouts as ours."""
    named = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    for theirs, ours in (("encoder.weight", "W_enc"), ("decoder.weight", "W_dec")):
        if theirs in named:
            named[ours] = named.pop(theirs).T
    for theirs, ours in (
        ("encoder.bias", "b_enc"), ("bias", "b_dec"), ("decoder_bias", "b_dec"), ("gate_bias", "b_gate"),
        ("mag_bias", "b_mag")
    ):  # fmt: skip
        if theirs in named:
            named[ours] = named.pop(theirs)
    return named


def _plain(source: Path, weights: Mapping[str, Tensor], activation: Activation, **common: Any) -> TemporalSAE:
    D, F = _shape(source, weights)
    sae = TemporalSAE(D, F, activation, **common)
    wanted = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    if activation.kind == "jumprelu":
        wanted["threshold"] = (F,)
    sae.load_state_dict(_checked(source, weights, wanted))
    return sae.eval()


def _gated(source: Path, weights: Mapping[str, Tensor], **common: Any) -> GatedSAE:
    D, F = _shape(source, weights)
    wanted = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), "r_mag": (F,), "b_gate": (F,), "b_mag": (F,)}
    return GatedSAE(_checked(source, weights, wanted), **common).eval()


def _shape(source: Path, weights: Mapping[str, Tensor]) -> tuple[int, int]:
    if "W_enc" not in weights or weights["W_enc"].ndim != 2:
        raise RunError(f"{source} has no encoder matrix: it is not an SAE of a kind known here")
    return weights["W_enc"].shape[0], weights["W_enc"].shape[1]


def _checked(source: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    found = {}
    for name, shape in wanted.items():
        if name not in weights:
            raise RunError(f"{source} has no '{name}': the SAE is incomplete or of another kind than it says")
        value = weights[name].float()
        if name == "threshold" and value.ndim == 0:
            value = value.expand(shape)
        if tuple(value.shape) != shape:
            raise RunError(f"{source}: '{name}' has shape {list(value.shape)}, the other weights need {list(shape)}")
        if not torch.isfinite(value).all():
            raise RunError(f"{source}: '{name}' holds NaN or infinity; the file is damaged or its training diverged")
        found[name] = value.contiguous().clone()
    return found


def _unit_decoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same SAE with decoder rows of norm 1: what SAELens' decoder-norm rescaling does at run time."""
    norms_F = weights["W_dec"].float().norm(dim=1)
    return dict(weights) | {
        "W_enc": weights["W_enc"].float() * norms_F,
        "b_enc": weights["b_enc"].float() * norms_F,
        "W_dec": weights["W_dec"].float() / norms_F[:, None],
    }


def _json(path: Path) -> dict[str, Any]:
    found = _guarded(path, lambda file: json.loads(file.read_text()))
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no JSON object: it does not describe an SAE")
    return found


def _guarded(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the SAE is incomplete") from None
    except pickle.UnpicklingError as failure:
        raise RunError(
            f"{path} holds more than weights and is not loaded, for safety ({str(failure).splitlines()[0]})"
        ) from None
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, SafetensorError) as failure:
        raise RunError(f"{path} cannot be read as an SAE: {str(failure).splitlines()[0]}") from None
