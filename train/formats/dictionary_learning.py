"""dictionary_learning folders: ``ae.pt`` (a state dict) and ``config.json``, as its ``load_dictionary`` reads them.

Its relu and topk classes hold the same four weights, two of them transposed, so these come back bit for bit. Its
jumprelu class never subtracts the decoder's bias from the input: that subtraction is folded into the encoder's bias.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import RunError
from ..sae.activation import Activation
from ..sae.temporal_sae import TemporalSAE

WEIGHTS, CONFIG = "ae.pt", "config.json"
_CLASSES = {"relu": "AutoEncoder", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}
_KINDS = {name: kind for kind, name in _CLASSES.items()}
# Their names (and, for the linear layers, transposition) of our four weights.
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}


def save_dictionary_learning(sae: TemporalSAE, folder: Path) -> None:
    """Write ``sae``, in raw units, into ``folder``.

    Raises:
        RunError: the folder cannot be written, or the SAE is one that their classes cannot express.

    """
    kind = sae.activation.kind
    if kind not in _CLASSES:
        raise RunError(f"a {kind} SAE in training has no counterpart in dictionary_learning: export the finished run")
    if kind in ("relu", "topk") and not sae.subtract_b_dec:
        raise RunError(
            f"dictionary_learning's {kind} subtracts the decoder's bias from its input, this one does not: use saelens"
        )
    trainer = {
        "dict_class": _CLASSES[kind],
        "trainer_class": "tcsae",
        "activation_dim": sae.d_model,
        "dict_size": sae.n_features,
        "k": sae.activation.k,
        "layer": sae.metadata.get("layer"),
        "lm_name": sae.metadata.get("model_name"),
        "submodule_name": sae.metadata.get("hook_name"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(_state(sae), folder / f"{WEIGHTS}.partial")
        os.replace(folder / f"{WEIGHTS}.partial", folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"trainer": trainer, "buffer": {}}, indent=2) + "\n")
    except OSError as failure:
        raise RunError(f"the SAE cannot be written to {folder}: {failure.strerror or failure}") from failure


def load_dictionary_learning(folder: str | Path) -> TemporalSAE:
    """Read such a folder (relu, topk or jumprelu), in evaluation mode.

    Raises:
        RunError: nothing there, damaged, or of another class.

    """
    folder = Path(folder)
    try:
        trainer = json.loads((folder / CONFIG).read_text())["trainer"]
        state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as failure:
        raise RunError(f"{folder} holds no dictionary_learning SAE ({WEIGHTS} and {CONFIG}): {failure}") from failure
    name = trainer.get("dict_class")
    if name not in _KINDS:
        raise RunError(f"{folder} holds dictionary_learning's '{name}', this program reads {', '.join(_KINDS)}")
    return _sae(_KINDS[name], trainer, state, folder).eval()


def _state(sae: TemporalSAE) -> dict[str, Tensor]:
    weights = {name: value.detach().float().cpu().contiguous() for name, value in sae.state_dict().items()}
    if sae.activation.kind == "jumprelu":
        if sae.subtract_b_dec:
            weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
        return weights
    state = {name: _flipped(weights[ours]).contiguous() for name, ours in _LINEAR.items()}
    if sae.activation.kind == "relu":
        return state | {"bias": weights["b_dec"]}
    return state | {
        "b_dec": weights["b_dec"],
        "k": torch.tensor(sae.activation.k, dtype=torch.int),
        "threshold": torch.tensor(-1.0),
    }


def _flipped(weight: Tensor) -> Tensor:
    return weight.T if weight.ndim == 2 else weight


def _sae(kind: str, trainer: dict[str, Any], state: dict[str, Tensor], folder: Path) -> TemporalSAE:
    if kind == "jumprelu":
        weights = state
    else:
        weights = {ours: _flipped(state[name]) for name, ours in _LINEAR.items() if name in state}
        weights["b_dec"] = state["bias" if kind == "relu" else "b_dec"]
    metadata = {
        "model_name": trainer.get("lm_name"),
        "hook_name": trainer.get("submodule_name"),
        "layer": trainer.get("layer"),
    }
    try:
        d_model, n_features = weights["W_enc"].shape
        k = int(state["k"]) if kind == "topk" else None
        sae = TemporalSAE(
            d_model,
            n_features,
            Activation(kind, k=k),  # pyright: ignore[reportArgumentType] - one of _KINDS
            subtract_b_dec=kind != "jumprelu",
            metadata=metadata,
        )
        sae.load_state_dict(weights)
    except (KeyError, RuntimeError, ValueError) as failure:
        raise RunError(f"{folder / WEIGHTS} does not hold the weights of a {kind} SAE: {failure}") from failure
    return sae
