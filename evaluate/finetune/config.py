"""What fine-tuning is asked to do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, Unpack

from ... import options
from ...console import parse_count
from ...errors import UsageError


@dataclass(frozen=True)
class FinetuneConfig:
    """Which run is trained further, and how.

    Raises:
        UsageError: a value that cannot be.

    """

    run: str
    """Folder of a finished run."""
    out: str | None = None
    """Folder of the new run; None: the run's name with ``-finetuned``."""
    store: str | None = None
    """Activation store; None: the one the run was trained on."""
    model: str | None = None
    """The language model, where it is elsewhere than the store says; its weights must be the same."""
    tokens: int = 0
    """Tokens to train on; 0: a twentieth of what the run was trained on, and at least 100 steps."""
    batch_size: int = 0
    """Tokens per step, in whole rows; 0: the run's."""
    lr: float = 0.0
    """Peak learning rate; 0: a third of the run's. It rises over a twentieth of the steps, then falls to zero."""
    kl_share: float = 0.5
    """Part of KL in the sum of it and the reconstruction error: 0 trains on as before, 1 by KL alone."""
    balance: Literal["step", "start"] = "step"
    """KL is given the size of the reconstruction error in every batch (step), or once, in the first (start)."""
    seed: int | None = None
    """Of the order of the rows; None: the run's data seed."""
    device: str = "auto"
    dtype: str = "auto"
    """Of the language model, and of the SAE's products; weights of the SAE stay float32."""
    plugins: tuple[str, ...] = ()
    """Python files that the run was trained with."""
    fresh: bool = False
    """Replace what is there, instead of going on with it."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    checkpoint_minutes: float = 5.0
    """A checkpoint is also written after so many minutes; 0: it is not."""

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.batch_size < 0:
            raise UsageError("--tokens and --batch-size count tokens: use 200k, say, or leave them out")
        if not 0 <= self.lr < float("inf"):
            raise UsageError(f"--lr {self.lr:g} is no learning rate: use 1e-4, say, or leave it out")
        if not 0 <= self.kl_share <= 1:
            raise UsageError(f"--kl-share {self.kl_share:g} is no share: use a number from 0 (no KL) to 1 (KL alone)")
        if self.balance not in ("step", "start"):
            raise UsageError(f"--balance {self.balance} is unknown: choose step or start")
        if self.log_every < 1 or self.checkpoint_every < 1 or not self.checkpoint_minutes >= 0:
            raise UsageError("--log-every and --checkpoint-every count steps, from 1 on; see --help")


class FinetuneOptions(TypedDict, total=False):
    """The options of ``pipeline finetune`` under their names in Python; one that is None is left at its default."""

    tokens: int | str | None
    """``200k``, or ``auto``: a twentieth of the run's, at least 100 steps."""
    batch_size: int | str | None
    """Tokens per step, in whole rows; ``auto``: the run's."""
    lr: float | None
    kl_share: float | None
    balance: Literal["step", "start"] | None
    store: str | Path | None
    seed: int | None
    model: str | Path | None
    device: str | None
    dtype: str | None
    plugin: str | Path | Sequence[str | Path] | None
    """Python files that the run was trained with."""
    out: str | Path | None
    fresh: bool | None
    log_every: int | None
    checkpoint_every: int | None
    checkpoint_minutes: float | None


def finetune_config(run: str | Path, **asked: Unpack[FinetuneOptions]) -> FinetuneConfig:
    """The configuration that options mean; defaults are those of the record.

    Raises:
        UsageError: no such option, or a value that cannot be.

    """
    given = options.chosen(asked, FinetuneOptions, "finetune")
    for name in ("tokens", "batch_size"):
        if name in given:
            given[name] = 0 if given[name] == "auto" else parse_count(given[name])
    if "plugin" in given:
        given["plugins"] = options.several(given.pop("plugin"))
    return FinetuneConfig(run=os.fspath(run), **given)
