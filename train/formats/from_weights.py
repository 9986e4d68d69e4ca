"""From named weights, whoever wrote them, to an SAE: every shape and number is checked first.

Shapes: D model width, F features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import RunError, TcsaeError, UsageError
from ...system.untrusted_files import shown
from ..sae.activation import Activation
from ..sae.gated import GatedSAE
from ..sae.protocol import PREFIX_SIZES, SparseAutoencoder
from ..sae.registry import ARCHITECTURES
from ..sae.temporal_sae import TemporalSAE
from .locate import OWN_MODEL

MOST_FEATURES = 1 << 31
MADE_FOR = (
    *("model_name", "prepend_bos", "context_size", "seqpos_slice"),
    *("model_class_name", "model_from_pretrained_kwargs"),
)
"""What an SAE says of the model and the text that it was trained on, under SAELens' names."""
S = TypeVar("S", bound=SparseAutoencoder)


def plain_sae(source: Path, weights: Mapping[str, Tensor], activation: Activation, **common: Any) -> TemporalSAE:
    """The SAE of these weights, in evaluation mode.

    Args:
        source: where they come from, for messages.
        weights: W_enc [D, F], W_dec [F, D], b_enc [F], b_dec [D] and, for jumprelu, threshold [F] or [].
        activation: what it computes with them.
        common: further arguments of :class:`~tcsae.train.sae.temporal_sae.TemporalSAE`.

    Raises:
        RunError: a weight is missing, of another shape, or not finite; a k that is no number of its features.

    """
    D, F = shape_of(source, weights)
    if activation.k is not None and activation.k > F:
        raise RunError(f"{shown(source)} keeps k = {activation.k} features of a token, but has only {F}")
    wanted = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    if activation.kind == "jumprelu":
        wanted["threshold"] = (F,)
    found = _checked(source, weights, wanted)
    sae = TemporalSAE(D, F, activation, **common)
    sae.load_state_dict(found)
    return sae.eval()


def gated_sae(source: Path, weights: Mapping[str, Tensor], **common: Any) -> GatedSAE:
    """The gated SAE of these weights, in evaluation mode.

    Raises:
        RunError: as :func:`plain_sae`.

    """
    D, F = shape_of(source, weights)
    wanted = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), "r_mag": (F,), "b_gate": (F,), "b_mag": (F,)}
    sae = GatedSAE(D, F, **common)
    sae.load_state_dict(_checked(source, weights, wanted))
    return sae.eval()


def registered_sae(
    source: Path,
    weights: Mapping[str, Tensor],
    name: str,
    widths: tuple[int, int],
    settings: Any,
    metadata: dict[str, Any],
) -> SparseAutoencoder:
    """An SAE of any registered architecture, as this program saves those that other programs do not know.

    Args:
        source: where it comes from, for messages.
        weights: its whole state.
        name: of the architecture.
        widths: D and F.
        settings: see :meth:`~tcsae.train.sae.protocol.SparseAutoencoder.settings`.
        metadata: where it belongs.

    Raises:
        RunError: the architecture is not registered, or weights and settings do not fit it.

    """
    if name not in ARCHITECTURES:
        raise RunError(f"{shown(source)} is of architecture '{shown(name)}', which a plug-in registers: give --plugin")
    try:
        sae = ARCHITECTURES.get(name).from_settings(*widths, dict(settings), metadata)
    except (TcsaeError, KeyError, TypeError, ValueError) as failure:
        what = f"{shown(source)} does not describe an SAE of architecture '{name}'"
        raise RunError(f"{what} ({type(failure).__name__}: {failure})") from failure
    wanted = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
    sae.load_state_dict(_checked(source, weights, wanted))
    return sae.eval()


def filled(source: Path, build: Callable[[], S], weights: Mapping[str, Tensor]) -> S:
    """What ``build`` makes, its state taken from ``weights``; it is made without memory, so that sizes can be absurd.

    Raises:
        RunError: as :func:`plain_sae`.

    """
    try:
        with torch.device("meta"):
            sae = build()
    except UsageError as failure:
        raise RunError(f"{shown(source)} describes no SAE: {failure}") from failure
    wanted = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
    sae.load_state_dict(_checked(source, weights, wanted), assign=True)
    return sae.eval()


