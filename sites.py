"""Where in a model activations are taken: a layer and a hook point, and what stores and other people's SAEs call that.

What a hook point means for a model is said in ``extract/model/hooks.py``; here are its names alone, so that training
and the reading of SAE files know them without a language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import RunError, UsageError
from .registry import Registry

RESIDUAL = "resid_post"
# All of them are in the residual stream, or added to it as they are.
BUILT_IN = (RESIDUAL, "resid_pre", "resid_mid", "mlp_out", "attn_out")
HOOK_POINTS: Registry[Any] = Registry("hook point", dict.fromkeys(BUILT_IN, "extract.model.hooks"))


class Location(NamedTuple):
    """A layer, counted from 0, and the name of a hook point there."""

    layer: int
    site: str = RESIDUAL

    def __str__(self) -> str:
        """``12``, or ``12 mlp_out`` where it is not the residual stream after the block; goes after "layer"."""
        return str(self.layer) if self.site == RESIDUAL else f"{self.layer} {self.site}"

    @property
    def short(self) -> str:
        """``l12`` or ``l12.mlp_out``: what names of stores and runs begin with."""
        return f"l{self.layer}" if self.site == RESIDUAL else f"l{self.layer}.{self.site}"

    @property
    def hook_name(self) -> str:
        """Its name in TransformerLens and SAELens: ``blocks.12.hook_mlp_out``."""
        return _pattern(self.site).format(layer=self.layer)


def _pattern(site: str) -> str:
    added = site in HOOK_POINTS and site not in BUILT_IN
    return HOOK_POINTS.get(site).hook_name if added else f"blocks.{{layer}}.hook_{site}"


def location_of(hook_name: str) -> Location:
    """The place that one of our own stores or runs names.

    The hook point of a plug-in that is not loaded now goes by what stands behind the layer's number.

    Raises:
        RunError: no name of that kind.

    """
    for site in HOOK_POINTS:
        before, after = map(re.escape, _pattern(site).split("{layer}"))
        if found := re.fullmatch(rf"{before}(\d+){after}", hook_name):
            return Location(int(found[1]), site)
    if found := re.fullmatch(r"blocks\.(\d+)\.(?:hook_)?([\w.]+)", hook_name):
        return Location(int(found[1]), found[2])
    raise RunError(f"'{hook_name}' is no hook name: it should look like {Location(12, 'mlp_out').hook_name}")


# --- what SAEs from elsewhere say of themselves -----------------------------------------------------------------------

# Under these keys formats say where an SAE reads (the first that is there counts) and where it writes.
_READS = ("hook_name", "hook_point", "hf_hook_point_in", "submodule_name")
_WRITES = ("hook_name_out", "hook_point_out", "hf_hook_point_out")
_LAYERS = ("layer", "hook_layer", "hook_point_layer")
_HEADS = ("hook_head_index", "hook_point_head_index")
PLACE = (*_READS, *_WRITES, *_LAYERS, *_HEADS, "io", "model_class_name")
"""All keys of an SAE's description that bear on its place."""

# A block of a transformers model by its path: model.layers.12, transformer.h.12, gpt_neox.layers.12 …
_BLOCK = r"(?:[\w.]*\.)?(?:layers|layer|h|blocks|block)\.(\d+)"
# What modules inside a block put out. Which module that is in a model at hand is compared before anything is spliced:
# `post_attention_layernorm` gives what attention adds in Gemma 2, and the input of the MLP in Llama.
_INSIDE = {
    "mlp_out": ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe", "post_feedforward_layernorm"),
    "attn_out": ("self_attn", "attn", "attention", "self_attention", "post_attention_layernorm"),
}
_SITES = {name: site for site, names in _INSIDE.items() for name in names}

