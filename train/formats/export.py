"""Finished runs for others: a folder in their format, with a model card, on disk or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from ...atomic_files import write_file
from ...errors import RunError
from ..run_folder.record import RunRecord, load_run
from .locate import read_sae
from .registry import FORMATS, writable_format


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
        RunError: no such run, it is not finished, or the hub refuses.
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
    FORMATS.get(format_name).write(read_sae(run)[1], folder)
    write_file(folder / "README.md", model_card(record, format_name))
    if push_to_hub:
        _upload(folder, push_to_hub)
    return folder


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
    shown = ("explained_variance", "l0", "dead_share", "temporal_variation")
    measured = {name.replace("_", " "): record.metrics.get(name) for name in shown}
    written = FORMATS.get(format_name)
    lines = ["---", *([f"library_name: {written.library}"] if written.library else [])]
    lines += ["tags: [sparse-autoencoder, temporal-consistency]", f"base_model: {model['id']}", "---"]
    lines += ["", f"# {record.name}", ""]
    lines += [
        "A sparse autoencoder trained with tcsae. It takes and gives raw activations; special tokens were left out.",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
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
