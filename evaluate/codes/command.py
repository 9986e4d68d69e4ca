"""The command ``encode``."""

from __future__ import annotations

from functools import partial

import typer

_main = partial(typer.Option, rich_help_panel="What to encode")
_output = partial(typer.Option, rich_help_panel="Output")


def encode(
    run: str = typer.Argument(..., help="Folder of a finished run."),
    store: str | None = _main(None, "--store", help="Activation store. Default: the one the run was trained on."),
    rows: str = _main("all", "--rows", help="all, or unseen: only rows behind those the run was trained on."),
    tokens: str | None = _main(None, "--tokens", help="No more than so many: 200k, 10M. Default: all."),
    part: str = _main("all", "--part", help="all, or sparse: of tfa's codes only the novel part, which is sparse."),
    device: str = _main("auto", "--device", help="auto, cuda, cuda:1, cpu."),
    plugin: list[str] = _main([], "--plugin", help="Python file that the run was trained with; repeatable."),
    out: str | None = _output(None, "--out", help="Folder or URL of the codes. Default: RUN/codes.zarr."),
    dry_run: bool = _output(False, "--dry-run", help="Print rows, bytes and time, and write nothing."),
    resume: bool = _output(True, "--resume/--fresh", help="Go on with codes that are there, or begin anew."),
    json_output: bool = _output(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Write the sparse codes of an SAE over a store of activations, as a Zarr group that `pipeline features` reads.

    The language model is not needed. The same command goes on with what was stopped.

    Examples:
        pipeline encode runs/l12-topk64-none-s0 --dry-run

        pipeline encode runs/l12-topk64-none-s0 --tokens 1M

    """
    from ...console import summary
    from .encode import encode_config, encode_run, estimate_encoding

    config = encode_config(
        run,
        store=store,
        rows=rows,  # pyright: ignore[reportArgumentType] - the configuration checks it
        tokens=tokens,
        part=part,  # pyright: ignore[reportArgumentType]
        out=out,
        device=device,
        plugin=list(plugin),
        fresh=not resume,
    )
    if dry_run:
        estimate = estimate_encoding(config)
        summary("planned, nothing written", estimate.facts(as_json=json_output), as_json=json_output)
        return
    done = encode_run(config)
    title = "already complete" if done.already_complete else "encoded"
    summary(title, done.facts(as_json=json_output), as_json=json_output)


COMMANDS = [encode]
