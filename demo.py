"""The main job on a small real model and real text: extract, train the TC-SAE and its twin, evaluate, report.

Nothing here is special to the demo but its sizes: it calls the three stages as the commands do, and a second run finds
everything done and only shows it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import typer

from .console import format_count, note, parse_count
from .errors import UsageError, needs

if TYPE_CHECKING:
    from pathlib import Path

    from .evaluate.run import Outcome


_what = partial(typer.Option, rich_help_panel="Model and text")
_sizes = partial(typer.Option, rich_help_panel="How much")
_output = partial(typer.Option, rich_help_panel="Output")

# The previous token is left out for time: it costs a pass through the upper layers, as zero_sae (which shares zero's)
# does not.
REFERENCES = ("identity_bf16", "zero_all", "zero", "mean", "untrained", "zero_sae")


@dataclass(frozen=True)
class DemoConfig:
    """How large the demo is. The defaults take a few minutes on two cores."""

    model: str = "demo"
    """The language model: ``demo`` is SmolLM2-135M-Instruct; a hub id, folder or GGUF file otherwise."""
    dataset: str = "demo"
    """The text: ``demo`` is 249 State of the Union speeches."""
    layers: tuple[int, ...] = (5, 10)
    """Blocks whose residual stream is extracted and trained on."""
    tokens: int = 200_000
    """Tokens extracted per layer."""
    steps: int = 160
    """Training steps of 2045 tokens."""
    k: int = 32
    """Active features per token, in the TC-SAE and its twin alike."""
    held_out: float = 0.15
    """Share of the documents kept for evaluation; speeches are few and long, so more than the usual 1 %."""
    batches: int = 4
    """Batches of held-out text in the evaluation."""
    folder: str = "demo_output"
    """Holds the stores and the runs."""
    reports: str = "reports"
    """Gets ``demo/index.html``."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise UsageError("the demo needs a layer: say for instance --layers 5 10")


def run_demo(config: DemoConfig) -> Outcome:
    """Run the three stages; returns the report and where its page is.

    Raises:
        TcsaeError: whatever a stage finds wrong.

    """
    needs("transformers", "datasets", "gguf", "accelerate", "matplotlib", extra="all", what="the demo")
    from .evaluate.config import EvaluateConfig
    from .evaluate.run import evaluate
    from .extract.config import ExtractConfig, ModelSource, TextSource
    from .extract.run import extract

    extraction = ExtractConfig(
        layers=config.layers,
        model=ModelSource(id=config.model),
        text=TextSource(dataset=config.dataset, held_out=config.held_out),
        tokens=config.tokens,
        out=f"{config.folder}/cache",
    )
    note(f"1/3  extracting layers {' '.join(map(str, config.layers))}: {format_count(config.tokens)} tokens a layer")
    extract(extraction)
    runs: list[Path] = []
    for at, store in extraction.paths.items():
        note(f"2/3  training layer {at}: a TC-SAE and its λ2 = 0 twin on the same batches")
        runs += _train(config, store)
    note("3/3  evaluating on held-out documents")
    asked = EvaluateConfig(
        runs=tuple(map(str, runs)), batches=config.batches, references=REFERENCES, out=config.reports, name="demo"
    )
    return evaluate(asked)[0]


def _train(config: DemoConfig, store: str) -> list[Path]:
    from .system.allocator import keeping_freed_memory
    from .train.config import TrainConfig
    from .train.presets import changed
    from .train.run import train

    sizes = {
        "data.store": store,
        "sae.k": config.k,
        "optimiser.lr": 1e-3,  # a short run at a small width; the preset's 3e-4 is for thousands of steps
        "run.steps": config.steps,
        "run.out": f"{config.folder}/runs",
        "run.log_every": 10,
    }
    with keeping_freed_memory():
        return train(changed(TrainConfig(), sizes)).runs


def demo(
    model: str = _what(DemoConfig.model, "--model", help="Hub id, folder, .gguf file, or 'demo'."),
    dataset: str = _what(DemoConfig.dataset, "--dataset", help="Hub id, text files or a folder of them, or 'demo'."),
    layers: list[int] = _what(list(DemoConfig.layers), "--layers", help="Layers, such as 5 10."),
    tokens: str = _sizes(str(DemoConfig.tokens), "--tokens", help="Tokens extracted per layer: 200k, 2M."),
    steps: int = _sizes(DemoConfig.steps, "--steps", help="Training steps of 2045 tokens."),
    batches: int = _sizes(DemoConfig.batches, "--batches", help="Batches of 16 rows of held-out text."),
    folder: str = _output(DemoConfig.folder, "--folder", help="Where the stores and the runs are kept."),
    reports: str = _output(DemoConfig.reports, "--reports", help="Where demo/index.html is written."),
    json_output: bool = _output(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """The whole job on a real small model and text: a few minutes on two cores, then a page to look at.

    Examples:
        pipeline demo

        pipeline demo --tokens 2M --layers 3 6 9 --steps 1000

    """
    from .evaluate.report.terminal import print_outcomes

    config = DemoConfig(
        model=model,
        dataset=dataset,
        layers=tuple(layers),
        tokens=parse_count(tokens),
        steps=steps,
        batches=batches,
        folder=folder,
        reports=reports,
    )
    print_outcomes([run_demo(config)], as_json=json_output)


COMMANDS = [demo]
