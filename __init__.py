"""tcsae: train and judge sparse autoencoders with temporal consistency on cached language-model activations.

The public names are imported on first use, so that importing the package (and opening the command line's help) costs
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.store import ActivationStore
    from .evaluate.metrics.registry import metric
    from .evaluate.report.panels.registry import panel
    from .train.formats.registry import SAEFormat, sae_format
    from .train.loss.registry import partner, temporal_term
    from .train.sae.activation import ActivationFunction
    from .train.sae.protocol import SAEOutput, SparseAutoencoder
    from .train.sae.registry import activation, architecture
    from .train.sae.temporal_sae import TemporalSAE
    from .train.step.registry import temporal_gradient

__version__ = "0.1.0"
__all__ = [
    "ActivationFunction",
    "ActivationStore",
    "SAEFormat",
    "SAEOutput",
    "SparseAutoencoder",
    "TemporalSAE",
    "__version__",
    "activation",
    "architecture",
    "metric",
    "panel",
    "partner",
    "sae_format",
    "temporal_gradient",
    "temporal_term",
]

_HOMES = {
    "ActivationFunction": ".train.sae.activation",
    "ActivationStore": ".cache.store",
    "SAEFormat": ".train.formats.registry",
    "SAEOutput": ".train.sae.protocol",
    "SparseAutoencoder": ".train.sae.protocol",
    "TemporalSAE": ".train.sae.temporal_sae",
    "activation": ".train.sae.registry",
    "architecture": ".train.sae.registry",
    "metric": ".evaluate.metrics.registry",
    "panel": ".evaluate.report.panels.registry",
    "partner": ".train.loss.registry",
    "sae_format": ".train.formats.registry",
    "temporal_gradient": ".train.step.registry",
    "temporal_term": ".train.loss.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tcsae' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
