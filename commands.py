"""The commands about what is on disk: ls, inspect, verify, push, rm."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import format_bytes, note, summary, warn
from .errors import StoreError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from .cache.format.layout import RowBlock

_norms = partial(typer.Option, rich_help_panel="Norms of a store")
_again = partial(typer.Option, rich_help_panel="The model once more")
_removal = partial(typer.Option, rich_help_panel="What is removed")
_upload = partial(typer.Option, rich_help_panel="Where to")
_output = partial(typer.Option, rich_help_panel="Output")

Json = Annotated[bool, _output("--json", help="Print one line of JSON.")]


def ls(
    folders: Annotated[list[str] | None, typer.Argument(help="Folders to search; by default the present one.")] = None,
    kind: Annotated[str | None, _output("--kind", help="Only store, run, report, codes or references.")] = None,
    unfinished: Annotated[bool, _output("--unfinished", help="Only what is not finished, or damaged.")] = False,
    json_output: Json = False,
) -> None:
    """Stores, runs and reports: what they are, how large, finished or how to finish.

    Examples:
        pipeline ls

        pipeline ls runs --unfinished

    """
    from .on_disk import KINDS, entries

    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind {kind} is unknown: choose one of {', '.join(KINDS)}")
    found = [entry for entry in entries(folders or ["."]) if kind in (None, entry.kind)]
    found = [entry for entry in found if not (unfinished and entry.finished)]
    if json_output:
        print(json.dumps([entry.facts() for entry in found]))
        return
    for entry in found:
        print(f"{entry.kind:<10} {format_bytes(entry.n_bytes):>8}  {entry.path}\n{'':<21}{entry.state}")
    if not found:
        note("nothing of ours here: `pipeline extract` writes stores, `train` runs, `evaluate` reports")


def rm(
    paths: Annotated[list[str], typer.Argument(help="Folders of stores, runs or reports.")],
    yes: Annotated[bool, _removal("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, _removal("--force", help="Even what an unfinished run or a twin needs.")] = False,
    within: Annotated[
        list[str], _removal("--within", help="Where to look for what needs them; by default the present folder.")
    ] = [],  # noqa: B006 - typer's way of an empty list
    json_output: Json = False,
) -> None:
    """Remove stores, runs and reports; refuses what something else needs.

    Examples:
        pipeline rm runs/l12-topk64-none-s0

        pipeline rm cache/l12.zarr --yes

    """
    from .on_disk import removable, remove

    going = removable(paths, within or ["."], force=force)
    if not yes:
        for entry in going:
            print(f"{entry.kind} {entry.path}, {format_bytes(entry.n_bytes)}: {entry.state}", file=sys.stderr)
        if not sys.stdin.isatty():
            raise UsageError("nothing was removed, since nobody can be asked: say --yes")
        typer.confirm("Remove?", abort=True, err=True)
    for entry in going:
        remove(entry)
    facts = {"removed": len(going), "bytes": sum(entry.n_bytes for entry in going)}
    summary("removed", facts if json_output else facts | {"bytes": format_bytes(facts["bytes"])}, as_json=json_output)


def push(
    paths: Annotated[list[str], typer.Argument(help="Folders of finished stores.")],
    to: Annotated[str, _upload("--to", help="Hugging Face dataset repository, OWNER/NAME; made if it is not there.")],
    private: Annotated[bool, _upload("--private", help="Make the repository private, if it is made now.")] = False,
    json_output: Json = False,
) -> None:
    """Upload stores to a dataset repository on the Hugging Face hub, with a card; runs: `export --push-to-hub`.

    The same command goes on after an interruption: what is there is not sent again.

    Examples:
        pipeline push cache/l12.zarr --to me/gemma-activations --private

    """
    from .cache.push import push_stores
    from .cache.store import ActivationStore

    done = push_stores([ActivationStore.open(path) for path in paths], to, private=private)
    facts = {"page": done.page, "stores": list(done.stores), "bytes": done.n_bytes}
    readable = facts | {"stores": ", ".join(done.stores), "bytes": format_bytes(done.n_bytes)}
    summary("uploaded", facts if json_output else readable, as_json=json_output)


def inspect(
    path: Annotated[
        str, typer.Argument(help="A store of activations or of codes, a training run, a report, or a study's folder.")
    ],
    statistics: Annotated[
        bool | None,
        _norms("--statistics/--no-statistics", help="Compute norms that are not kept; by default below 4 GB."),
    ] = None,
    scheduler: Annotated[
        str | None,
        _norms(help="Compute them on the Dask cluster at this address, tcp://…, instead of threads here."),
    ] = None,
    picture: Annotated[
        Path | None, _norms(help="Also draw norms of a store into this file (.png, .svg, .pdf).")
    ] = None,
    json_output: Json = False,
) -> None:
    """What a store, a run, a report or a study is, and how much of it there is.

    Examples:
        pipeline inspect cache/l12.zarr

        pipeline inspect cache/l12.zarr --picture norms.png

        pipeline inspect s3://bucket/l12.zarr --scheduler tcp://host:8786

        pipeline inspect runs/l12-topk64-pairwise0.03-w5-s0 --json

    """
    documents = {"train.json": _run_facts, "results.json": _report_facts, "study.json": _study_facts}
    for name, describe in documents.items():
        document = Path(path) / name
        if document.is_file():
            summary(str(path), describe(document), as_json=json_output)
            return
    if (Path(path) / "values").is_dir() and (Path(path) / "zarr.json").is_file():
        summary(path, _codes_facts(path), as_json=json_output)
        return
    from .cache.describe import draw_norms, readable, store_facts
    from .cache.store import ActivationStore

    store = ActivationStore.open(path, allow_unfinished=True)
    wanted = True if scheduler and statistics is None else statistics
    facts = store_facts(store, statistics=wanted, scheduler=scheduler or "threads")
    if picture is not None:
        if not store.n_rows:
            raise StoreError(f"{path} holds no rows to draw: extract some first")
        draw_norms(store, picture)
        facts["picture"] = str(picture)
    summary(str(path), facts if json_output else readable(facts), as_json=json_output)


def _run_facts(document: Path) -> dict[str, Any]:
    from .train.run_folder.record import load_run

    record = load_run(document.parent).model_dump(mode="json")
    shown = (
        "name",
        "role",
        "twin",
        "layer",
        "store",
        "store_rows",
        "steps",
        "planned_steps",
        "tokens",
        "finished",
        "seed",
        "created",
    )
    facts = {name: record.get(name) for name in shown}
    return facts | {f"metric_{name}": value for name, value in (record.get("metrics") or {}).items()}


def _report_facts(document: Path) -> dict[str, Any]:
    from .evaluate.results import read_results

    record = read_results(document).model_dump(mode="json", exclude={"checksum"})
    facts: dict[str, Any] = {"report": str(document.parent)}
    for name, value in record.items():
        if isinstance(value, list | dict):
            facts[name] = f"{len(value)} entries"
        else:
            facts[name] = value
    page = document.parent / "index.html"
    return facts | {"page": str(page)} if page.is_file() else facts


def _study_facts(document: Path) -> dict[str, Any]:
    from .study.state import ANALYSIS, read_state

    folder = document.parent
    state = read_state(folder)
    if state is None:
        raise UsageError(f"{folder} has no study.json that can be read: name a study's folder")
    done = [name for name, stage in state.stages.items() if stage.done]
    facts: dict[str, Any] = {"study": state.name, "scale": state.scale, "file": state.file, "version": state.version}
    facts |= {"stages_done": f"{len(done)} of {len(state.stages)} begun", "seconds": round(state.seconds)}
    facts |= {f"failed_{name}": stage.failure for name, stage in state.stages.items() if stage.failure}
    for name, file in (("analysis", ANALYSIS), ("page", "index.html")):
        if (folder / file).is_file():
            facts[name] = str(folder / file)
    return facts


def _codes_facts(path: str) -> dict[str, Any]:
    from .evaluate.codes.format import read_manifest
    from .evaluate.codes.store import CodeStore

    manifest = read_manifest(path)
    evaluated = manifest.kept_by == "evaluate"
    facts: dict[str, Any] = {
        "codes_of": manifest.run,
        "layer": str(manifest.location),
        **({"evaluated_on": manifest.of_store.text.dataset} if evaluated else {"store": manifest.store}),
        "features": manifest.n_features,
        "rows": manifest.planned_rows,
        "context": manifest.context,
        "rows_trained_on": manifest.trained_rows,
        "weights": manifest.weights,
        "finished": manifest.finished,
    }
    if manifest.finished:
        codes = CodeStore.open(path)
        tokens = codes.n_rows * codes.context
        facts |= {"entries": codes.n_entries, "entries_per_token": round(codes.n_entries / max(tokens, 1), 3)}
    return facts


def verify(
    store: Annotated[str, typer.Argument(help="The store: a folder or URL.")],
    model: Annotated[
        str | None, _again(help="Also run this model (hub id, folder, or demo) on sampled rows and compare.")
    ] = None,
    gguf_file: Annotated[str | None, _again(help="The GGUF file inside --model; by default the recorded one.")] = None,
    revision: Annotated[str | None, _again(help="The revision of --model; by default the recorded one.")] = None,
    sample: Annotated[int, _again(help="Rows to run again.", min=1)] = 64,
    seed: Annotated[int, _again(help="Which rows.")] = 0,
    json_output: Json = False,
) -> None:
    """Check every committed byte of a store; with --model also that its rows are what the model produces.

    Exit status 1 if anything is wrong; each finding is printed with its file.

    Examples:
        pipeline verify cache/l12.zarr

        pipeline verify cache/l12.zarr --model google/gemma-2-2b --sample 256

    """
    from .cache.verify import verify as run

    recompute = _recompute(store, model, gguf_file, revision) if model else None
    seen = run(store, recompute=recompute, sample=sample, seed=seed)
    facts: dict[str, Any] = {
        "rows": seen.rows,
        "files": seen.files,
        "bytes": seen.bytes,
        "findings": len(seen.findings),
    }
    if recompute and seen.rows_recomputed:
        facts |= {
            "rows_recomputed": seen.rows_recomputed,
            "rows_identical": seen.rows_identical,
            "worst_relative_difference": seen.worst_difference,
        }
    if json_output:
        facts["problems"] = [{"file": found.file, "problem": found.problem} for found in seen.findings]
    else:
        facts |= {found.file: found.problem for found in seen.findings}
    summary(f"{store}: {'sound' if seen.ok else 'NOT sound'}", facts, as_json=json_output)
    if not seen.ok:
        first = seen.findings[0]
        count = f"{len(seen.findings)} findings; {first.file} {first.problem}"
        raise StoreError(f"{store} is not sound ({count}): restore what is named, or extract anew with --fresh")


def _recompute(store: str, model: str, gguf_file: str | None, revision: str | None) -> Any:
    """The extraction's own forward pass for the store's layer: recorded dtype, threads and, if it is here, device."""
    import torch

    from .cache.format.manifest import Execution, identity_difference, read_manifest
    from .extract.config import ModelSource
    from .extract.model.forward import ForwardPass
    from .extract.model.hooks import deepest_block
    from .extract.model.load import load_language_model

    manifest = read_manifest(store)
    recorded = manifest.model
    if not manifest.of_language_model:
        raise UsageError(
            f"{store} holds imported vectors of {recorded.id}: no language model made them, leave --model out"
        )
    if model == recorded.id:
        revision, gguf_file = revision or recorded.revision, gguf_file or recorded.gguf_file
    device = manifest.execution.device
    if device == "cuda" and not torch.cuda.is_available():
        there = manifest.execution.device_name
        warn(f"{store} was computed on {there}, which this machine lacks: rows differ in their last bits")
        device = "cpu"
    known = {"gguf_file": gguf_file, "load_in": recorded.load_in}
    source = ModelSource(model, revision, device=device, dtype=recorded.dtype, **known)
    at = manifest.location
    lm = load_language_model(source, deepest_layer=deepest_block([at]))
    difference = identity_difference(recorded, lm.identity, leave_out=("id", "revision", "gguf_file"))
    if difference:
        raise StoreError(f"{store} was made with another model than {model} ({difference}): name the recorded one")

    def recompute(block: RowBlock, execution: Execution) -> np.ndarray:
        torch.set_num_threads(execution.threads)
        passes = ForwardPass(lm, (at,), execution.batch_size)
        return passes.launch(block).result()[at]

    return recompute


COMMANDS = [ls, inspect, verify, push, rm]
