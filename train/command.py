"""The commands of stage two: train, export."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import typer

from .loss.registry import PARTNERS, TERMS
from .sae.registry import ACTIVATIONS, ARCHITECTURES

if TYPE_CHECKING:
    from .options import TrainOptions

_main = partial(typer.Option, rich_help_panel="What to train")
_sparsity = partial(typer.Option, rich_help_panel="Sparsity")
_temporal = partial(typer.Option, rich_help_panel="Temporal term")
_optimiser = partial(typer.Option, rich_help_panel="Optimiser")
_data = partial(typer.Option, rich_help_panel="Data")
_output = partial(typer.Option, rich_help_panel="Output")


def train(
    store: str | None = _main(None, "--store", help="Activation store of one layer, such as cache/l12.zarr."),
    sweep: list[str] = _main([], "--sweep", help="KEY=V1,V2, repeatable: the grid trains on one pass over the store."),
    rivals: bool = _main(
        False, "--rivals", help="Plain, TC-SAE, T-SAE, TFA and a crosscoder, of one width and k, on one pass."
    ),
    extend: list[str] = _main(
        [], "--extend", help="Finished run (or folder of runs) that goes on for --steps or --tokens more; repeatable."
    ),
    width: str | None = _main(None, "--width", help="Features; auto: 8 × d_model, rounded to a power of two."),
    preset: str | None = _main(
        None,
        "--preset",
        help="modern (the default), or as published: paper (TC-SAE), tsae (Temporal SAE), tfa.",
    ),
    config: str | None = _main(None, "--config", help="TOML file with any field; --show-config prints one."),
    baseline: bool | None = _main(
        None, "--baseline/--no-baseline", help="Train the λ2 = 0 twin on the same stream; done unless you say no."
    ),
    init_from: str | None = _main(
        None, "--init-from", help="Begin with the weights of this SAE: a run, or any format that evaluate reads."
    ),
    plugin: list[str] = _main([], "--plugin", help="Python file that registers something; repeatable."),
    seed: int | None = _main(None, "--seed", help="Of the initial weights."),
    architecture: str | None = _sparsity(None, "--architecture", help=f"One of {', '.join(ARCHITECTURES)}."),
    activation: str | None = _sparsity(None, "--activation", help=f"One of {', '.join(ACTIVATIONS)}."),
    k: int | None = _sparsity(None, "--k", help="Active features per token (topk, batchtopk)."),
    groups: str | None = _sparsity(
        None, "--groups", help="Nested groups (Matryoshka), fractions of the dictionary rising to 1: 0.2,1."
    ),
    l1: float | None = _sparsity(None, "--l1", help="λ1, weight of Σ z (relu) or of L0 (jumprelu)."),
    target_l0: float | None = _sparsity(
        None, "--target-l0", help="Active features per token to end at (relu, jumprelu, gated); λ1 follows."
    ),
    temporal: str | None = _temporal(None, "--temporal", help=f"none, or one of {', '.join(TERMS)}."),
    temporal_weight: str | None = _temporal(
        None, "--temporal-weight", help="λ2; or that of the store's layer: 5=0.1,12=0.03."
    ),
    temporal_partner: str | None = _temporal(
        None, "--temporal-partner", help=f"Whom a token is compared with: one of {', '.join(PARTNERS)}."
    ),
    temporal_lag: int | None = _temporal(None, "--temporal-lag", help="Distance for partner lag."),
    temporal_scope: float | None = _temporal(
        None, "--temporal-scope", help="First fraction of the dictionary it sees."
    ),
    temporal_per_feature: str | None = _temporal(
        None, "--temporal-per-feature", help="λ2 by each feature's own: none, autocorrelation or density."
    ),
    steps: str | None = _optimiser(None, "--steps", help="Optimiser steps; auto: as many as --tokens says."),
    tokens: str | None = _optimiser(None, "--tokens", help="Tokens to train on: 200k, 10M; auto: the store once."),
    lr: float | None = _optimiser(None, "--lr", help="Peak learning rate."),
    warmup: int | None = _optimiser(None, "--warmup", help="Steps of learning-rate warm-up."),
    device: str | None = _optimiser(None, "--device", help="auto, cpu, cuda or cuda:1."),
    step: str | None = _optimiser(None, "--step", help="auto, fast (by hand) or autograd."),
    dtype: str | None = _optimiser(None, "--dtype", help="Of the products: auto, float32 or bfloat16."),
    window: int | None = _data(None, "--window", help="Consecutive tokens per window, T."),
    batch_size: str | None = _data(None, "--batch-size", help="Tokens per step."),
    data_seed: int | None = _data(None, "--data-seed", help="Of the order of the windows."),
    only: str | None = _data(
        None, "--only", help="Only tokens in messages of this role: system, user, assistant or tool."
    ),
    out: str | None = _output(None, "--out", help="Folder of the run folders."),
    name: str | None = _output(None, "--name", help="Name of the run's folder."),
    resume: bool = _output(True, "--resume/--fresh", help="Go on with runs that are there, or delete them first."),
    log: list[str] = _output([], "--log", help="jsonl (always written), tensorboard, wandb."),
    log_every: int | None = _output(None, "--log-every", help="Steps between two lines of metrics."),
    checkpoint_every: int | None = _output(None, "--checkpoint-every", help="Steps between two checkpoints."),
    checkpoint_minutes: float | None = _output(
        None, "--checkpoint-minutes", help="Write one also after so many minutes; 0: do not."
    ),
    local_cache: float | None = _data(
        None, "--local-cache", help="GB of a store on object storage that are kept on this machine's disk."
    ),
    cache_dir: str | None = _data(
        None, "--cache-dir", help="Their folder, which processes may share. Default: ~/.cache/tcsae."
    ),
    show_config: bool = _output(False, "--show-config", help="Print the resolved configuration as TOML and leave."),
    json_output: bool = _output(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Train a TC-SAE and its twin without the temporal term, on the same stream of windows.

    A run that was stopped goes on with the same command; finished runs are kept.

    Examples:
        pipeline train --store cache/l12.zarr

        pipeline train --store cache/l12.zarr --preset paper --steps 5000

        pipeline train --store cache/l12.zarr --sweep temporal-weight=0,0.01,0.03,0.1 --sweep seed=0,1,2

        pipeline train --store cache/l12.zarr --rivals --k 32 --sweep seed=0,1,2

        pipeline train --store cache/l12.zarr --init-from runs/l12-topk64-none-s0 --name further

        pipeline train --extend runs/l12-topk64-pairwise0.03-w5-s0 --steps 2000

        pipeline train --show-config > my.toml

    """
    from ..console import note, summary
    from .options import TrainOptions, sweep_grid, train_config
    from .presets import show_toml

    asked = TrainOptions(
        store=store,
        width=width,
        preset=preset,  # pyright: ignore[reportArgumentType] - the configuration checks it
        baseline=baseline,
        init_from=init_from,
        plugin=plugin,
        seed=seed,
        architecture=architecture,
        activation=activation,
        k=k,
        groups=groups,
        l1=l1,
        target_l0=target_l0,
        temporal=temporal,
        temporal_weight=temporal_weight,
        temporal_partner=temporal_partner,
        temporal_lag=temporal_lag,
        temporal_scope=temporal_scope,
        temporal_per_feature=temporal_per_feature,  # pyright: ignore[reportArgumentType] - the configuration checks it
        steps=steps,
        tokens=tokens,
        lr=lr,
        warmup=warmup,
        step=step,  # pyright: ignore[reportArgumentType] - the configuration checks it
        device=device,
        dtype=dtype,
        window=window,
        batch_size=batch_size,
        data_seed=data_seed,
        only=only,  # pyright: ignore[reportArgumentType] - the configuration checks it
        out=out,
        name=name,
        log=log,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        checkpoint_minutes=checkpoint_minutes,
        local_cache=local_cache,
        cache_dir=cache_dir,
    )
    if extend:
        _extend(extend, asked, other=bool(sweep or rivals or config or show_config), fresh=not resume, json=json_output)
        return
    chosen = train_config(config, **asked)
    grid = sweep_grid(sweep)
    if show_config:
        print(show_toml(chosen), end="")
        return
    from ..system.allocator import keeping_freed_memory
    from .config import TemporalConfig
    from .loop.distributed import speaks
    from .presets import rivals_of
    from .run import train as run

    with keeping_freed_memory():
        done = run(rivals_of(chosen) if rivals else chosen, sweep=grid, fresh=not resume)
    if not speaks():
        return
    title = "already trained" if len(done.skipped) == len(done.runs) else "trained"
    names = [path.name for path in done.runs]
    summary(title, done.facts(as_json=json_output), as_json=json_output, names=[*names, *done.failures])
    swept = rivals or any(key.startswith("temporal") for key in grid)
    if chosen.temporal == TemporalConfig() and chosen.run.baseline and not swept:
        note(
            "the default term is there to be compared with its twin: the studies so far find one thing that it does "
            "better than all controls, seams between documents, and others that it does worse (docs/RESULTS.md); to "
            "use an SAE for anything else, take the twin, or train with --temporal none"
        )
    if done.failures:
        raise typer.Exit(1)


