"""Where a language model's files are: a folder, a GGUF file, the hub's cache, or the demo's; and what their bytes hash
to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from ...errors import ModelError
from ..assets import MODELS, demo_model
from ..config import ModelSource
from .hub import hub_failures

_TEXT_FILES = ["*.json", "tokenizer*", "*.model", "*.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder on this machine, and what it is called."""

    id: str
    """As it is recorded: the hub id, ``demo`` or ``demo-gemma3``, or the absolute path of the folder."""
    folder: Path
    revision: str | None = None
    """The hub's commit hash."""
    gguf_file: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.id} ({self.gguf_file})" if self.gguf_file else self.id


def locate_model(source: ModelSource) -> ModelFiles:
    """Find the model; from the hub only its configuration and tokenizer are fetched (a GGUF file whole).

    Raises:
        ModelError: nothing there, gated, or the hub is out of reach.

    """
    if source.id in MODELS:
        return ModelFiles(source.id, demo_model(source.id))
    path = Path(source.id).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{path} is a file but not a .gguf file: give the folder that holds config.json and the weights"
            )
        return ModelFiles(str(path.parent.resolve()), path.parent.resolve(), gguf_file=path.name)
    if path.is_dir():
        return _in_folder(path.resolve(), source.gguf_file)
    if source.id.endswith(".gguf") or source.id.count("/") > 1 or source.id[0] in "./~":
        raise ModelError(f"there is no model at {source.id}: give a folder with config.json and weights, or a hub id")
    return _from_hub(source, [source.gguf_file] if source.gguf_file else _TEXT_FILES)


def _in_folder(folder: Path, gguf_file: str | None) -> ModelFiles:
    if gguf_file:
        if not (folder / gguf_file).is_file():
            raise ModelError(f"{folder} holds no file {gguf_file}: its .gguf files are {_names(folder, '*.gguf')}")
    elif not (folder / "config.json").is_file():
        found = _names(folder, "*.gguf")
        hint = f"say --gguf-file with one of {found}" if found else "save the model there with save_pretrained"
        raise ModelError(f"{folder} holds no config.json: {hint}")
    return ModelFiles(str(folder), folder, gguf_file=gguf_file)


def _names(folder: Path, pattern: str) -> str:
    return ", ".join(sorted(p.name for p in folder.glob(pattern)))


def _from_hub(source: ModelSource, patterns: list[str]) -> ModelFiles:
    with hub_failures("model", source.id, ModelError):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source.id, revision=source.revision, allow_patterns=patterns))
    wanted = source.gguf_file or "config.json"
    if not (folder / wanted).is_file():
        raise ModelError(f"{source.id} on the hub holds no {wanted}: choose a repository with weights for transformers")
    return ModelFiles(source.id, folder, revision=folder.name, gguf_file=source.gguf_file)


def fetch_weights(source: ModelSource, files: ModelFiles) -> list[Path]:
    """The weight files, downloaded if they are not here yet.

    Raises:
        ModelError: there are none, or the hub is out of reach.

    """
    if files.gguf_file:
        return [files.folder / files.gguf_file]
    if files.revision and not weights_in(files.folder):
        at_commit = replace(source, revision=files.revision)
        _from_hub(at_commit, ["model*.safetensors"])
        if not weights_in(files.folder):
            _from_hub(at_commit, ["pytorch_model*.bin"])
    found = weights_in(files.folder)
    if not found:
        raise ModelError(f"{files.name} holds a configuration but no weights (*.safetensors or pytorch_model*.bin)")
    return found


def weights_in(folder: Path) -> list[Path]:
    """The weight files of a folder; none when there are none, or not all of a sharded set."""
    for whole, parts in (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin")):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        named = json.loads(index.read_text())["weight_map"].values() if index.is_file() else []
        found = sorted({folder / name for name in named}) or sorted(folder.glob(parts))
        if found and all(part.is_file() for part in found):
            return found
    return []


def weight_fingerprint(files: ModelFiles, weights: Iterable[Path]) -> str:
    """XXH3-128 over the configuration (without the version that wrote it) and every byte of the weights."""
    digest = xxhash.xxh3_128()
    if not files.gguf_file:
        config = json.loads((files.folder / "config.json").read_text())
        config.pop("transformers_version", None)
        digest.update(json.dumps(config, sort_keys=True).encode())
    for path in weights:
        digest.update(path.name.encode())
        hash_file(digest, path)
    return digest.hexdigest()


def tokenizer_fingerprint(files: ModelFiles, serialized: str) -> str:
    """XXH3-128 over the tokenizer's files, or over ``serialized`` where it has none of its own (GGUF)."""
    digest = xxhash.xxh3_128()
    present = [] if files.gguf_file else [files.folder / n for n in _TOKENIZER_FILES if (files.folder / n).is_file()]
    for path in present:
        digest.update(path.name.encode())
        hash_file(digest, path)
    if not present:
        digest.update(serialized.encode())
    return digest.hexdigest()


def hash_file(digest: xxhash.xxh3_128, path: Path) -> None:
    """Feed a file's bytes to ``digest``."""
    with path.open("rb") as file:
        while part := file.read(8_000_000):
            digest.update(part)
