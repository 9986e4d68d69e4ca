"""Stores on the Hugging Face hub: a dataset repository with a folder for each, and a card that says what they hold."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import format_bytes, note
from ..errors import StoreError, TcsaeError, UsageError
from ..system.untrusted_files import markdown
from .format.manifest import StoreManifest, read_manifest
from .public_names import model_in_words, text_in_words
from .storage.hub import upload, upload_failures
from .storage.lock import LOCK

if TYPE_CHECKING:
    from .store import ActivationStore

CARD = "README.md"
_STAYS_HERE = (LOCK, "*.partial")


@dataclass(frozen=True)
class PushSummary:
    """What was uploaded, and where it can be seen."""

    page: str
    stores: tuple[str, ...]
    """Their folders in the repository."""
    n_bytes: int


def push_stores(stores: Sequence[ActivationStore], repository: str, *, private: bool = False) -> PushSummary:
    """Upload finished stores to a dataset repository, each into a folder of its own name, with one card for all.

    What is there already is not sent again, so that the same call goes on after an interruption.

    Args:
        stores: finished, in local folders of different names.
        repository: ``OWNER/NAME``, made if it is not there.
        private: whether a repository that is made now can be seen by its owner alone.

    Raises:
        StoreError: a store is not finished or not on this machine; or the hub refuses or is out of reach.
        UsageError: two stores have the same folder name.

    """
    for store in stores:
        _check(store)
    names = [Path(store.path).resolve().name for store in stores]
    if len(set(names)) < len(names):
        raise UsageError(f"two of the stores are called {names[0]}: push them into different repositories")
    page = ""
    for name, store in zip(names, stores, strict=True):
        note(f"{store.path} to {repository}/{name}, {format_bytes(store.n_bytes)}")
        folder = Path(store.path).resolve()
        page = upload(
            folder, repository, "dataset", inside=name, ignore=_STAYS_HERE, private=private, failure=StoreError
        )
    here = {name: store.manifest for name, store in zip(names, stores, strict=True)}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / CARD).write_text(store_card(repository, _others(repository, here) | here), encoding="utf-8")
        upload(Path(scratch), repository, "dataset", failure=StoreError)  # last: what it names is there
    return PushSummary(page, tuple(names), sum(store.n_bytes for store in stores))


def _check(store: ActivationStore) -> None:
    if not store.place.local:
        raise StoreError(f"{store.path} is not on this machine: copy it here, then push it")
    if not store.finished:
        raise StoreError(
            f"{store.path} holds {store.n_rows} of {store.manifest.planned_rows} rows: finish it with the same extract "
            "command, then push it"
        )


def _others(repository: str, here: dict[str, StoreManifest]) -> dict[str, StoreManifest]:
    """Stores that earlier pushes have put there."""
    from huggingface_hub import HfApi, hf_hub_download

    found: dict[str, StoreManifest] = {}
    with upload_failures(", ".join(here), repository, StoreError):
        for file in HfApi().list_repo_files(repository, repo_type="dataset"):
            name, _, inside = file.partition("/")
            if inside == "zarr.json" and name not in here:
                try:
                    found[name] = read_manifest(Path(hf_hub_download(repository, file, repo_type="dataset")).parent)
                except TcsaeError as problem:  # some other Zarr group
                    note(f"{repository}/{name} is not on the card: {problem}")
    return found


def store_card(repository: str, stores: dict[str, StoreManifest]) -> str:
    """The repository's README: what each of its stores holds, and how to read it.

    Args:
        repository: ``OWNER/NAME``.
        stores: folder → manifest.

    """
    columns = ("store", "language model", "activations", "rows × positions × width", "text", "made with")
    lines = ["---", "tags: [activations, sparse-autoencoders, zarr]", "viewer: false", "---", ""]
    lines += [f"# {markdown(repository.split('/')[-1])}", ""]
    lines += ["Activations of a language model, stored with tcsae as Zarr groups."]
    lines += ["Every chunk has a checksum. They are the 16 bits of bfloat16, in uint16.", ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(markdown(cell) for cell in _row(name, stores[name]))} |" for name in sorted(stores)]
    first = min(stores)
    call = (
        f'snapshot_download({json.dumps(repository)}, repo_type="dataset", allow_patterns={json.dumps(first + "/*")})'
    )
    lines += ["", "```python", "from huggingface_hub import snapshot_download", "from tcsae import ActivationStore", ""]
    lines += [f"folder = {call}", f'store = ActivationStore.open(folder + "/" + {json.dumps(first)})']
    lines += ["x_BTD = store.rows(0, 8)", "```", ""]
    return "\n".join(lines)


def _row(name: str, manifest: StoreManifest) -> tuple[str, ...]:
    text, versions = manifest.text, manifest.versions
    made_with = ", ".join(f"{package} {versions[package]}" for package in ("tcsae", "torch") if package in versions)
    rows = f"{manifest.planned_rows:,} × {text.context} × {manifest.d_model}"
    dataset = f"{text_in_words(text.dataset)} ({text.split}), {text.packing} packing"
    return (
        name,
        model_in_words(manifest.model.id, manifest.model.revision),
        manifest.hook_name,
        rows,
        dataset,
        made_with,
    )