def _extend(runs: list[str], asked: TrainOptions, *, other: bool, fresh: bool, json: bool) -> None:
    from ..console import summary
    from ..errors import UsageError
    from ..system.allocator import keeping_freed_memory
    from .extend import extend
    from .loop.distributed import speaks
    from .options import extension

    if other:
        raise UsageError("--extend goes on with the settings of the run: leave out --sweep, --rivals and --config")
    with keeping_freed_memory():
        done = extend(runs, fresh=fresh, **extension(**asked))
    if speaks():
        summary("trained further", done.facts(as_json=json), as_json=json, names=[path.name for path in done.runs])


def export(
    run: str = typer.Argument(..., help="Folder of a finished run."),
    format_name: str = _output("saelens", "--format", help="saelens or dictionary-learning."),
    out: str | None = _output(None, "--out", help="Folder to write; default RUN/FORMAT."),
    base_model: str | None = _output(
        None, "--base-model", help="The language model's name on the hub, OWNER/NAME, where it came from a folder."
    ),
    module: str | None = _output(
        None, "--module", help="Name the place by this module of transformers, model.layers.12, not as TransformerLens."
    ),
    push_to_hub: str | None = _output(
        None, "--push-to-hub", help="Upload to this Hugging Face repository, OWNER/NAME."
    ),
    private: bool = _output(False, "--private", help="Make the repository private, if it is made now."),
    json_output: bool = _output(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Write a finished run in a format that other tools read, with a model card.

    A run folder itself opens with SAELens already; this makes a clean copy, or another format.

    Examples:
        pipeline export runs/l12-topk64-none-s0 --format dictionary-learning

        pipeline export runs/l12-topk64-none-s0 --push-to-hub me/my-sae

    """
    from ..console import summary
    from .formats.export import export as write

    folder = write(
        run, format_name, out, base_model=base_model, module=module, push_to_hub=push_to_hub, private=private
    )
    facts = {"folder": str(folder), "format": format_name, "uploaded_to": push_to_hub}
    summary("exported", {name: value for name, value in facts.items() if value}, as_json=json_output)


COMMANDS = [train, export]
