"""SAELens folders: ``cfg.json`` and ``sae_weights.safetensors``, the format most tools read and run folders have.

SAELens stores the four weights under the names and layouts used here, so saving copies them bit for bit. A batchtopk
SAE is saved as what it is outside training, a jumprelu with one threshold. Keys as of sae-lens 6; later ones are
additions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ... import __version__
from ...errors import RunError
from ...sites import PLACE
from ...system.atomic_files import write_file, write_json
from ...system.untrusted_files import read_json, shown
from ..run_folder.record import RECORD, load_run
from ..run_folder.record import SAE_CONFIG as CONFIG
from ..run_folder.record import SAE_WEIGHTS as WEIGHTS
from ..sae.activation import Activation
from ..sae.gated import GatedSAE
from ..sae.protocol import PREFIX_SIZES, SparseAutoencoder
from ..sae.temporal_sae import TemporalSAE
from .from_weights import MADE_FOR, count, gated_sae, place_of, plain_sae, registered_sae, shape_of, unit_decoder
from .registry import SAEFormat, sae_format
from .tensor_files import read_safetensors

_ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
_OWN = "tcsae:"  # an architecture, or an activation, that SAELens does not have
# What folders of before 6 have at the top rather than under metadata.
_OUTSIDE = (*PLACE, *MADE_FOR, PREFIX_SIZES)
_THRESHOLDS = ("jumprelu", "batchtopk", "matryoshka_batchtopk")
# SAELens drops the model's name, the hook and the context size of anything that claims to be older than 6.
_SAE_LENS_FORMAT = "6.0.0"


@sae_format("saelens")
class SAELens(SAEFormat):
    """A folder as ``SAE.load_from_disk`` of SAELens opens it."""

    files = (CONFIG, WEIGHTS)
    library = "saelens"
    example = 'from sae_lens import SAE\n\nsae = SAE.load_from_disk("path/to/this/folder")'

    def matches(self, path: Path) -> bool:
        """A folder with a ``cfg.json``."""
        return (path / CONFIG).exists()

    def read(self, path: Path) -> SparseAutoencoder:
        """Standard, topk (with or without decoder-norm rescaling), batchtopk, matryoshka, jumprelu or gated.

        Where the folder is a run of ours, its record must know the two files by their hashes.
        """
        if (path / RECORD).exists():
            load_run(path).check_files(path)
        config = read_json(path / CONFIG)
        weights = read_safetensors(path / WEIGHTS)
        _check_what_is_folded(path, config)
        kept = config.get("metadata")
        if kept is not None and not isinstance(kept, dict):
            raise RunError(f"{shown(path / CONFIG)}: 'metadata' is {shown(repr(kept))}, an object was expected")
        metadata = dict(kept or {})
        metadata |= {key: config[key] for key in _OUTSIDE if config.get(key) is not None and metadata.get(key) is None}
        common: dict[str, Any] = {
            "subtract_b_dec": bool(config.get("apply_b_dec_to_input", True)),
            "metadata": place_of(path / CONFIG, metadata),
        }
        described = [count(path / CONFIG, config, "d_in"), count(path / CONFIG, config, "d_sae")]
        if _is_own(config):
            return _own(path, config, weights, (described[0], described[1]), common["metadata"])
        there = list(shape_of(path / WEIGHTS, weights))
        if there != described:
            shapes = f"W_enc is {there} in {WEIGHTS}, {described} by {CONFIG}"
            raise RunError(f"{shown(path)}: {shapes}: the two files belong to different SAEs")
        return _sae(path, config, weights, common)

    def write(self, sae: SparseAutoencoder, folder: Path) -> None:
        """Weights first: a folder with a ``cfg.json`` is complete."""
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in sae.state_dict().items()}
        if type(sae) is TemporalSAE and sae.activation.kind == "batchtopk":
            if tensors["threshold"] < 0:
                raise RunError("this batchtopk SAE has no threshold yet: train it for at least one step before saving")
            tensors["threshold"] = tensors["threshold"].expand(sae.n_features).clone()
        write_file(folder / WEIGHTS, save(tensors))
        write_json(folder / CONFIG, saelens_config(sae))


def saelens_config(sae: SparseAutoencoder) -> dict[str, Any]:
    """The contents of ``cfg.json`` for ``sae``."""
    config: dict[str, Any] = {
        "architecture": _architecture(sae),
        "d_in": sae.d_model,
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": getattr(sae, "subtract_b_dec", True),
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            **_DEFAULT_METADATA,
            **_loader(sae.metadata.get("hook_name")),
            "tcsae_version": __version__,
            **sae.metadata,
        },
    }
    if config["architecture"].startswith(_OWN):
        config["tcsae_settings"] = sae.settings()
    elif isinstance(sae, TemporalSAE) and sae.activation.kind == "topk":
        config |= {"k": sae.activation.k, "rescale_acts_by_decoder_norm": False}
    return config


def _architecture(sae: SparseAutoencoder) -> str:
    """SAELens' name of what it can express, else one that it does not know: it must not take it for something else."""
    if type(sae) is GatedSAE:
        return "gated"
    if type(sae) is TemporalSAE and sae.activation.kind in _ARCHITECTURES:
        return _ARCHITECTURES[sae.activation.kind]
    return _OWN + sae.architecture


