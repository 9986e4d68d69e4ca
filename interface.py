"""The commands as Python functions: the same options by the same names, the same summaries as typed objects.

Each takes either a configuration or options. They are silent unless ``progress=True`` (bars on a terminal, lines
elsewhere), leave allocator and threads of the process as they were, and import torch and the rest when they are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from .console import speaking
from .errors import UsageError

if TYPE_CHECKING:
    from .cache.arrays.config import ImportConfig, ImportOptions
    from .cache.arrays.run import ImportSummary
    from .evaluate.config import EvaluateConfig, EvaluateOptions
    from .evaluate.finetune.config import FinetuneConfig, FinetuneOptions
    from .evaluate.finetune.run import FinetuneSummary
    from .evaluate.finished import Outcome
    from .evaluate.flat import Report
    from .evaluate.prune.config import PruneConfig, PruneOptions
    from .evaluate.prune.run import PruneSummary
    from .extract.config import ExtractConfig, ExtractOptions
    from .extract.summary import ExtractSummary
    from .study.file import StudyFile
    from .study.run import StudySummary
    from .train.config import TrainConfig
    from .train.options import TrainOptions
    from .train.run import TrainSummary


def extract(
    config: ExtractConfig | None = None, *, progress: bool = False, **options: Unpack[ExtractOptions]
) -> ExtractSummary:
    """Store a language model's activations, as ``pipeline extract`` does; go on with what was begun.

    ``tcsae.extract(model="demo", dataset="demo", layers=[5, 10], tokens="200k")``

    Args:
        config: everything at once; or
        options: by name, as on the command line (:class:`~tcsae.extract.config.ExtractOptions`).
        progress: whether notes and progress are shown.

    Raises:
        TcsaeError: one sentence that names both sides and the remedy; what was committed stays.

    """
    from .extract.config import extract_config
    from .extract.run import extract as run

    with speaking(progress):
        return run(_either(config, options, lambda: extract_config(**options)))


def import_array(
    config: ImportConfig | None = None, *, progress: bool = False, **options: Unpack[ImportOptions]
) -> ImportSummary:
    """Make a store of vectors that no language model produced, as ``pipeline import`` does; go on with what was begun.

    ``tcsae.import_array(array="hidden.npy", tokens="characters.npy", context=64)``

    Args:
        config: everything at once; or
        options: by name, as on the command line (:class:`~tcsae.cache.arrays.config.ImportOptions`).
        progress: whether notes and progress are shown.

    Raises:
        TcsaeError: one sentence that names both sides and the remedy; what was committed stays.

    """
    from .cache.arrays.config import import_config
    from .cache.arrays.run import import_array as run

    with speaking(progress):
        return run(_either(config, options, lambda: import_config(**options)))


def train(
    config: TrainConfig | str | Path | None = None,
    *,
    sweep: Mapping[str, Iterable[Any]] | Iterable[str] = (),
    rivals: bool = False,
    extend: str | Path | Iterable[str | Path] = (),
    fresh: bool = False,
    progress: bool = False,
    **options: Unpack[TrainOptions],
) -> TrainSummary:
    """Train an SAE and its λ2 = 0 twin, or a sweep of them, as ``pipeline train`` does; go on with what was begun.

    ``tcsae.train(store="cache/l12.zarr", k=32, sweep={"temporal_weight": [0.01, 0.1], "seed": [0, 1]})``

    Args:
        config: everything at once, or a TOML file that the options are laid over; or
        options: by name, as on the command line (:class:`~tcsae.train.options.TrainOptions`).
        sweep: option or dotted field → values, or ``["seed=0,1"]``; every combination is trained, on one stream.
        rivals: plain, TC-SAE, T-SAE, TFA and a crosscoder instead of one kind, of one width and k, on one pass.
        extend: finished runs (or folders of them) that go on for ``steps`` or ``tokens`` more, with all else as it was.
        fresh: replace runs that are there.
        progress: whether notes and progress are shown.

    Raises:
        TcsaeError: one sentence that names both sides and the remedy; finished runs and checkpoints stay.

    """
    from .options import several
    from .train.options import extension, sweep_grid, train_config
    from .train.presets import rivals_of
    from .train.run import train as run

    with speaking(progress):
        if runs := several(extend):
            from .train.extend import extend as go_on

            if config is not None or sweep or rivals:
                raise UsageError("extend goes on with the settings of the run: leave out config, sweep and rivals")
            return go_on(runs, fresh=fresh, **extension(**options))
        file = config if isinstance(config, str | Path) else None
        chosen = _either(None if file else config, options, lambda: train_config(file, **options))
        return run(rivals_of(chosen) if rivals else chosen, sweep=sweep_grid(sweep), fresh=fresh)


def evaluate(
    config: EvaluateConfig | None = None, *, progress: bool = False, **options: Unpack[EvaluateOptions]
) -> list[Outcome]:
    """Judge SAEs in their language models, as ``pipeline evaluate`` does: one report per model and text.

    ``tcsae.evaluate(run=["runs/l12-topk64-none-s0"], batches=50)``

    Args:
        config: everything at once; or
        options: by name, as on the command line (:class:`~tcsae.evaluate.config.EvaluateOptions`).
        progress: whether notes and progress are shown.

    Returns:
        Each report with its folder; SAEs that could not be evaluated are in ``outcome.report.failures``.

    Raises:
        TcsaeError: nothing could be evaluated; one sentence says why.

    """
    from .evaluate.config import evaluate_config
    from .evaluate.run import evaluate as run

    with speaking(progress):
        return run(_either(config, options, lambda: evaluate_config(**options)))


def finetune(
    run: str | Path | FinetuneConfig, *, progress: bool = False, **options: Unpack[FinetuneOptions]
) -> FinetuneSummary:
    """Train a finished run on by KL through the upper layers, as ``pipeline finetune`` does; go on with what was begun.

    ``tcsae.finetune("runs/l12-topk64-none-s0", tokens="10M").folder``

    Args:
        run: a run's folder, or everything at once.
        options: by name, as on the command line (:class:`~tcsae.evaluate.finetune.config.FinetuneOptions`).
        progress: whether notes and progress are shown.

    Raises:
        TcsaeError: one sentence that names both sides and the remedy; finished runs and checkpoints stay.

    """
    from .evaluate.finetune.config import FinetuneConfig, finetune_config
    from .evaluate.finetune.run import finetune_run

    given, folder = (run, "") if isinstance(run, FinetuneConfig) else (None, run)
    with speaking(progress):
        return finetune_run(_either(given, options, lambda: finetune_config(folder, **options)))


def prune(run: str | Path | PruneConfig, *, progress: bool = False, **options: Unpack[PruneOptions]) -> PruneSummary:
    """Merge near-duplicate features of a run and drop position-locked ones, as ``pipeline prune`` does.

    ``tcsae.prune("runs/l12-topk64-none-s0", min_cosine=0.95).merged``

    Args:
        run: a run's folder, or everything at once.
        options: by name, as on the command line (:class:`~tcsae.evaluate.prune.config.PruneOptions`).
        progress: whether notes and progress are shown.

    Returns:
        What was eliminated; its ``folder`` is None where nothing is redundant, and nothing was written.

    Raises:
        TcsaeError: one sentence that names both sides and the remedy; the run itself is never changed.

    """
    from .evaluate.prune.config import PruneConfig, prune_config
    from .evaluate.prune.run import prune_run

    given, folder = (run, "") if isinstance(run, PruneConfig) else (None, run)
    with speaking(progress):
        return prune_run(_either(given, options, lambda: prune_config(folder, **options)))


def study(
    file: str | Path | StudyFile,
    *,
    scale: str | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    scheduler: str | None = None,
    fresh: bool = False,
    write_docs: str | Path | None = None,
    progress: bool = False,
) -> StudySummary:
    """Run a study from text to verdict, as ``pipeline study`` does; go on with what was begun.

    ``tcsae.study("studies/verdict.toml", progress=True).analysis``

    Args:
        file: the study file, or what was read from one.
        scale: which of its scales; by default the one that it names.
        out: the study's folder; ``studies/out/NAME-SCALE`` by default.
        device: for every stage.
        scheduler: address of a Dask scheduler whose workers see the same files.
        fresh: delete what is in the folder first.
        write_docs: a document that is written from this study and from those finished beside it.
        progress: whether notes and progress are shown.

    Raises:
        TcsaeError: one sentence that names both sides and the remedy; what is finished stays.

    """
    from .study.file import StudyFile, read_study
    from .study.run import run_study

    if isinstance(file, StudyFile):
        chosen, path = file if scale is None else file.at_scale(scale), ""
    else:
        chosen, path = read_study(file, scale), str(file)
    with speaking(progress):
        return run_study(
            chosen, file=path, out=out, device=device, scheduler=scheduler, fresh=fresh, write_docs=write_docs
        )


def load_report(path: str | Path) -> Report:
    """What an evaluation found, as tables: ``load_report("reports/demo").records``.

    Args:
        path: a report's folder, or its ``results.json``.

    Raises:
        RunError: there is none, it is damaged, or a newer version wrote it.

    """
    from .evaluate.flat import Report
    from .evaluate.results import read_results

    return Report(read_results(path))


def _either(config: Any, options: Mapping[str, Any], build: Any) -> Any:
    if config is None:
        return build()
    if options:
        raise UsageError(
            f"a configuration was given and {', '.join(options)} beside it: put them into the configuration"
        )
    return config
