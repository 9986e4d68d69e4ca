"""The SAE file formats that can be read and written, by name. Names are known without importing torch.

A format is one class with a reader and, where other programs' files can be written too, a writer. Registering it makes
it known to ``TemporalSAE.load``, ``evaluate --sae`` and ``export`` alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import UsageError
from ...registry import Registry

if TYPE_CHECKING:
    from ..sae.protocol import SparseAutoencoder


class SAEFormat:
    """One layout of SAE files on disk: subclass it and register the subclass with :func:`sae_format`."""

    files: tuple[str, ...] = ()
    """Names of the files it consists of, as a sentence lists them."""
    library: str = ""
    """The hub's name of the library that reads it, for model cards."""
    example: str = ""
    """Python code that opens what :meth:`write` wrote, for model cards."""

    def matches(self, path: Path) -> bool:
        """Whether a file or folder is of this format, by names alone: nothing is opened."""
        raise NotImplementedError

    def companions(self, inside: str) -> tuple[str, ...]:  # noqa: ARG002 - most formats have none
        """Other files of a hub repository that the one at ``inside`` needs, if it is of this format."""
        return ()

    def read(self, path: Path) -> SparseAutoencoder:
        """Read the SAE at ``path``, in evaluation mode, on the CPU, in the units of raw activations.

        What it says of itself goes into its ``metadata``, under SAELens' names: model_name, hook_name, layer.

        Raises:
            RunError: damaged, incomplete, or of a kind that cannot be expressed.

        """
        raise NotImplementedError

    def write(self, sae: Any, folder: Path) -> None:
        """Write an SAE whose weights are in the units of raw activations into ``folder``.

        Raises:
            RunError: the folder cannot be written, or the format cannot express the SAE.

        """
        raise NotImplementedError

    @property
    def writable(self) -> bool:
        """Whether there is a writer."""
        return type(self).write is not SAEFormat.write


FORMATS: Registry[SAEFormat] = Registry(
    "SAE file format",
    {
        "sparsify": "train.formats.sparsify",  # before saelens, whose cfg.json it has, too
        "saelens": "train.formats.saelens",
        "gemma-scope": "train.formats.gemma_scope",
        "llama-scope": "train.formats.llama_scope",
        "temporal-crosscoder": "train.formats.temporal_crosscoder",  # before dictionary-learning, which has .pt, too
        "dictionary-learning": "train.formats.dictionary_learning",
        "temporal-feature-analysis": "train.formats.temporal_feature_analysis",
    },
)
Kind = TypeVar("Kind", bound=SAEFormat)


def sae_format(name: str) -> Callable[[type[Kind]], type[Kind]]:
    """Register a subclass of :class:`SAEFormat` under ``name``.

    Raises:
        UsageError: the name is taken, or the class lacks ``matches`` or ``read``.

    """

    def add(kind: type[Kind]) -> type[Kind]:
        for method in ("matches", "read"):
            if getattr(kind, method) is getattr(SAEFormat, method):
                raise UsageError(f"the SAE file format '{name}' has no method '{method}': give it one")
        FORMATS.add(name, kind())
        return kind

    return add


def format_of(path: Path) -> str | None:
    """The name of the format of a file or folder; None where none knows it. Plug-ins are asked first."""
    names = sorted(FORMATS, key=lambda name: FORMATS.owner(name) is None)
    return next((name for name in names if FORMATS.get(name).matches(path)), None)


def writable_format(name: str) -> str:
    """The registered name of a format that can be written, given with either kind of dash.

    Raises:
        UsageError: there is none of that name; the sentence lists what there is.

    """
    known = [each for each in FORMATS if FORMATS.get(each).writable]
    found = next((each for each in known if each.replace("_", "-") == name.replace("_", "-")), None)
    if found is None:
        what = f"format '{name}' is only read" if name in FORMATS else f"format '{name}' is unknown"
        raise UsageError(f"{what}: choose one of {', '.join(known)}")
    return found
