"""Finished runs for others: a folder in their format, with a model card, on disk or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...cache.public_names import hub_name
from ...cache.storage.hub import upload
from ...errors import RunError, UsageError
from ...sites import location_of, site_of
from ...system.atomic_files import PARTIAL, plain_errors, remove_partials, write_file
from ...system.untrusted_files import markdown, read_bytes, reason, shown
from ..run_folder.record import RunRecord, load_run
from .locate import OWN_MODEL, read_sae
from .model_card import CARD, model_card
from .registry import FORMATS, writable_format

_LOADER = ("model_class_name", "model_from_pretrained_kwargs")


def export(
    run: str | Path,
    format_name: str,
    out: str | Path | None = None,
    *,
    base_model: str | None = None,
    module: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Write a finished run in another format, with a model card, and upload it if a hub repository is named.

    Args:
        run: the run's folder.
        format_name: of a registered format that can be written, such as saelens or dictionary-learning.
        out: where to; by default ``RUN/FORMAT``.
        base_model: the language model's name on the hub, where the store was made with one from a local folder.
        module: path of the module whose output the SAE reads, ``model.layers.12``; the files then name it, and
            transformers as what loads the model. By default they have TransformerLens' name of the place.
        push_to_hub: repository such as ``name/my-sae``, made if it is not there.
        private: whether a repository that is made now can be seen by its owner alone.

    Returns:
        The folder written.

    Raises:
        RunError: no such run, it is not finished, the folder holds anything but an earlier export of it, or the hub
            refuses.
        UsageError: an unknown format, or one that is only read; a module of another layer or hook point.
        ResourceError: the disk is full.

    """
    format_name = writable_format(format_name)
    record = load_run(run)
    if not record.finished:
        raise RunError(
            f"{run} stopped at step {record.steps} of {record.planned_steps}: finish it with the same train command"
        )
    if base_model is not None and (hub_name(base_model) != base_model or base_model.count("/") != 1):
        raise UsageError(f"--base-model {shown(base_model)} is no name of a model on the hub: write OWNER/NAME")
    folder = Path(out) if out else Path(run) / format_name
    try:
        card = model_card(record, format_name, base_model)
        place = _place(record, base_model, module, stays_here=push_to_hub is None)
    except (AttributeError, KeyError, TypeError, ValueError) as failure:
        what = f"the record of {run} lacks or garbles what a model card says ({reason(failure)})"
        raise RunError(f"{what}: train the run again") from failure
    _refuse_foreign(folder, record, format_name)
    sae = read_sae(run)[1]
    sae.metadata = {name: value for name, value in sae.metadata.items() if name not in _LOADER} | place
    write_file(folder / CARD, card)  # first: it says whose folder this is
    FORMATS.get(format_name).write(sae, folder)
    remove_partials(folder)
    if push_to_hub:
        upload(folder, push_to_hub, "model", private=private, failure=RunError)
    return folder


def _place(record: RunRecord, base_model: str | None, module: str | None, *, stays_here: bool) -> dict[str, Any]:
    """The metadata that says where an SAE belongs; runs of earlier versions have the model by its own name alone."""
    own = record.store_manifest["model"]["id"]
    public = base_model or hub_name(own) or (own if stays_here else Path(own).name)  # a folder is nobody's business
    named: dict[str, Any] = {"model_name": public}
    if hub_name(own) not in (None, own) and not base_model:
        named[OWN_MODEL] = own
    text = record.store_manifest["text"]["dataset"]
    if not stays_here and Path(text).is_absolute():
        named["dataset_path"] = Path(text).name
    if module is None:
        return named
    there = location_of(record.store_manifest["hook_name"])
    try:
        found = site_of({"hook_name": module})
    except RunError as unknown:
        raise UsageError(
            f"--module {shown(module)} is no module of a block: write model.layers.{there.layer}"
        ) from unknown
    if found != there:
        raise UsageError(f"--module {shown(module)} is layer {found}, the run is of layer {there}: name its module")
    return named | {"hook_name": module}


def _refuse_foreign(folder: Path, record: RunRecord, format_name: str) -> None:
    """Only an earlier export of the same run is overwritten.

    Raises:
        RunError: the folder holds something else.

    """
    with plain_errors(f"look into {folder}"):
        whole = [file for file in sorted(folder.iterdir()) if file.suffix != PARTIAL] if folder.exists() else []
    if not whole:  # nothing, or what a process left that was killed before it had written its first file
        return
    ours = {CARD, *FORMATS.get(format_name).files}
    other = next((file.name for file in whole if file.name not in ours), None)
    if other is None and (folder / CARD).exists():
        head = read_bytes(folder / CARD, most=1 << 20).decode(errors="replace")
        if f"\n# {markdown(record.name)}\n" in head:
            return
        other = f"the model card of another SAE, {CARD}"
    what = f"{folder} holds {'other files' if other is None else shown(other)} and is not overwritten"
    raise RunError(f"{what}: name another folder with --out, or remove it")
