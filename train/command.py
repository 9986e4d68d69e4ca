"""The commands of stage two: train, export."""

from __future__ import annotations

from typing import Any

import typer

from .loss.registry import PARTNERS, TERMS
from .sae.registry import ACTIVATIONS, ARCHITECTURES


def train(
    store: str = typer.Option("", "--store", help="Activation store of one layer, such as cache/l12.zarr."),
    preset: str | None = typer.Option(
        None, "--preset", help="modern (the default) or paper (the TC-SAE paper, literally)."
    ),
    config: str | None = typer.Option(None, "--config", help="TOML file with any field; --show-config prints one."),
    architecture: str | None = typer.Option(None, "--architecture", help=f"One of {', '.join(ARCHITECTURES)}."),
    activation: str | None = typer.Option(None, "--activation", help=f"One of {', '.join(ACTIVATIONS)}."),
    width: str | None = typer.Option(None, "--width", help="Features; default 8 × d_model, rounded to a power of two."),
    k: int | None = typer.Option(None, "--k", help="Active features per token (topk, batchtopk)."),
    l1: float | None = typer.Option(None, "--l1", help="λ1, weight of Σ z (relu) or of L0 (jumprelu)."),
    temporal: str | None = typer.Option(None, "--temporal", help=f"none, or one of {', '.join(TERMS)}."),
    temporal_weight: float | None = typer.Option(None, "--temporal-weight", help="λ2."),
    temporal_partner: str | None = typer.Option(
        None, "--temporal-partner", help=f"Whom a token is compared with: one of {', '.join(PARTNERS)}."
    ),
    temporal_lag: int | None = typer.Option(None, "--temporal-lag", help="Distance for partner lag."),
    temporal_scope: float | None = typer.Option(
        None, "--temporal-scope", help="First fraction of the dictionary it sees."
    ),
    window: int | None = typer.Option(None, "--window", help="Consecutive tokens per window, T."),
    batch_size: str | None = typer.Option(None, "--batch-size", help="Tokens per step."),
    steps: str | None = typer.Option(None, "--steps", help="Optimiser steps."),
    tokens: str | None = typer.Option(None, "--tokens", help="Tokens to train on: 200k, 10M; default: the store once."),
    lr: float | None = typer.Option(None, "--lr", help="Peak learning rate."),
    warmup: int | None = typer.Option(None, "--warmup", help="Steps of learning-rate warm-up."),
    sweep: list[str] = typer.Option(
        [], "--sweep", help="KEY=V1,V2, repeatable: the grid trains on one pass over the store."
    ),
    baseline: bool | None = typer.Option(
        None, "--baseline/--no-baseline", help="Train the λ2 = 0 twin on the same stream."
    ),
    seed: int | None = typer.Option(None, "--seed", help="Of the initial weights."),
    data_seed: int | None = typer.Option(None, "--data-seed", help="Of the order of the windows."),
    out: str | None = typer.Option(None, "--out", help="Folder of the run folders."),
    name: str | None = typer.Option(None, "--name", help="Name of the run's folder."),
    resume: bool = typer.Option(True, "--resume/--fresh", help="Go on with runs that are there, or delete them first."),
    step: str | None = typer.Option(None, "--step", help="auto, fast (by hand) or autograd."),
    plugin: list[str] = typer.Option([], "--plugin", help="Python file that registers something; repeatable."),
    device: str | None = typer.Option(None, "--device", help="auto, cpu, cuda or cuda:1."),
    dtype: str | None = typer.Option(None, "--dtype", help="Of the products: auto, float32 or bfloat16."),
    log: list[str] = typer.Option([], "--log", help="jsonl (always written), tensorboard, wandb."),
    log_every: int | None = typer.Option(None, "--log-every", help="Steps between two lines of metrics."),
    checkpoint_every: int | None = typer.Option(None, "--checkpoint-every", help="Steps between two checkpoints."),
    show_config: bool = typer.Option(
        False, "--show-config", help="Print the resolved configuration as TOML and leave."
    ),
    json_output: bool = typer.Option(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Train a TC-SAE and its twin without the temporal term, on the same stream of windows.

    A run that was stopped goes on with the same command; finished runs are kept.

    Examples:
        pipeline train --store cache/l12.zarr

        pipeline train --store cache/l12.zarr --preset paper --steps 5000

        pipeline train --store cache/l12.zarr --sweep temporal-weight=0,0.01,0.03,0.1 --sweep seed=0,1,2

        pipeline train --show-config > my.toml

    """
    given = dict(locals())
    from ..console import summary
    from .plan import parse_sweep
    from .presets import build_config, show_toml

    chosen = build_config(preset, config, _changes(given))
    grid = parse_sweep(sweep)
    if show_config:
        print(show_toml(chosen), end="")
        return
    from .loop.distributed import speaks
    from .run import train as run

    done = run(chosen, sweep=grid, fresh=not resume)
    if not speaks():
        return
    title = "already trained" if len(done.skipped) == len(done.runs) else "trained"
    summary(title, done.facts(as_json=json_output), as_json=json_output)


def export(
    run: str = typer.Argument(..., help="Folder of a finished run."),
    format_name: str = typer.Option("saelens", "--format", help="saelens or dictionary-learning."),
    out: str | None = typer.Option(None, "--out", help="Folder to write; default RUN/FORMAT."),
    push_to_hub: str | None = typer.Option(
        None, "--push-to-hub", help="Upload to this Hugging Face repository, OWNER/NAME."
    ),
    json_output: bool = typer.Option(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Write a finished run in a format that other tools read, with a model card.

    A run folder itself opens with SAELens already; this makes a clean copy, or another format.

    Examples:
        pipeline export runs/l12-topk64-none-s0 --format dictionary-learning

        pipeline export runs/l12-topk64-none-s0 --push-to-hub me/my-sae

    """
    from ..console import summary
    from .formats.export import export as write

    folder = write(run, format_name, out, push_to_hub=push_to_hub)
    facts = {"folder": str(folder), "format": format_name, "uploaded_to": push_to_hub}
    summary("exported", {name: value for name, value in facts.items() if value}, as_json=json_output)


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as dotted fields of the configuration."""
    from .plan import OPTIONS, as_count

    fields = (
        (OPTIONS[name.replace("_", "-")], value) for name, value in given.items() if name.replace("_", "-") in OPTIONS
    )
    return {field: as_count(field, value) for field, value in fields if value not in (None, [], "")}


COMMANDS = [train, export]