# Things that are no site of the list, by what their names hold; each is refused under the name its users know.
_REFUSED = (
    (r"(?:^|[._/])(?:vision|visual|vit|clip|image)(?:[._/]|$)|vision_(?:tower|model)", "a vision tower"),
    (r"hook_(?:z|q|k|v|result|pattern|attn_scores)$|o_proj\.input$", "the attention heads"),
    (r"ln\w*\.hook_(?:normalized|scale)$|hook_normalized$", "a normalised activation"),
    (r"mlp\.hook_(?:pre|post)$|hook_mlp_in$|(?:down_proj|c_proj)\.input$", "the inside of an MLP"),
    (r"hook_embed|hook_pos_embed|embed_tokens|(?:^|/)embedding(?:/|$)", "the token embedding"),
)
_GEMMA_SCOPE = {"res": RESIDUAL, "mlp": "mlp_out"}  # SAEs of -mlp read after Gemma 2's norm, which is what is added
_GEMMA_SCOPE_REFUSED = {"att": "the attention heads (hook_z)", "transcoders": "the input of an MLP"}


def site_of(metadata: Mapping[str, Any], path: str = "", layer: int | None = None, site: str | None = None) -> Location:
    """Where an SAE belongs: by what its file says, else by its path, else by ``layer`` and ``site``.

    What the file says counts, whatever the path looks like. Where nothing names a hook point it is the residual stream
    after the block.

    Args:
        metadata: what the SAE's file holds, under its own keys: ``hook_name``, ``hook_point``, ``submodule_name``,
            ``hf_hook_point_in``, ``layer``, ``hook_head_index``, ``hook_name_out``, ``io`` …
        path: where it lies: folders and repositories of known releases name their site.
        layer: what the user says.
        site: what the user says.

    Raises:
        RunError: it reads something that is no registered hook point, or writes elsewhere than it reads.
        UsageError: the file and the user disagree, or nobody names a layer.

    """
    if site is not None:
        HOOK_POINTS.check(site)
    found_layer, found_site, said = _read(metadata, path)
    for given, found, option in ((layer, found_layer, "layer"), (site, found_site, "site")):
        if given is not None and found is not None and given != found:
            raise UsageError(
                f"--{option} {given} was given for {path}, but it belongs to {option} {found} ({said}): "
                f"leave --{option} out"
            )
    layer, site = found_layer if layer is None else layer, found_site if site is None else site
    if layer is None:
        raise UsageError(f"{path} does not say which layer it belongs to: give --layer")
    return Location(layer, site or RESIDUAL)


def named_module(metadata: Mapping[str, Any]) -> str | None:
    """The module whose output an SAE says it reads, where it names one (``model.layers.3.mlp``) and no hook point."""
    hook = next((str(metadata[key]) for key in _READS if metadata.get(key)), "")
    found = re.fullmatch(rf"({_BLOCK}(?:\.(?!hook_|(?:in|out)put$)\w+?)?)(?:\.output)?", hook)
    return found[1] if found and metadata.get("io") != "in" else None


def _read(metadata: Mapping[str, Any], path: str) -> tuple[int | None, str | None, str]:
    """Layer, site and where that is said; the file first."""
    key = next((key for key in _READS if metadata.get(key)), None)
    number = next((int(metadata[name]) for name in _LAYERS if isinstance(metadata.get(name), int)), None)
    if key is None:
        layer, site = _by_path(path)
        return (layer if number is None else number), site, "by its path" if number is None else "by its file"
    hook, said = str(metadata[key]), f"{key} '{metadata[key]}'"
    _refuse_others(metadata, path, hook, said)
    found = _by_hook_name(hook, metadata.get("io"))
    if found is None:
        known = ", ".join(HOOK_POINTS)
        raise RunError(f"{path} reads {said}, which is none of the hook points {known}: register it with --plugin")
    layer, site = found
    if layer is not None and number is not None and layer != number:
        raise RunError(f"{path} contradicts itself: {said}, but layer {number}: correct its file")
    return (number if layer is None else layer), site, said


