"""Finished runs for others: a folder in their format, with a model card, on disk or on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ...errors import RunError
from ...system.atomic_files import PARTIAL, plain_errors, remove_partials, write_file
from ...system.untrusted_files import read_bytes, reason, shown
from ..run_folder.record import RunRecord, load_run
from .locate import read_sae
from .registry import FORMATS, writable_format

CARD = "README.md"


def export(run: str | Path, format_name: str, out: str | Path | None = None, *, push_to_hub: str | None = None) -> Path:
    """Write a finished run in another format, with a model card, and upload it if a hub repository is named.

    Args:
        run: the run's folder.
        format_name: of a registered format that can be written, such as saelens or dictionary-learning.
        out: where to; by default ``RUN/FORMAT``.
        push_to_hub: repository such as ``name/my-sae``, made if it is not there.

    Returns:
        The folder written.

    Raises:
        RunError: no such run, it is not finished, the folder holds anything but an earlier export of it, or the hub
            refuses.
        UsageError: an unknown format, or one that is only read.
        ResourceError: the disk is full.

    """
    format_name = writable_format(format_name)
    record = load_run(run)
    if not record.finished:
        raise RunError(
            f"{run} stopped at step {record.steps} of {record.planned_steps}: finish it with the same train command"
        )
    folder = Path(out) if out else Path(run) / format_name
    try:
        card = model_card(record, format_name)
    except (AttributeError, KeyError, TypeError, ValueError) as failure:
        what = f"the record of {run} lacks or garbles what a model card says ({reason(failure)})"
        raise RunError(f"{what}: train the run again") from failure
    _refuse_foreign(folder, record, format_name)
    sae = read_sae(run)[1]
    write_file(folder / CARD, card)  # first: it says whose folder this is
    FORMATS.get(format_name).write(sae, folder)
    remove_partials(folder)
    if push_to_hub:
        _upload(folder, push_to_hub)
    return folder


def _refuse_foreign(folder: Path, record: RunRecord, format_name: str) -> None:
    """Only an earlier export of the same run is overwritten.

    Raises:
        RunError: the folder holds something else.

    """
    with plain_errors(f"look into {folder}"):
        there = sorted(folder.iterdir()) if folder.exists() else []
    if not there:
        return
    ours = {CARD, *FORMATS.get(format_name).files}
    other = next((file.name for file in there if file.name not in ours and not file.name.endswith(PARTIAL)), None)
    if other is None and (folder / CARD).exists():
        head = read_bytes(folder / CARD, most=1 << 20).decode(errors="replace")
        if f"\n# {_quoted(record.name)}\n" in head:
            return
        other = f"the model card of another SAE, {CARD}"
    what = f"{folder} holds {'other files' if other is None else shown(other)} and is not overwritten"
    raise RunError(f"{what}: name another folder with --out, or remove it")


def _quoted(words: object) -> str:
    """Words from elsewhere on one line of Markdown, so that they are shown and not understood."""
    return re.sub(r"([\\`*\[\]<>#!|~$&])", r"\\\1", shown(words, 300))


def model_card(record: RunRecord, format_name: str) -> str:
    """What a stranger needs to know of a run, as the hub's README."""
    model, text = record.store_manifest["model"], record.store_manifest["text"]
    sae, temporal = record.config["sae"], record.config["temporal"]
    sparsity = f" (k = {sae['k']})" if sae["activation"] in ("topk", "batchtopk") else ""
    term = (
        "none"
        if temporal["form"] == "none"
        else f"{temporal['form']}, λ2 = {temporal['weight']:g}, {temporal['partner']}"
    )
    rows = {
        "language model": model["id"] + (f", revision {model['revision']}" if model["revision"] else ""),
        "activations": f"{record.store_manifest['hook_name']}, width {record.store_manifest['d_model']}",
        "text": f"{text['dataset']}, rows of {text['context']} tokens",
        "tokens": f"{record.tokens:,}",
        "activation": sae["activation"] + sparsity,
        "features": f"{sae['width']:,}",
        "temporal term": f"{term} (windows of {record.config['data']['window']})",
        "seed": str(record.seed),
    }
    last = ("explained_variance", "l0", "dead_share", "temporal_variation")
    measured = {name.replace("_", " "): record.metrics.get(name) for name in last}
    written = FORMATS.get(format_name)
    lines = ["---", *([f"library_name: {written.library}"] if written.library else [])]
    lines += ["tags: [sparse-autoencoder, temporal-consistency]", f"base_model: {json.dumps(model['id'])}", "---"]
    lines += ["", f"# {_quoted(record.name)}", ""]
    lines += [
        "A sparse autoencoder trained with tcsae. It takes and gives raw activations; special tokens were left out.",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_quoted(value)} |" for name, value in rows.items()), ""]
    lines += ["On the last logged batch of its training stream (not on held-out text):", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in measured.items() if value is not None]
    opened = ["", "```python", written.example, "```"] if written.example else []
    return "\n".join([*lines, *opened, ""])


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except LocalTokenNotFoundError:
        raise RunError(
            f"no Hugging Face token: run 'hf auth login' or set HF_TOKEN to upload to {repository}"
        ) from None
    except HFValidationError as failure:
        raise RunError(f"'{repository}' is no name of a hub repository: write OWNER/NAME") from failure
    except (HfHubHTTPError, OSError) as failure:
        sentence = str(failure).strip().splitlines()
        what = sentence[0] if sentence else type(failure).__name__
        refusal = f"the hub refuses {repository} ({what}); {folder} is complete"
        raise RunError(f"{refusal}: check the token and its rights") from failure
