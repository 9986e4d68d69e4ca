"""The metrics of a run: always ``metrics.jsonl``; on request also TensorBoard or Weights & Biases.

``metrics.jsonl`` has one JSON object per line and logged step; undefined numbers are null. A resumed run continues the
same curves and has no step twice: lines and TensorBoard events after the checkpoint are dropped, and steps that were
already sent to Weights & Biases are not sent again.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...errors import RunError, UsageError
from ...system.atomic_files import make_folder, plain_errors, write_file
from ...system.untrusted_files import read_bytes

METRICS = "metrics.jsonl"


class _Sink(Protocol):
    def write(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Writes the metrics of one run.

    Args:
        run: the run's folder.
        kinds: jsonl, tensorboard, wandb.
        from_step: lines after this step are dropped (0: all lines).
        config: shown by Weights & Biases.
        curves: where TensorBoard and Weights & Biases have their files; None: in the run's folder, too.

    Raises:
        RunError: the folder cannot be written, or Weights & Biases refuses.

    """

    def __init__(
        self, run: Path, kinds: Sequence[str], *, from_step: int, config: dict[str, Any], curves: Path | None = None
    ):
        self._path, curves = run / METRICS, curves or run
        with plain_errors(f"write {self._path}"):
            make_folder(run)
            sent = _truncate(self._path, from_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._sinks: list[_Sink] = []
        try:
            self._sinks += (_SINKS[kind](curves, config, from_step, sent) for kind in kinds if kind != "jsonl")
        except BaseException:
            self.close()
            raise

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log the metrics of ``step``; they are flushed at once, so that a killed run has them.

        Raises:
            RunError: the file can no longer be written.

        """
        self._line({"step": step, **metrics})
        for sink in self._sinks:
            sink.write(step, metrics)

    def alarm(self, step: int, message: str) -> None:
        """Log an alarm among the metrics."""
        self._line({"step": step, "alarm": message})

    def _line(self, entry: dict[str, Any]) -> None:
        with plain_errors(f"write {self._path}"):
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close all outputs."""
        try:
            with plain_errors(f"write {self._path}"):
                self._file.close()
        finally:
            for sink in self._sinks:
                sink.close()


def check_loggers(kinds: Sequence[str]) -> None:
    """Check, before training starts, that the packages of these loggers are installed.

    Raises:
        UsageError: the package of a logger is not installed.

    """
    for kind in kinds:
        if kind != "jsonl" and importlib.util.find_spec(kind) is None:
            raise UsageError(
                f"--log {kind} needs the package {kind}, which is not installed: pip install {kind}, or leave it out"
            )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics, without alarms."""
    return [entry for line in _lines(run / METRICS) if (entry := _parsed(line)) and "alarm" not in entry]


def metrics_until(run: Path, step: int) -> list[str]:
    """The lines of a run's metrics up to a step, alarms included."""
    return [line for line in _lines(run / METRICS) if (entry := _parsed(line)) and entry["step"] <= step]


def _lines(path: Path) -> list[str]:
    return read_bytes(path, most=1 << 30).decode(errors="replace").splitlines() if path.exists() else []


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None  # incomplete, since the process was killed
    return entry if isinstance(entry, dict) else None


def _truncate(path: Path, step: int) -> int:
    """Drop the lines after ``step``; returns the last step that was in the file."""
    if not path.exists():
        return 0
    lines = {line: entry["step"] for line in _lines(path) if (entry := _parsed(line))}
    write_file(path, "".join(f"{line}\n" for line, at in lines.items() if step and at <= step))
    return max(lines.values(), default=0)


class _TensorBoard:
    def __init__(self, run: Path, _config: dict[str, Any], from_step: int, _sent: int):
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Output to Weights & Biases, where a run can only grow.

    A resumed run keeps its id and sends nothing twice; a run that starts again gets a new id.
    """

    def __init__(self, run: Path, config: dict[str, Any], from_step: int, sent: int):
        import wandb  # pyright: ignore[reportMissingImports] - optional

        # A run's name may occur in several folders and again after --fresh; ids of Weights & Biases must be unique.
        file = run / "wandb" / "id"
        goes_on = from_step > 0 and file.exists()
        if not goes_on:
            write_file(file, f"{run.name}-{secrets.token_hex(4)}")
        self._sent = sent if goes_on else 0
        try:
            self._run = wandb.init(
                project="tcsae", name=run.name, id=file.read_text(), dir=str(run), config=config, resume="allow",
                reinit="create_new",  # one process has a run for each member of a sweep
                settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.Error as failure:
            ways = "'wandb login', set WANDB_MODE=offline, or leave --log wandb out"
            raise RunError(
                f"Weights & Biases cannot begin {run.name} ({str(failure).rstrip('.')}): {ways}"
            ) from failure

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        if step > self._sent:
            self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


_SINKS = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
