"""Members that begin with the weights of an SAE that is there already, whatever file format it is of.

Its weights are for raw activations, a member's for scaled ones, and a member's decoder rows may have to have norm 1.
Both are changes of units: codes change by a factor, reconstructions do not.

Shapes: D model width, F features.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache.public_names import hub_name
from ...cache.store import ActivationStore
from ...console import warn
from ...errors import UsageError
from ..config import TrainConfig
from ..formats.locate import read_sae
from ..loss.objective import group_sizes
from ..plan import MemberPlan
from ..run_folder.record import RunRecord
from ..sae.activation import Activation
from ..sae.protocol import SparseAutoencoder
from ..sae.registry import ARCHITECTURES
from ..sae.temporal_sae import TemporalSAE
from .member import Member

_UNITS = ("W_enc", "b_enc", "b_gate", "b_mag", "threshold")
"""What a code is made of, and grows with it."""
_FEATURE_BY_FEATURE = ("relu", "jumprelu", "gated")
"""Where a feature's code does not depend on other features', so that each can have units of its own."""
_ALIKE = 1e-3  # relative difference of row norms that float32 or bfloat16 files explain


def check_sources(plans: Iterable[MemberPlan], store: ActivationStore) -> None:
    """Read what members are to begin from, before anything is written.

    Raises:
        RunError: there is no SAE there, or it is damaged.
        UsageError: it has another width or kind than the member.

    """
    known: dict[str, SparseAutoencoder] = {}
    for plan in plans:
        path = plan.config.run.init_from
        if path and path not in known:
            known[path] = read_sae(path)[1]
            _warn_of_other_place(path, known[path], store)
        if path:
            check_source(plan, _as_trained(known[path], plan.config))


def check_source(plan: MemberPlan, source: SparseAutoencoder) -> None:
    """Compare an SAE with what a member is to be.

    Raises:
        UsageError: they differ; the sentence says which options fit.

    """
    config, path = plan.config, plan.config.run.init_from
    if source.d_model != plan.d_model:
        raise UsageError(
            f"{path} is of width {source.d_model}, the store of width {plan.d_model}: give a store it fits"
        )
    kind = ARCHITECTURES.get(config.sae.architecture)
    if type(source) is not kind:
        raise UsageError(f"{path} is of architecture {source.architecture}: say --architecture {source.architecture}")
    said: dict[str, tuple[Any, Any]] = {"width": (source.n_features, config.sae.width)}
    if isinstance(source, TemporalSAE):
        said["activation"] = (source.activation.kind, config.sae.activation)
        if source.activation.k is not None and source.activation.kind == config.sae.activation:
            said["k"] = (source.activation.k, config.sae.k)
    said["groups"] = (source.prefix_sizes, group_sizes(config.sae, config.sae.width))
    differs = {name: pair for name, pair in said.items() if pair[0] != pair[1]}
    if not differs:
        return
    if list(differs) == ["groups"]:
        raise UsageError(
            f"{path} has nested groups of {source.prefix_sizes} features, asked for are {said['groups'][1]}"
        )
    has = ", ".join(f"{name} {pair[0]}" for name, pair in differs.items() if name != "groups")
    asked = ", ".join(f"{name} {pair[1]}" for name, pair in differs.items() if name != "groups")
    remedy = " ".join(f"--{name} {pair[0]}" for name, pair in differs.items() if name != "groups")
    raise UsageError(f"{path} has {has}, asked for is {asked}: say {remedy}")


def _warn_of_other_place(path: str, source: SparseAutoencoder, store: ActivationStore) -> None:
    said, here = source.metadata.get("hook_name"), store.manifest.hook_name
    if said and said != here:
        warn(f"{path} was trained at {said}, the store is of {here}: its features begin in another place")
    model, of_store = source.metadata.get("model_name"), store.manifest.model.id
    if model and model not in (of_store, hub_name(of_store)):
        warn(f"{path} was trained on {model}, the store is of {of_store}")


def begin_from_source(member: Member, scale: float) -> dict[str, Any]:
    """Give a new member the weights it is to begin with, if any; returns what the record says of them.

    Args:
        member: new.
        scale: from raw activations to what members see.

    Raises:
        RunError: there is no SAE, or it is damaged.
        UsageError: it does not fit; see :func:`for_training`.

    """
    path = member.config.run.init_from
    if not path:
        return {}
    source_format, read = read_sae(path)
    source = _as_trained(read, member.config)
    check_source(member.plan, source)
    member.sae.load_state_dict(for_training(source, member.config, scale).state_dict())
    digest = sha256()
    for name, value in sorted(read.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    facts = {"path": path, "format": source_format, "weights": digest.hexdigest()}
    return facts | {name: source.metadata[name] for name in ("model_name", "hook_name") if source.metadata.get(name)}


def begin_from_run(member: Member, record: RunRecord, folder: Path) -> None:
    """Give a new member the weights of its finished run, and what its record keeps of the training's state.

    Raises:
        RunError: the run's files are damaged.

    """
    weights = for_training(read_sae(folder)[1], member.config, record.input_scale).state_dict()
    if member.sae.running_threshold is not None:
        weights["threshold"] = weights["threshold"][0]  # files of batchtopk are jumprelu's, all thresholds alike
    member.sae.load_state_dict(weights)
    if member.target is not None and "target" in record.ends:
        member.target.load_state_dict(record.ends["target"])


@torch.no_grad()
def _as_trained(source: SparseAutoencoder, config: TrainConfig) -> SparseAutoencoder:
    """A batchtopk SAE is kept as jumprelu with one threshold for all features, which it is outside training: the same
    as batchtopk, where that is what is to be trained.
    """
    if type(source) is not TemporalSAE or config.sae.activation != "batchtopk" or source.threshold is None:
        return source
    threshold = source.threshold
    if source.activation.kind != "jumprelu" or not bool((threshold == threshold[0]).all()):
        return source
    chosen = Activation("batchtopk", k=config.sae.k)
    settings = {"subtract_b_dec": source.subtract_b_dec, "metadata": source.metadata}
    found = TemporalSAE(source.d_model, source.n_features, chosen, **settings)
    found.load_state_dict(source.state_dict() | {"threshold": threshold[0]})
    return found.eval()


@torch.no_grad()
def for_training(source: SparseAutoencoder, config: TrainConfig, scale: float) -> SparseAutoencoder:
    """The same SAE for activations times ``scale``, as a configuration trains it.

    Codes may be in other units. Reconstructions are those of the source, times ``scale``.

    Raises:
        UsageError: decoder rows are to have norm 1 and have several norms, and which features are active depends on
            all of them.

    """
    sae = source.rescaled(1 / scale)
    if getattr(sae, "subtract_b_dec", True) is False and "b_enc" in dict(sae.named_parameters()):
        sae.b_enc.add_(sae.b_dec @ sae.W_enc)  # x W + b = (x − b_dec) W + (b + b_dec W)
        setattr(sae, "subtract_b_dec", True)  # noqa: B010 - not of every architecture
    if config.sae.decoder == "unit":
        _unit_rows(sae, config)
    return sae


def _unit_rows(sae: SparseAutoencoder, config: TrainConfig) -> None:
    norm_F = sae.W_dec.flatten(1).norm(dim=-1) if sae.W_dec.ndim == 2 else sae.W_dec.new_ones(1)
    common = norm_F[norm_F > 0].median() if bool((norm_F > 0).any()) else norm_F.new_ones(())
    if bool(((norm_F - common).abs()[norm_F > 0] <= _ALIKE * common).all()):
        if abs(float(common) - 1) > _ALIKE:
            _change_units(sae, common.expand_as(norm_F))
        return
    kind = sae.activation.kind if type(sae) is TemporalSAE else sae.architecture
    if kind not in _FEATURE_BY_FEATURE:
        raise UsageError(
            f"{config.run.init_from} has decoder rows of norms {float(norm_F.min()):.3g} to {float(norm_F.max()):.3g}; "
            f"with rows of norm 1 {kind} would choose other features: set sae.decoder = 'free' in --config"
        )
    _change_units(sae, torch.where(norm_F > 0, norm_F, 1.0))


def _change_units(sae: SparseAutoencoder, factor_F: Tensor) -> None:
    """Codes times ``factor_F``, decoder rows divided by it."""
    for name, value in sae.state_dict(keep_vars=True).items():
        if name not in _UNITS:
            continue
        if value.ndim == 0:
            value.copy_(torch.where(value > 0, value * factor_F[0], value))  # a running threshold, or −1: none yet
        else:
            value.mul_(factor_F)
    sae.W_dec.div_(factor_F[:, None])
