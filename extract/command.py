"""The command ``extract``."""

from __future__ import annotations

from functools import partial

import typer

from .config import ExtractConfig, ModelSource, TextSource

_main = partial(typer.Option, rich_help_panel="What to extract")
_model = partial(typer.Option, rich_help_panel="Model")
_text = partial(typer.Option, rich_help_panel="Text")
_cluster = partial(typer.Option, rich_help_panel="Many machines")
_output = partial(typer.Option, rich_help_panel="Output")


def extract(
    layers: list[int] = _main(..., "--layers", help="Layers whose activations are stored: 5 12 19 or 5,12,19."),
    site: list[str] = _main(
        list(ExtractConfig.sites),
        "--site",
        help="Hook points of each layer: resid_post, resid_pre, resid_mid, mlp_out, attn_out, or one of a plug-in.",
    ),
    model: str = _main(ModelSource.id, "--model", help="Hub id, folder, .gguf file, 'demo' or 'demo-gemma3'."),
    dataset: str = _main(
        TextSource.dataset, "--dataset", help="Hub id (or id:subset), text files or a folder of them, or 'demo'."
    ),
    tokens: str = _main(
        "10M", "--tokens", help="Tokens per layer: 200k, 10M, 1B. A store that holds fewer is extended."
    ),
    context: int = _text(TextSource.context, "--context", help="Tokens per row, BOS included."),
    packing: str = _text(
        TextSource.packing, "--packing", help="document: no row mixes documents; concat: documents are joined."
    ),
    held_out: float = _text(
        TextSource.held_out, "--held-out", help="Share of documents kept for evaluation and never extracted."
    ),
    seed: int = _text(TextSource.seed, "--seed", help="Decides the order of the documents."),
    split: str = _text(TextSource.split, "--split", help="Split of the dataset, on the hub or in a folder."),
    text_column: str = _text(
        TextSource.text_column, "--text-column", help="Column that holds the text (not for .txt files)."
    ),
    label_column: str | None = _text(
        None, "--label-column", help="Column with each document's label (.txt files: FOLDER/LABEL/*.txt)."
    ),
    chat_template: bool = _text(
        TextSource.chat_template,
        "--chat-template",
        help="Rows hold messages: put them into words by the model's template, and flag whose each token is.",
    ),
    dataset_revision: str | None = _text(
        None, "--dataset-revision", help="Branch, tag or commit of the dataset on the hub."
    ),
    revision: str | None = _model(None, "--revision", help="Branch, tag or commit of the model on the hub."),
    gguf_file: str | None = _model(None, "--gguf-file", help="A GGUF file inside the folder or repository."),
    device: str = _model(ModelSource.device, "--device", help="auto, cuda, cuda:1, cpu."),
    dtype: str = _model(
        ModelSource.dtype, "--dtype", help="Arithmetic: auto, bfloat16 or float32. Stores are bfloat16."
    ),
    device_map: str = _model(
        ModelSource.device_map,
        "--device-map",
        help="auto: spread a model larger than one GPU over all, CPU and disk; or a JSON file of module → device.",
    ),
    load_in: str = _model(ModelSource.load_in, "--load-in", help="8bit or 4bit: quantised weights (bitsandbytes)."),
    batch_size: str = _model("auto", "--batch-size", help="Rows per forward pass, or auto."),
    plugin: list[str] = _model([], "--plugin", help="Python file that registers a hook point; repeatable."),
    out: str = _output(
        ExtractConfig.out, "--out", help="Folder or URL (s3://…) that gets lL.zarr for layer L (lL.SITE.zarr)."
    ),
    dry_run: bool = _output(False, "--dry-run", help="Print rows, bytes, disk and time, and write nothing."),
    resume: bool = _output(True, "--resume/--fresh", help="Continue existing stores, or delete them first."),
    compression: str = _output(
        ExtractConfig.compression, "--compression", help="none, lz4 or zstd: up to 30 % smaller, slower to read."
    ),
    shard_bytes: str = _output(
        "256M", "--shard-bytes", help="Approximate size of a shard, which is committed as a whole."
    ),
    json_output: bool = _output(False, "--json", help="Print the summary as one line of JSON."),
    workers: int | None = _cluster(
        None, "--workers", help="Run on a local Dask cluster with this number of processes."
    ),
    scheduler: str | None = _cluster(None, "--scheduler", help="Run on the Dask cluster at this address, tcp://…"),
) -> None:
    """Store a language model's activations: one forward pass over the text fills a store per layer and site.

    The same command continues a run that was stopped. A larger --tokens extends a finished store.

    Examples:
        pipeline extract --layers 5 12 19

        pipeline extract --model HuggingFaceTB/SmolLM2-135M --dataset my/texts --layers 8 --tokens 1M

        pipeline extract --layers 5 12 19 --site resid_post mlp_out

        pipeline extract --model demo --dataset demo --layers 4 8 --tokens 200k --dry-run

    """
    from ..console import summary
    from .config import extract_config

    config = extract_config(
        layers=layers,
        site=site,
        plugin=plugin,
        model=model,
        dataset=dataset,
        tokens=tokens,
        context=context,
        packing=packing,  # pyright: ignore[reportArgumentType] - the configuration checks it
        held_out=held_out,
        seed=seed,
        split=split,
        text_column=text_column,
        label_column=label_column,
        chat_template=chat_template,
        dataset_revision=dataset_revision,
        revision=revision,
        gguf_file=gguf_file,
        device=device,
        dtype=dtype,
        device_map=device_map,
        load_in=load_in,  # pyright: ignore[reportArgumentType] - the configuration checks it
        batch_size=batch_size,
        out=out,
        compression=compression,  # pyright: ignore[reportArgumentType]
        shard_bytes=shard_bytes,
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
