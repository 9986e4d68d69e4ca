"""dictionary_learning: ``ae.pt`` (a state dict) and ``config.json``, as its ``load_dictionary`` reads them.

Its relu and topk classes hold the same four weights, two of them transposed, so these come back bit for bit. Its
jumprelu class never subtracts the decoder's bias from the input: that subtraction is folded into the encoder's bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import RunError
from ...system.atomic_files import write_file, write_json
from ...system.untrusted_files import read_json, shown
from ..sae.activation import Activation
from ..sae.protocol import PREFIX_SIZES, SparseAutoencoder
from ..sae.temporal_sae import TemporalSAE
from .from_weights import count, gated_sae, place_of, plain_sae, transposed
from .registry import SAEFormat, sae_format
from .tensor_files import read_torch

WEIGHTS, CONFIG = "ae.pt", "config.json"
_BATCH_TOP_K = (
    *("BatchTopKSAE", "MatryoshkaBatchTopKSAE"),
    *("TemporalBatchTopKSAE", "TemporalMatryoshkaBatchTopKSAE"),  # Temporal SAE's (arXiv 2511.05541)
)
_CLASSES = {"relu": "AutoEncoder", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}
# Their names (and, for the linear layers, transposition) of our four weights.
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_OTHER = {"bias": "b_dec", "decoder.bias": "b_dec", "decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag"}


@sae_format("dictionary-learning")
class DictionaryLearning(SAEFormat):
    """A ``.pt`` file of a state dict with its ``config.json`` beside it, or the folder of the two."""

    files = (WEIGHTS, CONFIG)
    library = "dictionary-learning"
    example = (
        "from dictionary_learning.utils import load_dictionary\n\n"
        'sae, config = load_dictionary("path/to/this/folder", device="cpu")'
    )

    def matches(self, path: Path) -> bool:
        """A ``.pt`` file, or a folder with an ``ae.pt``."""
        return path.suffix == ".pt" or (path / WEIGHTS).exists()

    def read(self, path: Path) -> SparseAutoencoder:
        """AutoEncoder, TopK, BatchTopK, Matryoshka, JumpRelu or Gated; without ``config.json`` where that is clear."""
        file = path if path.suffix == ".pt" else path / WEIGHTS
        weights = read_torch(file)
        trainer = _trainer(file.with_name(CONFIG))
        place = {"model_name": "lm_name", "hook_name": "submodule_name", "layer": "layer", "io": "io"}
        metadata = {ours: trainer[theirs] for ours, theirs in place.items() if trainer.get(theirs) is not None}
        metadata = place_of(file.with_name(CONFIG), metadata)
        kind = trainer.get("dict_class") or _class_of(file, weights)
        named = _own_names(weights)
        if kind == "AutoEncoder":
            return plain_sae(file, named, Activation("relu"), metadata=metadata)
        if kind == "AutoEncoderNew":
            return plain_sae(file, named, Activation("relu"), subtract_b_dec=False, metadata=metadata)
        if kind == "AutoEncoderTopK":
            return plain_sae(file, named, Activation("topk", k=_k(file, weights)), metadata=metadata)
        if kind in _BATCH_TOP_K:
            groups = _groups(file, weights)
            return plain_sae(file, named, Activation("jumprelu"), metadata=metadata | groups)
        if kind == "JumpReluAutoEncoder":
            return plain_sae(file, named, Activation("jumprelu"), subtract_b_dec=False, metadata=metadata)
        if kind == "GatedAutoEncoder":
            return gated_sae(file, named, metadata=metadata)
        known = "AutoEncoder, AutoEncoderNew, TopK, BatchTopK, Matryoshka, Temporal, JumpRelu and Gated"
        raise RunError(f"{shown(file)} is a dictionary of class '{shown(kind)}'; {known} can be read")

    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Relu, topk or jumprelu; others have no counterpart among their classes."""
        kind = sae.label
        if type(sae) is not TemporalSAE or kind not in _CLASSES:
            raise RunError(
                f"a {kind} SAE in training has no counterpart in dictionary_learning: export the finished run"
                if kind == "batchtopk"
                else f"a {kind} SAE cannot be written for dictionary_learning: use saelens"
            )
        if kind in ("relu", "topk") and not sae.subtract_b_dec:
            raise RunError(
                f"dictionary_learning's {kind} subtracts the decoder's bias from its input, this one does not: use "
                "saelens"
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
        write_file(folder / WEIGHTS, lambda file: torch.save(_state(sae), file))
        write_json(folder / CONFIG, {"trainer": trainer, "buffer": {}})


def _trainer(config: Path) -> dict[str, Any]:
    if not config.exists():
        return {}
    trainer = read_json(config).get("trainer", {})
    if not isinstance(trainer, dict):
        raise RunError(f"{shown(config)}: 'trainer' is {shown(repr(trainer))}, an object was expected")
    return trainer


def _class_of(file: Path, weights: Mapping[str, Tensor]) -> str:
    if "r_mag" in weights:
        return "GatedAutoEncoder"
    if "W_enc" in weights:
        return "MatryoshkaBatchTopKSAE" if "k" in weights else "JumpReluAutoEncoder"
    if "k" not in weights:
        return "AutoEncoder"
    raise RunError(f"{shown(file)} may be TopK or BatchTopK: put the config.json that was saved with it beside it")


def _k(file: Path, weights: Mapping[str, Tensor]) -> int:
    found = weights.get("k")
    if found is not None and (found.numel() != 1 or found.is_floating_point()):
        raise RunError(f"{shown(file)}: 'k' is no whole number: it is not an SAE of a kind known here")
    return count(file, {} if found is None else {"k": int(found)}, "k")


def _groups(file: Path, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nested groups of a Matryoshka SAE: the widths of its prefixes, from the sizes of its groups."""
    sizes = weights.get("group_sizes")
    if sizes is None:
        return {}
    if sizes.is_floating_point() or sizes.ndim != 1 or not len(sizes) or bool((sizes < 1).any()):
        raise RunError(f"{shown(file)}: 'group_sizes' are no sizes of groups: it is not an SAE of a kind known here")
    return place_of(file, {PREFIX_SIZES: sizes.cumsum(0).tolist()})


def _own_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """dictionary_learning's names and layouts as ours."""
    named = {_LINEAR.get(name) or _OTHER.get(name) or name: value for name, value in weights.items()}
    return named | {_LINEAR[name]: transposed(weights[name]) for name in _LINEAR if name in weights}


def _state(sae: TemporalSAE) -> dict[str, Tensor]:
    weights = {name: value.detach().float().cpu().contiguous() for name, value in sae.state_dict().items()}
    if sae.activation.kind == "jumprelu":
        if sae.subtract_b_dec:
            weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
        return weights
    state = {name: transposed(weights[ours]).contiguous() for name, ours in _LINEAR.items()}
    if sae.activation.kind == "relu":
        return state | {"bias": weights["b_dec"]}
    return state | {
        "b_dec": weights["b_dec"],
        "k": torch.tensor(sae.activation.k, dtype=torch.int),
        "threshold": torch.tensor(-1.0),
    }
