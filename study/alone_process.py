"""The process that trains one SAE and says what that took: :mod:`.alone` starts it, and nothing else happens in it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from ..errors import TcsaeError
from ..system.allocator import keeping_freed_memory
from ..system.device import resolve_device
from ..system.free_memory import held_memory
from ..train.config import TrainConfig
from ..train.run import train
from ..train.run_folder.record import load_run


def train_alone(asked: Mapping[str, Any]) -> None:
    """Train, as `pipeline train` does, and print one line of JSON.

    Args:
        asked: ``config``, a training configuration of one SAE, and ``parent``, the process without which this one ends.

    """
    threading.Thread(target=_end_with, args=(asked["parent"],), daemon=True).start()
    config = TrainConfig.model_validate(asked["config"])
    try:
        held = held_memory(resolve_device(config.run.device))  # after all imports
        with keeping_freed_memory():
            (run,) = train(config, fresh=True).runs
        record = load_run(run)
    except TcsaeError as failure:
        print(json.dumps({"failure": str(failure)}), flush=True)
        return
    numbers = {"steps": record.steps, "tokens": record.tokens, "seconds": record.cost["seconds"]}
    memory = {"held_bytes": held, "peak_bytes": round(record.cost["peak_memory_bytes"])}
    print(json.dumps(numbers | memory), flush=True)


def _end_with(parent: int) -> None:
    """A study that is killed must not leave a training behind, which the next command would run into."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
