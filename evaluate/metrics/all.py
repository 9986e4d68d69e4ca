"""All registered metrics together: what one SAE's pass over the text is read by, and what is asked after it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import MissingPackageError, NoLanguageModelError, UsageError, needs
from ...plugins import plugin_at_work
from ...system.free_memory import tensor_bytes
from ...train.sae.activation import Activation
from ...train.sae.protocol import SparseCoder
from ...train.sae.temporal_sae import TemporalSAE
from .. import cost
from ..protocol import Findings, RawActivations, State, TokenBatch
from ..results import Definition
from . import fidelity
from .active_entries import ActiveEntries
from .registry import METRICS, MetricFamily

if TYPE_CHECKING:
    from ..model.probes import ProbeContext


_GROUPS = {"features": "features", "temporal": "time", "position": "position"}
"""The part of an evaluation that can be asked for alone → the group of its columns."""


def families(plugins: Collection[str] = (), only: Collection[str] = ()) -> dict[str, MetricFamily]:
    """The metrics of this program and those of these plug-in files (names), by the name of the family.

    ``only``: those of these parts of an evaluation, without what asks the model after the pass; empty: all.

    Raises:
        UsageError: two of them define a metric of the same name.

    """
    found = {name: METRICS.get(name) for name in METRICS.among(plugins)}
    owners = dict.fromkeys(fidelity.definitions(), "fidelity")
    for name, family in found.items():
        for key in family.definitions:
            if key in owners:
                raise UsageError(f"both '{owners[key]}' and '{name}' define a metric '{key}': rename one of them")
            owners[key] = name
    if not only:
        return found
    groups = {_GROUPS[part] for part in only if part in _GROUPS}
    return {
        name: family
        for name, family in found.items()
        if family.probe is None and groups & {one.group for one in family.definitions.values()}
    }


def definitions(plugins: Collection[str] = ()) -> dict[str, Definition]:
    """Every metric that an evaluation measures, fidelity included, in the order of the report's columns."""
    found = fidelity.definitions()
    for family in families(plugins).values():
        found |= family.definitions
    return found | cost.DEFINITIONS


def installed(chosen: Mapping[str, MetricFamily]) -> tuple[dict[str, MetricFamily], list[str]]:
    """The families whose packages are there, and why each of the others is left out."""
    found, missing = {}, []
    for name, family in chosen.items():
        try:
            if family.needs is not None:
                package, extra = family.needs
                needs(package, extra=extra, what=f"the metric '{name}' is left out: it")
        except MissingPackageError as failure:
            missing.append(str(failure))
        else:
            found[name] = family
    return found, missing


class AllMetrics:
    """The accumulators of some families for one SAE, read and finished together.

    Args:
        sae: whose features are measured, or the activations themselves.
        chosen: the families; those that ask the model after the pass have no part in it.
        context: positions of a row.
        seed: of samples and nulls.

    """

    def __init__(
        self, sae: SparseCoder | RawActivations, chosen: Mapping[str, MetricFamily], *, context: int, seed: int
    ):
        raw = isinstance(sae, RawActivations)
        makers = {name: family.of_activations if raw else family.accumulator for name, family in chosen.items()}
        self._parts: dict[str, Any] = {
            name: make(sae, context=context, seed=seed) for name, make in makers.items() if make is not None
        }
        self.definitions = {key: one for part in self._parts.values() for key, one in part.definitions.items()}

    def update(self, batch: TokenBatch, active: ActiveEntries, x_hat_BTD: Tensor) -> None:
        """Take one batch in."""
        for name, part in self._parts.items():
            with plugin_at_work(METRICS, name):
                part.update(batch, active, x_hat_BTD)

    def state(self) -> State:
        """What all of them hold; each must have a state."""
        found = {}
        for name, part in self._parts.items():
            with plugin_at_work(METRICS, name):
                found[name] = part.state()
        return found

    def merge(self, later: State) -> None:
        """Take in the states of other rows."""
        for name, part in self._parts.items():
            with plugin_at_work(METRICS, name):
                part.merge(later[name])

    def result(self) -> Findings:
        """What all of them found."""
        found = Findings()
        for name, part in self._parts.items():
            with plugin_at_work(METRICS, name):
                more = part.result()
            _check_defined(name, more, part.definitions)
            found.add(more)
        return found


def memory_over_weights(chosen: Mapping[str, MetricFamily], context: int, d_model: int) -> float:
    """By how much more memory than its float32 weights an SAE takes while it is measured.

    With the weights of a feature: what this program's metrics hold of it from the beginning on, and as much again for
    what they gather from the text.
    """
    own = {name: family for name, family in chosen.items() if METRICS.is_own(name)}
    few, many = (
        tensor_bytes(AllMetrics(TemporalSAE(1, n, Activation("relu")).eval(), own, context=context, seed=0))
        for n in (64, 192)
    )
    return 1 + 2 * (many - few) / 128 / (2 * d_model * torch.float32.itemsize)


def probes(context: ProbeContext, chosen: Mapping[str, MetricFamily]) -> Findings:
    """What the families that ask the model after the pass find.

    A family that asks for what only a language model can do, where there is none, is noted in ``probed.left_out``.
    """
    found = Findings()
    for name, family in chosen.items():
        if family.probe is not None:
            try:
                with plugin_at_work(METRICS, name):
                    more = family.probe(context)
            except NoLanguageModelError:
                context.probed.left_out.add(name)
                continue
            _check_defined(name, more, family.definitions)
            found.add(more)
    return found


def _check_defined(name: str, found: Findings, known: Iterable[str]) -> None:
    used = {one.definition for part in (found.sums, found.metrics, found.curves) for one in part.values()}
    if undefined := sorted(used - set(known)):
        raise UsageError(f"the metric '{name}' finds '{undefined[0]}', which its definitions do not have: add it")
