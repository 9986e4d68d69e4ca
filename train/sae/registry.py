"""The architectures and activations that can be chosen, by name. Names are known without importing torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ...registry import Registry

if TYPE_CHECKING:
    from .activation import ActivationFunction
    from .protocol import SparseAutoencoder

S = TypeVar("S", bound="type[SparseAutoencoder]")
A = TypeVar("A", bound="type[ActivationFunction]")

ARCHITECTURES: Registry[type[SparseAutoencoder]] = Registry(
    "architecture",
    {
        "sae": "train.sae.temporal_sae",
        "gated": "train.sae.gated",
        "txc": "train.sae.txc",
        "tfa": "train.sae.tfa",
    },
)
ACTIVATIONS: Registry[type[ActivationFunction]] = Registry(
    "activation", dict.fromkeys(("relu", "topk", "batchtopk", "jumprelu"), "train.sae.activation")
)


def architecture(name: str) -> Callable[[S], S]:
    """Register a subclass of :class:`~tcsae.train.sae.protocol.SparseAutoencoder` as ``--architecture name``."""

    def add(kind: S) -> S:
        ARCHITECTURES.add(name, kind)
        kind.architecture = name
        return kind

    return add


def activation(name: str) -> Callable[[A], A]:
    """Register a subclass of :class:`~tcsae.train.sae.activation.ActivationFunction` as ``--activation name``."""

    def add(kind: A) -> A:
        ACTIVATIONS.add(name, kind)
        return kind

    return add
