"""The metrics there are, by name: this program's own and those of plug-ins, all registered with :func:`metric`.

A name stands for a family: metrics that are measured together. There are three ways to write one: a plain function of
tokens or of adjacent pairs, whose values are averaged; a class that reads every batch of the text; a function that asks
the language model something after the pass over the text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ...errors import UsageError
from ...registry import Registry
from ..protocol import Accumulator, Findings
from ..results import Definition
from .average import Average

if TYPE_CHECKING:
    from ..model.probes import ProbeContext

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class MetricFamily:
    """Metrics that are measured together, either during the pass over the text or after it."""

    written_as: Callable[..., Any]
    """The class or function that was registered."""
    definitions: Mapping[str, Definition]
    accumulator: Callable[..., Accumulator] | None = None
    """``(sae, *, context, seed)``: what reads the pass for one SAE, in rows of ``context`` tokens."""
    probe: Callable[[ProbeContext], Findings] | None = None
    """What asks the model after the pass; left out of a ``--quick`` evaluation."""
    of_activations: Callable[..., Accumulator] | None = None
    """``(activations, *, context, seed)``: what reads the activations themselves in the pass, for the reference row
    ``identity_bf16``. Its metrics, which every row then shows, are what the best of codes could reach."""
    needs: tuple[str, str] | None = None
    """A package that is not always installed, and the extra that installs it; without it the family is left out."""
    by_part: tuple[str, ...] = ()
    """Which of the metrics are also measured of each part of the dictionary where the temporal term sees only one."""
    merges: bool = True
    """Whether what reads the pass has ``state`` and ``merge``, so that rows can be divided among processes."""


METRICS: Registry[MetricFamily] = Registry(
    "metric",
    {
        "features": "evaluate.metrics.features",
        "redundancy": "evaluate.metrics.redundancy",
        "temporal": "evaluate.metrics.temporal",
        "position": "evaluate.metrics.position",
        "prefix_shift": "evaluate.metrics.prefix_shift",
        "sparse_probes": "evaluate.metrics.probing.sparse_probes",
        "boundary": "evaluate.metrics.probing.boundary",
    },
)


def metric(
    name: str,
    *,
    over: Literal["tokens", "pairs", "model"] | None = None,
    text: str = "",
    unit: str = "1",
    better: Literal["lower", "higher"] | None = None,
    label: str = "",
    group: str = "",
    definitions: Mapping[str, Definition] | None = None,
) -> Callable[[T], T]:
    """Register the decorated class or function as a metric.

    A class is an :class:`~tcsae.evaluate.protocol.Accumulator` made with ``(sae, *, context, seed)``; it may have
    ``by_part``, ``needs`` and a class ``OfActivations`` (see :class:`MetricFamily`), and ``state`` and ``merge`` (see
    :class:`~tcsae.evaluate.protocol.Mergeable`), without which only one process measures it. A function says what it
    is called with:

    - ``over="tokens"``: one :class:`~tcsae.evaluate.metrics.average.Tokens`, all tokens of a batch that count;
    - ``over="pairs"``: two of them, the first and the second token of every valid pair of adjacent tokens;
    - ``over="model"``: a :class:`~tcsae.evaluate.model.probes.ProbeContext`, once, after the pass.

    Of tokens or pairs it returns one value each, or numerators and denominators: the metric is their sum over the text
    divided, with a bootstrap interval, and its difference from the twin has a paired one. After the pass it returns
    :class:`~tcsae.evaluate.protocol.Findings`.

    Args:
        name: of the family; of the metric itself where it is a function of tokens or pairs.
        over: what a function is called with; None for a class.
        text: what the metric means, with its formula. This and what follows: of a function of tokens or pairs.
        unit: "share", "nats", "tokens", "1" (a pure number) …
        better: which direction is good; None where neither is.
        label: a short name for tables.
        group: its group of columns in the report's main table (sparsity, fidelity, features, time, position, or a new
            one); empty: it stands in the table of all metrics only.
        definitions: of a function of the model, by the names in its findings.

    Raises:
        UsageError: the name is taken, or something is missing.

    """

    def register(written_as: T) -> T:
        if over == "tokens" or over == "pairs":
            if not text:
                raise UsageError(f"the metric '{name}' has no definition: say what it means with text=…")
            found = {name: Definition(text=text, unit=unit, better=better, label=label, group=group)}
            make = partial(Average, written_as, name, found[name], over)
            family = MetricFamily(written_as, found, accumulator=lambda _sae, **_: make(), by_part=(name,))
        elif over == "model":
            if not definitions:
                raise UsageError(f"the metric '{name}' has no definition: give definitions={{…}}, one per finding")
            family = MetricFamily(written_as, dict(definitions), probe=written_as)
        else:
            family = _of_class(name, written_as)
        METRICS.add(name, family)
        return written_as

    return register


def _of_class(name: str, written_as: Any) -> MetricFamily:
    if inspect.isfunction(written_as):
        raise UsageError(f"the metric '{name}' is a function: say over='tokens', over='pairs' or over='model'")
    for part in ("definitions", "update", "result"):
        if not hasattr(written_as, part):
            raise UsageError(
                f"the metric '{name}' has no '{part}': a class needs definitions, update(batch, active, x_hat_BTD) and "
                "result()"
            )
    of_activations = getattr(written_as, "OfActivations", None)
    readers = [one for one in (written_as, of_activations) if one is not None]
    return MetricFamily(
        written_as,
        written_as.definitions,
        accumulator=written_as,
        by_part=getattr(written_as, "by_part", ()),
        of_activations=of_activations,
        needs=getattr(written_as, "needs", None),
        merges=all(hasattr(one, "state") and hasattr(one, "merge") for one in readers),
    )
