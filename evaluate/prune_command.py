"""``pipeline prune``: eliminate near-duplicate and position-locked features of a run."""

from __future__ import annotations

import typer


def prune(
    run: str = typer.Argument(..., help="Folder of a finished run."),
    out: str | None = typer.Option(None, "--out", help="Folder of the new run. Default: the run's name with -pruned."),
    store: str | None = typer.Option(None, "--store", help="Activation store. Default: the one the run was trained on."),
    tokens: str = typer.Option("200k", "--tokens", help="Tokens of the store to look at; 200k, 10M."),
    min_cosine: float = typer.Option(
        0.9, "--min-cosine", help="Merge features whose decoder rows are at least this alike; 2 merges none."
    ),
    min_eta_squared: float = typer.Option(
        0.5,
        "--min-eta-squared",
        help="Drop features whose position explains at least this share of their variance; 2 drops none.",
    ),
    false_discovery_rate: float = typer.Option(0.05, "--false-discovery-rate", help="Of the test for position dependence."),
    seed: int = typer.Option(0, "--seed", help="Of the rotations of that test."),
    device: str = typer.Option("auto", "--device", help="auto, cuda, cuda:1, cpu."),
    json_output: bool = typer.Option(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Merge near-duplicate features and drop position-locked ones into a new run, and say what that costs.

    `pipeline evaluate` then shows the new run beside the old one.

    Examples:
        pipeline prune runs/l12-topk64-pairwise0.03-w5-s0

        pipeline prune runs/l12-topk64-none-s0 --min-cosine 0.95 --out runs/fewer

    """
    from dataclasses import asdict

    from ..console import parse_count, summary
    from .prune import PruneConfig, prune_run

    done = prune_run(
        PruneConfig(
            run=run,
            out=out,
            store=store,
            tokens=parse_count(tokens),
            min_cosine=min_cosine,
            min_eta_squared=min_eta_squared,
            false_discovery_rate=false_discovery_rate,
            seed=seed,
            device=device,
        )
    )
    facts = {
        "run": done.folder or "none written: nothing is redundant at these thresholds",
        "features": f"{done.before.n_features} → {done.after.n_features}",
        "merged": sum(len(members) for members in done.merged.values()),
        "dropped": len(done.dropped),
        "tokens": done.tokens,
        "explained variance": _change(done.before.explained_variance, done.after.explained_variance),
        "L0": _change(done.before.l0, done.after.l0),
    }
    summary(f"pruned {run}", asdict(done) if json_output else facts, as_json=json_output)


def _change(before: float | None, after: float | None) -> str:
    return " → ".join("undefined" if value is None else f"{value:.4g}" for value in (before, after))
