"""The command of stage one."""

from __future__ import annotations

import typer


def extract(
    layers: list[int] = typer.Option(
        ..., "--layers", help="Layers whose output is stored, from 0: 5 12 19 or 5,12,19."
    ),
    model: str = typer.Option("google/gemma-2-2b", "--model", help="Hub id, folder, .gguf file, or 'demo'."),
    revision: str | None = typer.Option(None, "--revision", help="Branch, tag or commit of the model on the hub."),
    gguf_file: str | None = typer.Option(None, "--gguf-file", help="A GGUF file inside the folder or repository."),
    dataset: str = typer.Option(
        "Skylion007/openwebtext", "--dataset", help="Hub id (or id:subset), text files or a folder of them, or 'demo'."
    ),
    dataset_revision: str | None = typer.Option(
        None, "--dataset-revision", help="Branch, tag or commit of the dataset."
    ),
    split: str = typer.Option("train", "--split", help="Split of a hub dataset."),
    text_column: str = typer.Option("text", "--text-column", help="Column that holds the text (not for .txt files)."),
    tokens: str = typer.Option(
        "10M", "--tokens", help="Tokens per layer: 200k, 10M, 1B. More than is stored extends it."
    ),
    context: int = typer.Option(128, "--context", help="Tokens per row, BOS included."),
    packing: str = typer.Option(
        "document", "--packing", help="document: rows never mix documents; concat: they are joined."
    ),
    held_out: float = typer.Option(
        0.01, "--held-out", help="Share of documents kept for evaluation and never extracted."
    ),
    seed: int = typer.Option(0, "--seed", help="Orders the documents."),
    batch_size: str = typer.Option("auto", "--batch-size", help="Rows per forward pass, or auto."),
    device: str = typer.Option("auto", "--device", help="auto, cuda, cuda:1, cpu."),
    dtype: str = typer.Option("auto", "--dtype", help="Arithmetic: auto, bfloat16 or float32. Stores are bfloat16."),
    out: str = typer.Option("cache", "--out", help="Folder or URL (s3://…) that gets lL.zarr for every layer L."),
    compression: str = typer.Option(
        "none", "--compression", help="none, lz4 or zstd: up to 30 % smaller, slower to read."
    ),
    shard_bytes: str = typer.Option("256M", "--shard-bytes", help="About how much is committed at a time."),
    workers: int | None = typer.Option(None, "--workers", help="Run on a local Dask cluster of so many processes."),
    scheduler: str | None = typer.Option(None, "--scheduler", help="Run on the Dask cluster at this address, tcp://…"),
    resume: bool = typer.Option(
        True, "--resume/--fresh", help="Go on with stores that are there, or delete them first."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print rows, bytes, disk and time, and write nothing."),
    json_output: bool = typer.Option(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Store a language model's residual stream: one forward pass over the text fills a store per layer.

    A run that was stopped goes on with the same command; a finished store grows with a larger --tokens.

    Examples:
        pipeline extract --layers 5 12 19

        pipeline extract --model HuggingFaceTB/SmolLM2-135M --dataset my/texts --layers 8 --tokens 1M

        pipeline extract --model demo --dataset demo --layers 4 8 --tokens 200k --dry-run

    """
    from ..console import parse_count, summary
    from ..errors import UsageError
    from .config import ExtractConfig, ModelSource, TextSource

    if batch_size != "auto" and not batch_size.isdigit():
        raise UsageError(f"--batch-size {batch_size} must be a number, or auto")
    config = ExtractConfig(
        layers=tuple(layers),
        model=ModelSource(model, revision, gguf_file, device, dtype),
        text=TextSource(dataset, dataset_revision, split, text_column, packing, context, seed, held_out),  # type: ignore[arg-type]
        tokens=parse_count(tokens),
        batch_size=None if batch_size == "auto" else int(batch_size),
        out=out,
        compression=compression,  # type: ignore[arg-type]
        shard_bytes=parse_count(shard_bytes),
        fresh=not resume,
        workers=workers,
        scheduler=scheduler,
    )
    if dry_run:
        from .plan import estimate

        summary("planned, nothing written", estimate(config).facts(as_json=json_output), as_json=json_output)
        return
    from .run import extract as run

    done = run(config)
    title = "already complete" if done.already_complete else "extracted"
    summary(title, done.facts(as_json=json_output), as_json=json_output)


COMMANDS = [extract]
