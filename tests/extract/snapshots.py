"""The bytes of stores, for saying that two are the same."""

from __future__ import annotations

import json
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder`` by its relative name; from manifests the date of creation is taken out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = _timeless(path) if path.name == "zarr.json" else path.read_bytes()
    return found


def _timeless(path: Path) -> bytes:
    document = json.loads(path.read_text())
    attributes = document.get("attributes", {})
    attributes.pop("tcsae_check", None)
    attributes.get("tcsae", {}).pop("created", None)
    return json.dumps(document, sort_keys=True).encode()