def shape_of(source: Path, weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """D and F of the encoder matrix.

    Raises:
        RunError: there is none.

    """
    if "W_enc" not in weights or weights["W_enc"].ndim != 2:
        raise RunError(f"{shown(source)} has no encoder matrix: it is not an SAE of a kind known here")
    return weights["W_enc"].shape[0], weights["W_enc"].shape[1]


def unit_decoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same SAE with decoder rows of norm 1: what SAELens' decoder-norm rescaling does at run time."""
    norms_F = weights["W_dec"].float().norm(dim=1)
    return dict(weights) | {
        "W_enc": weights["W_enc"].float() * norms_F,
        "b_enc": weights["b_enc"].float() * norms_F,
        "W_dec": weights["W_dec"].float() / norms_F[:, None],
    }


def transposed(weight: Tensor) -> Tensor:
    """A linear layer's matrix the other way round; what is no matrix as it is, for :func:`plain_sae` to refuse."""
    return weight.t() if weight.ndim == 2 else weight


def count(source: Path, fields: Mapping[str, Any], name: str, *, most: int = MOST_FEATURES) -> int:
    """A whole number from 1 to ``most`` that a description must have.

    Raises:
        RunError: it is missing or something else.

    """
    if name not in fields:
        raise RunError(f"{shown(source)} lacks '{name}': it does not describe an SAE")
    value = fields[name]
    if type(value) is not int or not 1 <= value <= most:
        raise RunError(f"{shown(source)}: '{name}' is {shown(repr(value))}, a whole number from 1 was expected")
    return value


def positive(source: Path, fields: Mapping[str, Any], name: str) -> float:
    """A positive number that a description must have.

    Raises:
        RunError: it is missing or something else.

    """
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise RunError(f"{shown(source)}: '{name}' is {shown(repr(value))}, a positive number was expected")
    return float(value)


def place_of(source: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with the names that other stages read checked: model_name, hook_name, layer, sizes of nested prefixes.

    Raises:
        RunError: one of them is neither missing nor what it should be.

    """
    for name in ("model_name", OWN_MODEL, "hook_name", "hf_hook_point_in"):
        value = metadata.get(name)
        if value is not None and not isinstance(value, str):
            raise RunError(f"{shown(source)}: '{name}' is {shown(repr(value))}, a name was expected")
    layer = metadata.get("layer")
    if layer is not None and (type(layer) is not int or not 0 <= layer < 1 << 16):
        raise RunError(f"{shown(source)}: 'layer' is {shown(repr(layer))}, the number of a layer was expected")
    sizes = metadata.get(PREFIX_SIZES)
    if sizes is not None:
        known = isinstance(sizes, list) and all(type(size) is int and 0 < size < MOST_FEATURES for size in sizes)
        if not known or any(b <= a for a, b in itertools.pairwise(sizes)):
            found = f"'{PREFIX_SIZES}' is {shown(repr(sizes))}"
            raise RunError(f"{shown(source)}: {found}, sizes of prefixes that grow were expected")
    return dict(metadata)


def _checked(source: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    found = {}
    for name, shape in wanted.items():
        if name not in weights:
            raise RunError(f"{shown(source)} has no '{name}': the SAE is incomplete, or of another kind than it says")
        value = weights[name]
        if tuple(value.shape) != shape and not (name == "threshold" and value.ndim == 0):
            shapes = f"has shape {list(value.shape)}, the other weights need {list(shape)}"
            raise RunError(f"{shown(source)}: '{name}' {shapes}: its files belong to different SAEs")
        value = value.float().expand(shape)
        if not torch.isfinite(value).all():
            raise RunError(
                f"{shown(source)}: '{name}' holds NaN or infinity: the file is damaged or its training diverged"
            )
        found[name] = value.contiguous()
    return found
