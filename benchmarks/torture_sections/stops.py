"""Processes that are killed, a power supply that is cut, and two processes that write at once."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from power import Disk, PowerCut

from .children import Ended, Tally, child
from .stages import Scene, Stage, goes_on, stages


class Killed(Disk):
    """A disk whose process dies where the other one's power is cut."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "is_cut" and value:
            os.kill(os.getpid(), signal.SIGKILL)


def kills(scene: Scene) -> Iterator[Tally]:
    """Kill -9 before a random call that makes something durable or renames it."""
    for stage in stages(scene.base):
        tally = Tally(f"kill -9 · {stage.name}", "the same command ends with the same bytes")
        expected, calls = scene.whole(stage)
        for number in range(scene.times(100 if stage.name == "train" else 25)):
            out = scene.base / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            deaths = []
            for again in range(scene.dice(stage.name, number).randint(1, 3)):
                at = scene.dice(stage.name, number, again).randint(1, calls)
                deaths.append(at)

                child(partial(until_killed, stage, out, at))
            wrong = goes_on(stage, out, expected)
            tally.count(wrong is None, f"killed at {deaths} of {calls}: {wrong}")
        yield tally


def until_killed(stage: Stage, out: Path, at: int) -> int:
    """In a child: the command, which dies before a call that writes."""
    Killed(out, pytest.MonkeyPatch(), cut_at=at)
    return stage.run(out)


def power(scene: Scene) -> Iterator[Tally]:
    """The power is cut before every call; what was not fsynced is gone, short or zero."""
    for stage in stages(scene.base):
        tally = Tally(f"power cut · {stage.name}", "what was finished is there, the same command ends the same")
        expected, calls = scene.whole(stage)
        tries = scene.times(6 if stage.name == "train" else 1)
        for at in range(1, calls + 1) if scene.scale >= 1 else range(1, calls + 1, max(1, round(1 / scene.scale))):
            for number in range(tries):
                out, after = scene.base / "out", scene.base / "after"
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()

                ended = child(partial(_until_the_cut, stage, out, after, at, scene.seed * 1000 + number))
                if ended.status:
                    tally.count(False, f"cut {at}: {ended.said[-300:]}")
                    continue
                shutil.rmtree(out)
                after.rename(out)
                wrong = goes_on(stage, out, expected)
                tally.count(wrong is None, f"cut {at} of {calls}, dice {number}: {wrong}")
        yield tally


def _until_the_cut(stage: Stage, out: Path, after: Path, at: int, seed: int) -> int:
    disk = Disk(out, pytest.MonkeyPatch(), cut_at=at, seed=seed)
    try:
        stage.run(out)
    except PowerCut:
        disk.survivors(after)
        return 0
    return 1


def writers(scene: Scene) -> Iterator[Tally]:
    """The same command twice at the same time."""
    for stage in stages(scene.base):
        tally = Tally(f"two at once · {stage.name}", "one sentence or the same end, never a mixture")
        expected, _ = scene.whole(stage)
        for number in range(scene.times(10)):
            out = scene.base / "out"
            shutil.rmtree(out, ignore_errors=True)
            pids = []
            for at in range(2):
                pid = os.fork()
                if pid == 0:
                    words = (scene.base / f"said{at}").open("w")
                    os.dup2(words.fileno(), 1)
                    os.dup2(words.fileno(), 2)
                    torch.set_num_threads(1)
                    time.sleep(at * scene.dice("writers", number).random() * 0.2)
                    try:
                        status = stage.run(out)
                    except BaseException:
                        traceback.print_exc()
                        status = 70
                    sys.stderr.flush()
                    os._exit(status)
                pids.append(pid)
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            said = [(scene.base / f"said{at}").read_text() for at in range(2)]
            good = all(Ended(*pair).in_one_sentence for pair in zip(statuses, said, strict=True)) and 0 in statuses
            wrong = None if good else f"{statuses}: {said}"
            wrong = wrong or goes_on(stage, out, expected)
            tally.count(wrong is None, f"try {number}: {wrong}")
        yield tally
