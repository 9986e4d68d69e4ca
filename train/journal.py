"""Where metrics go: always ``metrics.jsonl``, and TensorBoard or Weights & Biases where asked for and installed.

One JSON object per line and logged step; undefined numbers are null. A resumed run drops the lines past its checkpoint, so that
no step is there twice.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import RunError, UsageError

METRICS = "metrics.jsonl"


class _Sink(Protocol):
    def write(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def close(self) -> None: ...


class Journal:
    """The metrics of one run.

    Args:
        run: the run's folder.
        kinds: jsonl, tensorboard, wandb.
        from_step: lines past this step are dropped (0: all of them).
        config: shown by Weights & Biases.

    Raises:
        RunError: the folder cannot be written.

    """

    def __init__(self, run: Path, kinds: Sequence[str], *, from_step: int, config: dict[str, Any]):
        self._path = run / METRICS
        try:
            run.mkdir(parents=True, exist_ok=True)
            _truncate(self._path, from_step)
            self._file = open(self._path, "a")  # noqa: SIM115 - closed by close()
        except OSError as failure:
            raise RunError(f"{self._path} cannot be written: {failure.strerror or failure}") from failure
        self._sinks: list[_Sink] = [_SINKS[kind](run, config, from_step) for kind in kinds if kind != "jsonl"]

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log the metrics of ``step``; flushed at once, so that a killed run has them."""
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(step, metrics)

    def alarm(self, step: int, message: str) -> None:
        """Log an alarm beside the metrics."""
        self._file.write(json.dumps({"step": step, "alarm": message}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close every sink."""
        self._file.close()
        for sink in self._sinks:
            sink.close()


def check_loggers(kinds: Sequence[str]) -> None:
    """Fail before anything is begun.

    Raises:
        UsageError: a logger whose package is not installed.

    """
    for kind in kinds:
        if kind != "jsonl" and importlib.util.find_spec(kind) is None:
            raise UsageError(
                f"--log {kind} needs the package {kind}, which is not installed: pip install {kind}, or leave it out"
            )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics, alarms left out."""
    path = run / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for line in lines if (entry := _parsed(line)) and "alarm" not in entry]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None  # torn by a kill
    return entry if isinstance(entry, dict) else None


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if (entry := _parsed(line)) and entry["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept if step))
    os.replace(partial, path)


class _TensorBoard:
    def __init__(self, run: Path, _config: dict[str, Any], from_step: int):
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run: Path, config: dict[str, Any], _from_step: int):
        import wandb  # pyright: ignore[reportMissingImports] - optional

        self._run = wandb.init(project="tcsae", name=run.name, id=run.name, dir=str(run), config=config, resume="allow")

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


_SINKS = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
