"""The labels that are kept beside a store of codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...console import note
from ...errors import TcsaeError
from ...system.untrusted_files import parse_json
from ..codes.store import CodeStore

FILE = "values/labels.json"
"""Inside the store of codes."""


@dataclass(frozen=True)
class Label:
    """What a language model said of a feature."""

    label: str
    model: str
    prompt: str
    """SHA-256 of the messages that asked for it."""
    created: str


def kept_labels(codes: CodeStore) -> Mapping[int, Label]:
    """Feature → label, of the SAE whose codes these are; none where none were asked for."""
    try:
        found = parse_json(codes.place.read(FILE))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TcsaeError) as problem:
        note(f"{codes.path}/{FILE} cannot be read ({problem}): labels are left out")
        return {}
    if not isinstance(found, dict) or found.get("weights") != codes.manifest.weights:
        return {}
    kept = found.get("labels")
    pairs = kept.items() if isinstance(kept, dict) else ()
    return {int(feature): Label(**fields) for feature, fields in pairs if _is_label(feature, fields)}


def _is_label(feature: Any, fields: Any) -> bool:
    names = {"label", "model", "prompt", "created"}
    return (
        feature.isdecimal()
        and isinstance(fields, dict)
        and set(fields) == names
        and all(isinstance(value, str) for value in fields.values())
    )