def _refuse_others(metadata: Mapping[str, Any], path: str, hook: str, said: str) -> None:
    writes = next((str(metadata[key]) for key in _WRITES if metadata.get(key)), hook)
    if writes != hook or metadata.get("io") == "in_and_out":
        raise RunError(
            f"{path} is a transcoder: it reads {said} and writes '{writes}'; only SAEs that reconstruct what they read "
            "can be spliced"
        )
    if any(metadata.get(key) is not None for key in _HEADS):
        head = next(metadata[key] for key in _HEADS if metadata.get(key) is not None)
        raise RunError(f"{path} reads one attention head ({said}, head {head}): no hook point of this program")
    if "vit" in str(metadata.get("model_class_name", "")).lower():
        raise RunError(f"{path} reads a vision tower ({metadata['model_class_name']}): only language models are known")
    for pattern, what in _REFUSED:
        if re.search(pattern, hook.lower()) and not _is_added(hook):
            raise RunError(f"{path} reads {what} ({said}): no hook point of this program; register one with --plugin")


def _is_added(hook: str) -> bool:
    """Whether a hook name is that of a hook point that was registered beside the built-in ones."""
    try:
        site = location_of(hook).site
    except RunError:
        return False
    return site in HOOK_POINTS and site not in BUILT_IN


def _by_hook_name(hook: str, io: object) -> tuple[int | None, str] | None:
    if found := re.fullmatch(r"blocks\.\d+\..*hook_\w+", hook):
        at = location_of(hook)
        return (at.layer, at.site) if at.site in HOOK_POINTS else None
    if found := re.fullmatch(r"(\w+?)_layer_?(\d+)", hook):  # dictionary_learning's own: resid_post_layer_12
        return (int(found[2]), found[1]) if found[1] in HOOK_POINTS else None
    if hook in HOOK_POINTS:
        return None, hook
    found = re.fullmatch(rf"{_BLOCK}(?:\.(\w+?))?(?:\.(input|output))?", hook)
    if not found:
        return None
    inside, side = found[2], found[3] or ("input" if io == "in" else "output")
    if inside in ("input", "output"):
        inside, side = None, inside
    if inside is None:
        return int(found[1]), RESIDUAL if side == "output" else "resid_pre"
    return (int(found[1]), _SITES[inside]) if inside in _SITES and side == "output" else None


def _by_path(path: str) -> tuple[int | None, str | None]:
    """What the folders of known releases say: Gemma Scope's, Gemma Scope 2's, and names that hold a hook name."""
    layer = re.search(r"(?:^|[/_])layer_(\d+)(?:[/_]|$)", path)
    release = re.search(r"gemma-scope-[\w.-]*?-(res|mlp|att|transcoders)(?:-canonical)?(?:/|$)", path)
    if release and release[1] in _GEMMA_SCOPE_REFUSED:
        what = _GEMMA_SCOPE_REFUSED[release[1]]
        raise RunError(f"{path} reads {what}: no hook point of this program")
    if re.search(r"(?:^|/)(?:cross|trans)coder", path):
        raise RunError(f"{path} is a transcoder or crosscoder by its path: only SAEs that reconstruct what they read")
    if "gemma-scope" in path and re.search(r"(?:^|/)embedding(?:/|$)", path):
        raise RunError(f"{path} reads the token embedding: no hook point of this program")
    if named := re.search(r"blocks\.\d+\.[\w.]*hook_[a-z_]+", path):
        at = location_of(named[0])
        if at.site in HOOK_POINTS:
            return at.layer, at.site
        raise RunError(f"{path} reads '{named[0]}' by its path: none of the hook points {', '.join(HOOK_POINTS)}")
    if release:
        return (int(layer[1]) if layer else None), _GEMMA_SCOPE[release[1]]
    sites = "|".join(map(re.escape, HOOK_POINTS))
    if named := re.search(rf"(?:^|[/_])({sites})(?:_all)?[/_]layer_?(\d+)(?:[/_]|$)", path):
        return int(named[2]), named[1]  # Gemma Scope 2, dictionary_learning
    return (int(layer[1]) if layer else None), None
