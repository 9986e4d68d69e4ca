"""The command ``import``."""

from __future__ import annotations

from functools import partial

import typer

from .config import ImportConfig

_main = partial(typer.Option, rich_help_panel="What to import")
_cut = partial(typer.Option, rich_help_panel="Sequences and rows")
_names = partial(typer.Option, rich_help_panel="Names")
_output = partial(typer.Option, rich_help_panel="Output")


def import_(
    array: str = typer.Argument(..., help="[row, position, d] or [n, d]: npy, npz, zarr, safetensors or parquet."),
    key: str | None = _main(None, "--key", help="Array or column of the file. Default: vectors, or the only one."),
    tokens: str | None = _main(
        None, "--tokens", help="What each position is of, whole numbers: an array of the same file, or a file."
    ),
    token_text: str | None = _main(None, "--token-text", help="Text of token 0, 1, 2 …: a .json list, or an array."),
    labels: str | None = _main(
        None, "--labels", help="Label of each sequence, which probes look for: a .json list, or an array."
    ),
    lengths: str | None = _cut(
        None, "--lengths", help="Positions of each sequence: an array of the same file, or a file. Default: see below."
    ),
    context: int | None = _cut(None, "--context", help="Positions per row of the store. Default: the array's, or 128."),
    held_out: float = _cut(
        ImportConfig.held_out, "--held-out", help="Share of the sequences that is kept for evaluation."
    ),
    seed: int = _cut(ImportConfig.seed, "--seed", help="Decides which sequences are held out."),
    name: str | None = _names(None, "--name", help="What the vectors are of. Default: the file's name."),
    layer: int = _names(ImportConfig.layer, "--layer", help="The layer they come from."),
    site: str | None = _names(None, "--site", help="What they are there: hidden, conv2 … Default: as --name."),
    out: str | None = _output(None, "--out", help="The store. Default: cache/NAME.zarr."),
    dry_run: bool = _output(False, "--dry-run", help="Print rows and bytes, and write nothing."),
    resume: bool = _output(True, "--resume/--fresh", help="Continue existing stores, or delete them first."),
    compression: str = _output(ImportConfig.compression, "--compression", help="none, lz4 or zstd."),
    shard_bytes: str = _output(
        "256M", "--shard-bytes", help="Approximate size of a shard, which is committed as a whole."
    ),
    json_output: bool = _output(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Make a store of vectors that no language model produced: hidden states of any network, measurements, embeddings.

    Without --lengths every row of [row, position, d] is a sequence, and [n, d] is one. Sequences are cut into rows of
    --context positions. Some sequences (of a single one its end) go into NAME.held-out.zarr, which evaluation reads.
    The same command continues an import that was stopped.

    Examples:
        pipeline import hidden.npy

        pipeline import states.npz --key h --tokens characters --labels speaker --site hidden

        pipeline import embeddings.parquet --lengths lengths.json --context 64 --dry-run

    """
    from ...console import summary
    from .config import import_config

    config = import_config(
        array=array,
        key=key,
        tokens=tokens,
        token_text=token_text,
        labels=labels,
        lengths=lengths,
        context=context,
        held_out=held_out,
        seed=seed,
        name=name,
        layer=layer,
        site=site,
        out=out,
        compression=compression,  # pyright: ignore[reportArgumentType] - the layout checks it
        shard_bytes=shard_bytes,
        fresh=not resume,
    )
    if dry_run:
        from .plan import make_plan

        summary("planned, nothing written", make_plan(config).facts(as_json=json_output), as_json=json_output)
        return
    from .run import import_array

    done = import_array(config)
    title = "already complete" if done.already_complete else "imported"
    summary(title, done.facts(as_json=json_output), as_json=json_output)


COMMANDS = [import_]
