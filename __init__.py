"""tcsae: train and judge sparse autoencoders with temporal consistency on cached language-model activations.

The public names are declared here and imported on first use, so that importing the package (and opening the command
line's help) costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names once more, for editors and type checkers
    from .cache.arrays.config import ImportConfig as ImportConfig
    from .cache.arrays.run import ImportSummary as ImportSummary
    from .cache.dataset import ActivationBatches as ActivationBatches
    from .cache.dataset import ActivationDataset as ActivationDataset
    from .cache.store import ActivationStore as ActivationStore
    from .errors import TcsaeError as TcsaeError
    from .evaluate.config import EvaluateConfig as EvaluateConfig
    from .evaluate.finetune.config import FinetuneConfig as FinetuneConfig
    from .evaluate.finetune.run import FinetuneSummary as FinetuneSummary
    from .evaluate.flat import Report as Report
    from .evaluate.metrics.registry import metric as metric
    from .evaluate.prune.config import PruneConfig as PruneConfig
    from .evaluate.prune.run import PruneSummary as PruneSummary
    from .evaluate.report.panels.registry import panel as panel
    from .evaluate.results import EvaluationReport as EvaluationReport
    from .evaluate.run import Outcome as Outcome
    from .extract.config import ExtractConfig as ExtractConfig
    from .extract.config import ModelSource as ModelSource
    from .extract.config import TextSource as TextSource
    from .extract.model.hooks import hook_point as hook_point
    from .extract.model.module_hook import ModuleHook as ModuleHook
    from .extract.summary import ExtractSummary as ExtractSummary
    from .interface import evaluate as evaluate
    from .interface import extract as extract
    from .interface import finetune as finetune
    from .interface import import_array as import_array
    from .interface import load_report as load_report
    from .interface import prune as prune
    from .interface import study as study
    from .interface import train as train
    from .study.file import StudyFile as StudyFile
    from .study.run import StudySummary as StudySummary
    from .train.config import DataConfig as DataConfig
    from .train.config import LossConfig as LossConfig
    from .train.config import OptimiserConfig as OptimiserConfig
    from .train.config import RunConfig as RunConfig
    from .train.config import SAEConfig as SAEConfig
    from .train.config import TemporalConfig as TemporalConfig
    from .train.config import TrainConfig as TrainConfig
    from .train.formats.registry import SAEFormat as SAEFormat
    from .train.formats.registry import sae_format as sae_format
    from .train.loss.registry import partner as partner
    from .train.loss.registry import temporal_term as temporal_term
    from .train.options import train_config as train_config
    from .train.run import TrainSummary as TrainSummary
    from .train.sae.activation import ActivationFunction as ActivationFunction
    from .train.sae.protocol import SAEOutput as SAEOutput
    from .train.sae.protocol import SparseAutoencoder as SparseAutoencoder
    from .train.sae.registry import activation as activation
    from .train.sae.registry import architecture as architecture
    from .train.sae.temporal_sae import TemporalSAE as TemporalSAE
    from .train.step.registry import temporal_gradient as temporal_gradient

__version__ = "0.1.0"

# Public name → the module that has it. extract, train, evaluate and study are packages that can be called.
_HOMES = {
    "extract": "extract",
    "train": "train",
    "evaluate": "evaluate",
    "study": "study",
    "finetune": "interface",
    "prune": "interface",
    "import_array": "interface",
    "load_report": "interface",
    "ActivationStore": "cache.store",
    "ActivationBatches": "cache.dataset",
    "ActivationDataset": "cache.dataset",
    "TemporalSAE": "train.sae.temporal_sae",
    "SAEOutput": "train.sae.protocol",
    "ExtractConfig": "extract.config",
    "ModelSource": "extract.config",
    "TextSource": "extract.config",
    "ExtractSummary": "extract.summary",
    "ImportConfig": "cache.arrays.config",
    "ImportSummary": "cache.arrays.run",
    "TrainConfig": "train.config",
    "DataConfig": "train.config",
    "SAEConfig": "train.config",
    "LossConfig": "train.config",
    "TemporalConfig": "train.config",
    "OptimiserConfig": "train.config",
    "RunConfig": "train.config",
    "train_config": "train.options",
    "TrainSummary": "train.run",
    "EvaluateConfig": "evaluate.config",
    "Outcome": "evaluate.run",
    "EvaluationReport": "evaluate.results",
    "Report": "evaluate.flat",
    "FinetuneConfig": "evaluate.finetune.config",
    "FinetuneSummary": "evaluate.finetune.run",
    "PruneConfig": "evaluate.prune.config",
    "PruneSummary": "evaluate.prune.run",
    "StudyFile": "study.file",
    "StudySummary": "study.run",
    "ActivationFunction": "train.sae.activation",
    "SAEFormat": "train.formats.registry",
    "SparseAutoencoder": "train.sae.protocol",
    "ModuleHook": "extract.model.module_hook",
    "activation": "train.sae.registry",
    "architecture": "train.sae.registry",
    "hook_point": "extract.model.hooks",
    "metric": "evaluate.metrics.registry",
    "panel": "evaluate.report.panels.registry",
    "partner": "train.loss.registry",
    "sae_format": "train.formats.registry",
    "temporal_gradient": "train.step.registry",
    "temporal_term": "train.loss.registry",
    "TcsaeError": "errors",
}
__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tcsae' has no attribute '{name}'")
    home = import_module(f".{_HOMES[name]}", __name__)
    return home if name == _HOMES[name] else getattr(home, name)


def __dir__() -> list[str]:
    return __all__
