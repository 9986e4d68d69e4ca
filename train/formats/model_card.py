"""Model cards: what the README of an SAE's repository says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...cache.public_names import hub_name, model_in_words, text_in_words
from ...system.untrusted_files import markdown
from ..run_folder.record import RunRecord
from .registry import FORMATS

CARD = "README.md"


def model_card(record: RunRecord, format_name: str, base_model: str | None = None) -> str:
    """What a stranger needs to know of a run.

    Args:
        record: of the run.
        format_name: of the files beside the card.
        base_model: the language model's name on the hub, where the record does not have it.

    """
    model, text = record.store_manifest["model"], record.store_manifest["text"]
    sae, temporal = record.config["sae"], record.config["temporal"]
    sparsity = f" (k = {sae['k']})" if sae["activation"] in ("topk", "batchtopk") else ""
    term = (
        "none"
        if temporal["form"] == "none"
        else f"{temporal['form']}, λ2 = {temporal['weight']:g}, {temporal['partner']}"
    )
    rows = {
        "language model": base_model or model_in_words(model["id"], model["revision"]),
        "activations": f"{record.store_manifest['hook_name']}, width {record.store_manifest['d_model']}",
        "text": f"{text_in_words(text['dataset'])}, rows of {text['context']} tokens",
        "tokens": f"{record.tokens:,}",
        "activation": sae["activation"] + sparsity,
        "features": f"{sae['width']:,}",
        "temporal term": f"{term} (windows of {record.config['data']['window']})",
        "seed": str(record.seed),
    }
    last = ("explained_variance", "l0", "dead_share", "temporal_variation")
    measured = {name.replace("_", " "): record.metrics.get(name) for name in last}
    lines = ["On the last logged batch of its training stream (not on held-out text):", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in measured.items() if value is not None]
    return _card(record.name, rows, format_name, base_model or hub_name(model["id"]), lines)


def plain_card(name: str, label: str, n_features: int, d_model: int, metadata: Mapping[str, Any]) -> str:
    """What is known of an SAE without its run: what its own file says."""
    model, dataset = metadata.get("model_name"), metadata.get("dataset_path")
    rows = {
        "language model": model_in_words(model) if isinstance(model, str) and model else None,
        "activations": f"{metadata.get('hook_name') or 'of an unnamed place'}, width {d_model}",
        "text": text_in_words(dataset) if isinstance(dataset, str) and dataset else None,
        "architecture": label,
        "features": f"{n_features:,}",
    }
    known = {title: value for title, value in rows.items() if value}
    return _card(name, known, "saelens", hub_name(model) if isinstance(model, str) else None, [])


def _card(title: str, rows: Mapping[str, str], format_name: str, base_model: str | None, more: Sequence[str]) -> str:
    written = FORMATS.get(format_name)
    lines = ["---", *([f"library_name: {written.library}"] if written.library else [])]
    lines += ["tags: [sparse-autoencoder, temporal-consistency]"]
    lines += [f"base_model: {json.dumps(base_model)}"] if base_model else []  # the hub takes no other names
    lines += ["---", "", f"# {markdown(title)}", ""]
    lines += [
        "A sparse autoencoder trained with tcsae. It takes and gives raw activations; special tokens were left out.",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {markdown(value)} |" for name, value in rows.items()), "", *more]
    opened = ["", "```python", written.example, "```"] if written.example else []
    return "\n".join([*lines, *opened, ""])
