"""The commands of stage three."""

from __future__ import annotations

from functools import partial

import typer

from .config import EvaluateConfig
from .finetune.config import FinetuneConfig, finetune_config

_main = partial(typer.Option, rich_help_panel="What to evaluate")
_seen = partial(typer.Option, rich_help_panel="What to look at")
_amount = partial(typer.Option, rich_help_panel="How much")
_model = partial(typer.Option, rich_help_panel="Model")
_text = partial(typer.Option, rich_help_panel="Text")
_loss = partial(typer.Option, rich_help_panel="Loss")
_redundant = partial(typer.Option, rich_help_panel="What is redundant")
_output = partial(typer.Option, rich_help_panel="Output")
_cluster = partial(typer.Option, rich_help_panel="Many machines")


def prune(
    run: str = typer.Argument(..., help="Folder of a finished run."),
    store: str | None = _seen(None, "--store", help="Activation store. Default: the one the run was trained on."),
    tokens: str = _seen("200k", "--tokens", help="Tokens of the store to look at; 200k, 10M."),
    device: str = _seen("auto", "--device", help="auto, cuda, cuda:1, cpu."),
    min_cosine: float = _redundant(
        0.9, "--min-cosine", help="Merge features whose decoder rows are at least this alike; 2 merges none."
    ),
    min_eta_squared: float = _redundant(
        0.5,
        "--min-eta-squared",
        help="Drop features whose position explains at least this share of their variance; 2 drops none.",
    ),
    false_discovery_rate: float = _redundant(
        0.05, "--false-discovery-rate", help="Of the test for position dependence."
    ),
    seed: int = _redundant(0, "--seed", help="Of the rotations of that test."),
    out: str | None = _output(None, "--out", help="Folder of the new run. Default: the run's name with -pruned."),
    json_output: bool = _output(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Merge near-duplicate features and drop position-locked ones into a new run, and say what that costs.

    `pipeline evaluate` then shows the new run beside the old one.

    Examples:
        pipeline prune runs/l12-topk64-pairwise0.03-w5-s0

        pipeline prune runs/l12-topk64-none-s0 --min-cosine 0.95 --out runs/fewer

    """
    from dataclasses import asdict

    from ..console import summary
    from .prune.config import prune_config
    from .prune.run import prune_run

    done = prune_run(
        prune_config(
            run,
            out=out,
            store=store,
            tokens=tokens,
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


def finetune(
    run: str = typer.Argument(..., help="Folder of a finished run."),
    tokens: str = _amount(
        "auto", "--tokens", help="Tokens to train on: 200k, 10M; auto: a twentieth of the run's, at least 100 steps."
    ),
    batch_size: str = _amount("auto", "--batch-size", help="Tokens per step, in whole rows; auto: the run's."),
    lr: float = _loss(FinetuneConfig.lr, "--lr", help="Peak learning rate, falls to zero; 0: a third of the run's."),
    kl_share: float = _loss(
        FinetuneConfig.kl_share,
        "--kl-share",
        help="Part of KL in the sum of it and the reconstruction error: 0 trains on as before, 1 by KL alone.",
    ),
    balance: str = _loss(
        FinetuneConfig.balance,
        "--balance",
        help="KL is given the size of the reconstruction error in every step, or once, at the start.",
    ),
    store: str | None = _seen(None, "--store", help="Activation store. Default: the one the run was trained on."),
    seed: int | None = _seen(None, "--seed", help="Of the order of the rows. Default: the run's data seed."),
    model: str | None = _model(
        None, "--model", help="The language model, where it lies elsewhere now; with the same weights."
    ),
    device: str = _model(FinetuneConfig.device, "--device", help="auto, cpu, cuda or cuda:1."),
    dtype: str = _model(
        FinetuneConfig.dtype, "--dtype", help="Of the language model and of products: auto, bfloat16 or float32."
    ),
    plugin: list[str] = _main([], "--plugin", help="A Python file that the run was trained with; repeatable."),
    out: str | None = _output(None, "--out", help="Folder of the new run. Default: the run's name with -finetuned."),
    resume: bool = _output(True, "--resume/--fresh", help="Go on with what is there, or delete it first."),
    log_every: int = _output(FinetuneConfig.log_every, "--log-every", help="Steps between two lines of metrics."),
    checkpoint_every: int = _output(
        FinetuneConfig.checkpoint_every, "--checkpoint-every", help="Steps between two checkpoints."
    ),
    checkpoint_minutes: float = _output(
        FinetuneConfig.checkpoint_minutes,
        "--checkpoint-minutes",
        help="Write one also after so many minutes; 0: do not.",
    ),
    json_output: bool = _output(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Train a run's SAE on by reconstruction error and KL through the upper layers, as a new run beside it.

    Its temporal and sparsity terms are kept. No lower layer runs: the residuals of its store are spliced in. `pipeline
    evaluate` then shows the new run beside the old one.

    Examples:
        pipeline finetune runs/l12-topk64-none-s0

        pipeline finetune runs/l12-topk64-pairwise0.03-w5-s0 --tokens 25M --lr 1e-4

        pipeline finetune runs/l12-topk64-none-s0 --kl-share 0 --out runs/control

    """
    from dataclasses import asdict

    from ..console import summary
    from ..system.allocator import keeping_freed_memory
    from .finetune.run import finetune_run, in_words

    config = finetune_config(
        run,
        tokens=tokens,
        batch_size=batch_size,
        out=out,
        store=store,
        model=model,
        lr=lr,
        kl_share=kl_share,
        balance=balance,  # pyright: ignore[reportArgumentType] - the configuration checks it
        seed=seed,
        device=device,
        dtype=dtype,
        plugin=plugin,
        fresh=not resume,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        checkpoint_minutes=checkpoint_minutes,
    )
    with keeping_freed_memory():
        done = finetune_run(config)
    title = "already fine-tuned" if done.skipped else "fine-tuned"
    summary(title, asdict(done) if json_output else in_words(done), as_json=json_output)


def evaluate(
    run: list[str] = _main([], "--run", help="A run folder; repeatable. Default: every finished run under runs/."),
    sae: list[str] = _main(
        [],
        "--sae",
        help="An SAE from elsewhere: SAELens folder, Gemma Scope npz, dictionary_learning ae.pt, or hub id/path.",
    ),
    layer: list[int] = _main([], "--layer", help="Layer of each --sae, or one for all, where they do not say it."),
    site: list[str] = _main(
        [],
        "--site",
        help="Hook point of each --sae, or one for all, where they do not say it: resid_post (default), mlp_out …",
    ),
    runs: str = _main(EvaluateConfig.runs_folder, "--runs", help="Where finished runs are looked for."),
    quick: bool = _amount(False, "--quick", help="Ten batches, no feature browser: a first look."),
    batches: int = _amount(EvaluateConfig.batches, "--batches", help="Batches of text."),
    batch_size: int = _amount(EvaluateConfig.batch_rows, "--batch-size", help="Rows (model contexts) per batch."),
    splice_rows: int = _amount(
        EvaluateConfig.splice_rows, "--splice-rows", help="Rows in which SAEs are spliced for CE and KL; 0: all."
    ),
    references: list[str] = _amount(
        [],
        "--references",
        help="Reference rows: all (default), none, or names: identity_bf16, zero_all, zero, mean, previous_token, "
        "untrained, zero_sae, untrained_twins.",
    ),
    only: list[str] = _amount(
        [],
        "--only",
        help="Measure just fidelity, features, temporal or position; of conversations also one role (system, user, "
        "assistant, tool). Repeatable. Default: everything.",
    ),
    seed: int = _amount(
        EvaluateConfig.seed, "--seed", help="Of the bootstrap, the untrained SAE and the permutation nulls."
    ),
    model: str | None = _model(None, "--model", help="Language model. Default: the one each run's store names."),
    revision: str | None = _model(None, "--revision", help="Branch, tag or commit of --model on the hub."),
    gguf_file: str | None = _model(None, "--gguf-file", help="A GGUF file inside --model."),
    device: str = _model(EvaluateConfig.device, "--device", help="auto, cuda, cuda:1, cpu."),
    dtype: str = _model(EvaluateConfig.dtype, "--dtype", help="Of the language model: auto, bfloat16 or float32."),
    device_map: str = _model(
        EvaluateConfig.device_map,
        "--device-map",
        help="auto: spread a model larger than one GPU over all, CPU and disk; or a JSON file of module → device.",
    ),
    load_in: str = _model(
        EvaluateConfig.load_in, "--load-in", help="8bit or 4bit weights (bitsandbytes). Default: the store's."
    ),
    dataset: str | None = _text(None, "--dataset", help="Text. Default: held-out documents of the store's text."),
    split: str | None = _text(None, "--split", help="Split of the dataset."),
    text_column: str | None = _text(None, "--text-column", help="Column that holds the text."),
    label_column: str | None = _text(
        None, "--label-column", help="Column with each document's label, which probes look for."
    ),
    chat_template: bool = _text(
        EvaluateConfig.chat_template,
        "--chat-template",
        help="Rows of --dataset hold messages (a store says so itself).",
    ),
    plugin: list[str] = _main(
        [], "--plugin", help="A Python file with your own metrics or panels, or with what a run was trained with."
    ),
    out: str = _output(EvaluateConfig.out, "--out", help="Where reports are written."),
    name: str | None = _output(None, "--name", help="Folder of the report under --out. Default: the model's name."),
    codes: bool = _output(
        EvaluateConfig.codes,
        "--codes",
        help="Keep the codes of every run on this text beside the report: `pipeline features RUN --report REPORT`.",
    ),
    resume: bool = _output(
        True, "--resume/--fresh", help="Keep rows measured before on the same text, or measure anew."
    ),
    keep_states: float = _output(
        EvaluateConfig.keep_states,
        "--keep-states",
        help="GB beside the reports for states of the untouched model, read by the next evaluation on a text; 0: none.",
    ),
    workers: int | None = _cluster(
        None, "--workers", help="Divide the text's rows among this number of processes (Dask)."
    ),
    scheduler: str | None = _cluster(
        None, "--scheduler", help="Divide them among the workers of the Dask cluster at this address, tcp://…"
    ),
    json_output: bool = _output(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Splice SAEs into their language model and report what is lost, what features do, and how they behave in time.

    Reference rows (identity, zero, mean and previous-token ablation, untrained and empty SAEs) are measured beside
    them. Ends with status 1 when an SAE could not be evaluated, after the others were.

    Examples:
        pipeline evaluate

        pipeline evaluate --run runs/l12-topk64-pairwise0.03-w5-s0 --batches 50

        pipeline evaluate --only temporal position --references none

        pipeline evaluate --codes

        pipeline evaluate --scheduler tcp://host:8786

        pipeline evaluate --sae google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82 --model google/gemma-2-2b

    """
    from ..console import note, warn
    from .config import evaluate_config

    config = evaluate_config(
        run=run,
        sae=sae,
        layer=layer,
        site=site,
        runs=runs,
        quick=quick,
        batches=batches,
        batch_size=batch_size,
        splice_rows=splice_rows,
        references=references,
        only=only,
        seed=seed,
        model=model,
        revision=revision,
        gguf_file=gguf_file,
        device=device,
        dtype=dtype,
        device_map=device_map,
        load_in=load_in,  # pyright: ignore[reportArgumentType] - checked with the model
        dataset=dataset,
        split=split,
        text_column=text_column,
        label_column=label_column,
        chat_template=chat_template,
        out=out,
        name=name,
        plugin=plugin,
        keep_states=keep_states,
        codes=codes,
        fresh=not resume,
        workers=workers,
        scheduler=scheduler,
    )
    from .finished import shown_again
    from .report.terminal import print_outcomes

    outcomes = shown_again(config)
    if outcomes is None:
        from .run import evaluate as run_evaluation

        outcomes = run_evaluation(config)
    else:
        note("nothing has changed since this was evaluated: the report is shown as it is")
        for outcome in outcomes:
            for failure in outcome.report.failures:
                warn(f"{failure.path}: {failure.message}")
    print_outcomes(outcomes, as_json=json_output)
    if any(outcome.report.failures for outcome in outcomes):
        raise typer.Exit(1)


COMMANDS = [evaluate, prune, finetune]
