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
    from .train.sae.temporal_sae import SAEOutput, TemporalSAE

__version__ = "0.1.0"
__all__ = ["ActivationStore", "SAEOutput", "TemporalSAE", "__version__", "metric", "panel"]

_HOMES = {
    "ActivationStore": ".cache.store",
    "TemporalSAE": ".train.sae.temporal_sae",
    "SAEOutput": ".train.sae.temporal_sae",
    "metric": ".evaluate.metrics.registry",
    "panel": ".evaluate.report.panels.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tcsae' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
