"""Full disks, and a block device whose power is cut. Both need root, and are left out without it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tcsae.train.run_folder.record import load_run

from .children import Tally, child
from .stages import Scene, Stage, goes_on, stages


def full(scene: Scene) -> Iterator[Tally]:
    """A file system that ends after so many bytes; then there is room, and the same command is given again."""
    if os.geteuid():
        return
    for stage in stages(scene.base):
        tally = Tally(f"disk full · {stage.name}", "one sentence, nothing half written, the same command goes on")
        expected, _ = scene.whole(stage)
        size = sum(file.stat().st_size for file in (scene.base / "whole" / stage.name).rglob("*") if file.is_file())
        points = scene.times(40)
        for number in range(points):
            # Pages of 4 KiB, and for each folder and file a little of the kernel's own.
            room = 4096 * max(1, round((number + 0.5) / points * size * 1.5 / 4096))
            with mounted(["-t", "tmpfs", "-o", f"size={room}", "tmpfs"], scene.base / "disk") as disk:
                out = disk / "out"
                first = child(lambda out=out, stage=stage: stage.run(out))
                halves = [file.name for file in out.rglob("*.partial")] if out.exists() else []
                subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
                wrong = None if first.in_one_sentence else f"said {first.said[-300:]}"
                wrong = wrong or (f"left {halves[0]}" if halves else None) or goes_on(stage, out, expected)
                tally.count(wrong is None, f"room for {room} of {size} bytes: {wrong}")
        yield tally


@contextmanager
def mounted(what: list[str], at: Path) -> Iterator[Path]:
    """A file system for the block."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", *what, str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def device(scene: Scene) -> Iterator[Tally]:
    """ext4 (and xfs, where there is one) on a loop device; the power is cut by looking at a copy of its blocks."""
    if os.geteuid() or shutil.which("losetup") is None:
        return
    stage = stages(scene.base)[0]
    for kind in ("ext4", "xfs"):
        if shutil.which(f"mkfs.{kind}") is None:
            continue
        tally = Tally(f"power cut · train on {kind}", "what was finished is there, the same command ends the same")
        expected, _ = scene.whole(stage)
        for number in range(scene.times(40)):
            wrong = _cut_device(scene, kind, stage, expected, scene.dice(kind, number))
            tally.count(wrong is None, f"try {number}: {wrong}")
        yield tally


def _cut_device(scene: Scene, kind: str, stage: Stage, expected: object, dice: random.Random) -> str | None:
    image, copy = scene.base / "image", scene.base / "copy"
    with image.open("wb") as file:
        file.truncate((64 if kind == "ext4" else 320) << 20)
    subprocess.run([f"mkfs.{kind}", "-q", *(["-f"] if kind == "xfs" else ["-F"]), str(image)], check=True)
    with mounted(["-o", "loop", str(image)], scene.base / "disk") as disk:
        pid = os.fork()
        if pid == 0:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            torch.set_num_threads(1)
            os._exit(stage.run(disk / "out"))
        after_the_end = dice.random() < 0.3
        if not after_the_end:
            time.sleep(dice.random() * 0.8)
            os.kill(pid, signal.SIGSTOP)
        else:
            os.waitpid(pid, 0)
        subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
        if not after_the_end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    with mounted(["-o", "loop", str(copy)], scene.base / "disk") as disk:
        out = disk / "out"
        finished = (out / "a/train.json").exists() and load_run(out / "a").finished
        if after_the_end and not finished:
            return "a run that was finished is not finished any more"
        out.mkdir(exist_ok=True)
        return goes_on(stage, out, expected)