_DEFAULT_METADATA: dict[str, Any] = {
    "sae_lens_version": _SAE_LENS_FORMAT,
    "sae_lens_training_version": None,
    "model_name": None,
    "hook_name": None,
    "hook_head_index": None,
    "context_size": None,
    "prepend_bos": True,
    "dataset_path": None,
    "exclude_special_tokens": True,
    "seqpos_slice": [None],
    "neuronpedia_id": None,
}


def _loader(hook_name: object) -> dict[str, Any]:
    """With what SAELens loads the model, so that it has a hook of that name: TransformerLens', whose weights are then
    left as they are, or transformers' for a module's path.
    """
    if isinstance(hook_name, str) and not hook_name.startswith("blocks."):
        return {"model_class_name": "AutoModelForCausalLM", "model_from_pretrained_kwargs": {}}
    kept = {"center_writing_weights": False}
    return {"model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": kept}


def _sae(path: Path, config: dict[str, Any], weights: dict[str, Tensor], common: dict[str, Any]) -> SparseAutoencoder:
    source = path / WEIGHTS
    architecture, activation = config.get("architecture", "standard"), _activation(config)
    if architecture == "gated":
        return gated_sae(source, weights, **common)
    if architecture == "standard" and activation == "relu":
        return plain_sae(source, weights, Activation("relu"), **common)
    if architecture == "topk" or (architecture == "standard" and activation == "topk"):  # the latter before SAELens 6
        k = count(path / CONFIG, _with_kwargs(config), "k")
        return plain_sae(source, _rescaled(source, config, weights), Activation("topk", k=k), **common)
    if architecture in _THRESHOLDS:
        if "threshold" not in weights and "topk_threshold" in weights:
            weights = weights | {"threshold": weights["topk_threshold"]}
        return plain_sae(source, _rescaled(source, config, weights), Activation("jumprelu"), **common)
    found = f"architecture '{shown(architecture)}'"
    if architecture == "standard":
        found += f" with activation '{shown(activation)}'"
    known = "standard, topk, batchtopk, matryoshka_batchtopk, jumprelu and gated"
    raise RunError(f"{shown(path)} is a SAELens SAE of {found}; {known} can be read")


def _is_own(config: dict[str, Any]) -> bool:
    architecture = config.get("architecture")
    return isinstance(architecture, str) and architecture.startswith(_OWN)


def _own(
    path: Path, config: dict[str, Any], weights: dict[str, Tensor], widths: tuple[int, int], metadata: dict[str, Any]
) -> SparseAutoencoder:
    """An SAE that SAELens does not know; only its own class knows its weights."""
    name, settings = config["architecture"].removeprefix(_OWN), config.get("tcsae_settings") or {}
    return registered_sae(path / WEIGHTS, weights, name, widths, settings, metadata)


def _activation(config: dict[str, Any]) -> Any:
    """Of a standard SAE of before SAELens 6, by either name of the field."""
    return config.get("activation_fn_str") or config.get("activation_fn") or "relu"


def _with_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the arguments of its activation at the top, where SAELens 6 has them."""
    inner = config.get("activation_fn_kwargs")
    return (inner if isinstance(inner, dict) else {}) | config


def _rescaled(source: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if not config.get("rescale_acts_by_decoder_norm"):
        return weights
    missing = next((name for name in ("W_dec", "b_enc") if name not in weights), None)
    if missing:
        raise RunError(f"{shown(source)} has no '{missing}': the SAE is incomplete, or of another kind than it says")
    return unit_decoder(weights)


def _check_what_is_folded(path: Path, config: dict[str, Any]) -> None:
    """Refuse what SAELens does at run time and the weights do not have in them."""
    how = config.get("normalize_activations", "none")
    if how not in ("none", None, False):  # yes or no in the first versions
        raise RunError(
            f"{shown(path)} normalises its inputs by '{shown(how)}' at run time: fold that into the weights with "
            "SAELens first"
        )
    if (shape := config.get("reshape_activations")) not in ("none", None):
        raise RunError(f"{shown(path)} reshapes its inputs ({shown(shape)}): no hook point of this program gives them")
    if config.get("finetuning_scaling_factor"):
        raise RunError(f"{shown(path)} scales its features at run time: fold that into the weights with SAELens first")
