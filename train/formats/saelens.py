"""SAELens folders: ``cfg.json`` and ``sae_weights.safetensors``, the format most tools read.

SAELens stores the four weights under the names and layouts used here, so saving copies them bit for bit. A batchtopk
SAE is saved as what it is outside training, a jumprelu with one threshold. Keys as of sae-lens 6; later ones are
additions.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ... import __version__
from ...errors import RunError
from ..sae.activation import Activation
from ..sae.temporal_sae import TemporalSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
# SAELens drops the model's name, the hook and the context size of anything that claims to be older than 6.
_SAE_LENS_FORMAT = "6.0.0"


def saelens_config(sae: TemporalSAE) -> dict[str, Any]:
    """The contents of ``cfg.json`` for ``sae``."""
    config: dict[str, Any] = {
        "architecture": _ARCHITECTURES[sae.activation.kind],
        "d_in": sae.d_model,
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**_DEFAULT_METADATA, "tcsae_version": __version__, **sae.metadata},
    }
    if sae.activation.kind == "topk":
        config |= {"k": sae.activation.k, "rescale_acts_by_decoder_norm": False}
    return config


_DEFAULT_METADATA: dict[str, Any] = {
    "sae_lens_version": _SAE_LENS_FORMAT,
    "sae_lens_training_version": None,
    "model_name": None,
    "model_class_name": "AutoModelForCausalLM",
    "hook_name": None,
    "hook_head_index": None,
    "context_size": None,
    "prepend_bos": True,
    "dataset_path": None,
    "exclude_special_tokens": True,
    "seqpos_slice": [None],
    "model_from_pretrained_kwargs": {},
    "neuronpedia_id": None,
}


def save_saelens(sae: TemporalSAE, folder: Path) -> None:
    """Write ``sae``, whose weights must already be in the units of raw activations, into ``folder``.

    Raises:
        RunError: the folder cannot be written, or a batchtopk threshold was never measured.

    """
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in sae.state_dict().items()}
    if sae.activation.kind == "batchtopk":
        if tensors["threshold"] < 0:
            raise RunError("this batchtopk SAE has no threshold yet: train it for at least one step before saving it")
        tensors["threshold"] = tensors["threshold"].expand(sae.n_features).clone()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Weights first and each by rename: a folder with a cfg.json is complete.
        save_file(tensors, folder / f"{WEIGHTS}.partial")
        os.replace(folder / f"{WEIGHTS}.partial", folder / WEIGHTS)
        (folder / f"{CONFIG}.partial").write_text(json.dumps(saelens_config(sae), indent=2) + "\n")
        os.replace(folder / f"{CONFIG}.partial", folder / CONFIG)
    except OSError as failure:
        raise RunError(f"the SAE cannot be written to {folder}: {failure.strerror or failure}") from failure


def load_saelens(folder: Path) -> TemporalSAE:
    """Read a SAELens folder of the architectures standard, topk or jumprelu.

    Raises:
        RunError: nothing there, damaged, or of a kind this program does not know.

    """
    config = _read_config(folder)
    tensors = _read_weights(folder)
    try:
        d_model, n_features = int(config["d_in"]), int(config["d_sae"])
        activation = _activation(config, folder)
    except (KeyError, TypeError, ValueError) as failure:
        raise RunError(f"{folder / CONFIG} lacks or garbles {failure}: it does not describe an SAE") from failure
    if config.get("normalize_activations", "none") != "none":
        how = config["normalize_activations"]
        raise RunError(
            f"{folder} expects inputs normalised by '{how}': fold that into its weights with SAELens and save it again"
        )
    sae = TemporalSAE(
        d_model,
        n_features,
        activation,
        subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        metadata=config.get("metadata") or {},
    )
    _fill(sae, tensors, folder)
    return sae.eval()


def _activation(config: dict[str, Any], folder: Path) -> Activation:
    architecture = config["architecture"]
    if architecture == "standard":
        return Activation("relu")
    if architecture == "jumprelu":
        return Activation("jumprelu")
    if architecture == "topk" and not config.get("rescale_acts_by_decoder_norm"):
        return Activation("topk", k=int(config["k"]))
    detail = "topk with rescaled activations" if architecture == "topk" else f"architecture '{architecture}'"
    raise RunError(
        f"{folder} holds {detail}, this program reads standard, topk and jumprelu: convert it with SAELens first"
    )


def _fill(sae: TemporalSAE, tensors: dict[str, Tensor], folder: Path) -> None:
    for name, mine in sae.state_dict().items():
        if name not in tensors:
            kind = sae.activation.kind
            raise RunError(f"{folder / WEIGHTS} has no '{name}', which a {kind} SAE needs: the folder is incomplete")
        theirs = tensors[name]
        if theirs.shape != mine.shape:
            shapes = f"{list(theirs.shape)} in {WEIGHTS}, {list(mine.shape)} by {CONFIG}"
            raise RunError(f"{folder}: '{name}' is {shapes}: the two files belong to different SAEs")
        if not torch.isfinite(theirs).all():
            raise RunError(
                f"{folder / WEIGHTS}: '{name}' holds NaN or infinity: the file is damaged or the training diverged"
            )
    sae.load_state_dict({name: tensors[name].float() for name in sae.state_dict()})


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(
            f"{folder} holds no SAE ({CONFIG} is missing): name a finished run or a SAELens folder"
        ) from None
    except (OSError, ValueError) as failure:
        raise RunError(f"{path} cannot be read: {failure}") from failure
    if not isinstance(config, dict):
        raise RunError(f"{path} holds no JSON object: it does not describe an SAE")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError:
        raise RunError(f"{folder} has {CONFIG} but no {WEIGHTS}: the folder is incomplete") from None
    except (OSError, SafetensorError) as failure:
        raise RunError(f"{path} is damaged or no safetensors file: {failure}") from failure
