"""Finding anyone's SAE: by path or hub id, whatever its format, and the layer and hook point it belongs to.

Accepted: every format of :data:`~.registry.FORMATS`, as a folder or a file, here or on the hub as
``owner/repository/path/inside``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import RunError
from ...sites import Location, site_of
from ...system.untrusted_files import reason, shown
from .registry import FORMATS, format_of

if TYPE_CHECKING:  # the SAE classes reach this file, not the other way round
    from ..sae.protocol import SparseAutoencoder

OWN_MODEL = "tcsae_model"
"""In the metadata: what the language model is called here, where that is not its name on the hub."""


@dataclass(frozen=True)
class ExternalSAE:
    """An SAE from elsewhere, loaded, and where it belongs."""

    name: str
    path: str
    source: str
    """Name of its format."""
    at: Location
    """The layer and hook point whose tensor it reconstructs."""
    sae: SparseAutoencoder
    model_name: str | None

    @property
    def layer(self) -> int:
        """The layer, counted from 0."""
        return self.at.layer

    @property
    def site(self) -> str:
        """The hook point's name."""
        return self.at.site


def load_external(path: str, layer: int | None = None, site: str | None = None) -> ExternalSAE:
    """Load an SAE by path or hub id. ``layer`` and ``site`` are needed where its own files do not say them.

    Raises:
        RunError: nothing there, damaged, or of a kind or a place in the model that cannot be evaluated.
        UsageError: no layer is known, or what is given contradicts the SAE's own.

    """
    source, sae = read_sae(path)
    at = site_of(sae.metadata, path, layer, site)
    model = sae.metadata.get(OWN_MODEL) or sae.metadata.get("model_name")
    return ExternalSAE(_name(path), path, source, at, sae, model)


def read_sae(path: str | Path) -> tuple[str, SparseAutoencoder]:
    """The format and the SAE at a local path or hub id; the SAE in evaluation mode, on the CPU, for raw activations.

    Raises:
        RunError: nothing there, of no known format, damaged, or of a kind that cannot be expressed.

    """
    local = _locate(str(path))
    name = format_of(local)
    if name is None:
        kinds = ", ".join(f"{each} ({' and '.join(FORMATS.get(each).files)})" for each in FORMATS)
        raise RunError(f"{shown(path)} holds no SAE of a known format: name the folder or file of one SAE of {kinds}")
    return name, FORMATS.get(name).read(local)


def _locate(path: str) -> Path:
    """The path itself, or a local copy of what the hub has under that name."""
    local = Path(path)
    try:
        there = local.exists()
    except OSError as failure:  # a name too long, a folder that may not be entered
        raise RunError(f"there is no SAE at {shown(path)}: {reason(failure)}") from None
    if there:
        return local
    parts = path.strip("/").split("/")
    if path.startswith((".", "/", "~")) or len(parts) < 2 or ".." in parts or not path.isprintable():
        raise RunError(f"there is no SAE at {shown(path)}: name a folder, a file, or owner/repository/path on the hub")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    beside = [file for name in FORMATS for file in FORMATS.get(name).companions(inside)]
    patterns = [inside, f"{inside}/*", *beside] if inside else ["*.json", "*.yaml", "*.safetensors", "*.npz", "*.pt"]
    try:
        found = Path(snapshot_download(repository, allow_patterns=patterns)) / inside
    except GatedRepoError:
        raise RunError(
            f"{repository} is gated: accept its terms on the hub, then set HF_TOKEN to a token that may read it"
        ) from None
    except RepositoryNotFoundError:
        raise RunError(
            f"there is no SAE at {path}, neither a local path nor on the hub (or it is private: set HF_TOKEN)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as failure:
        why = reason(failure)
        raise RunError(f"{path} is no local path, and the hub cannot be asked for it: {why}") from None
    if not found.exists():
        raise RunError(f"{repository} on the hub has nothing under '{inside}': look up the path in its file list")
    return found


def _name(path: str) -> str:
    """A short name: the last parts of the path that tell SAEs of one release apart."""
    unsaid = {"/", "\\", ".", "..", *(name for each in FORMATS for name in FORMATS.get(each).files)}
    parts = [part for part in Path(path).parts if part not in unsaid]
    told_apart_by = 3 if any(part.startswith("width_") for part in parts) else 1  # Gemma Scope: layer, width, L0
    return "/".join(parts[-told_apart_by:])
