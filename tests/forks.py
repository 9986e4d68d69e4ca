"""Processes that tests stop and kill, forked from one that has imported everything: a start takes no seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# One thread, as the tests themselves: nothing but this loop runs when it forks.
_SERVER = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
import tcsae.evaluate.codes.encode, tcsae.evaluate.run, tcsae.extract.run, tcsae.pipeline
import tcsae.study.run, tcsae.train.run
import transformers.modeling_utils
sys.path.insert(0, os.environ["TESTS"])
for line in sys.stdin:
    code, arguments, said = json.loads(line)
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(words, 1)
            os.dup2(words, 2)
            exec(code, {"__name__": "__main__", "arguments": arguments})
            status = 0
        except SystemExit as leaving:
            status = leaving.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """A server of forks, started when the first one is wanted.

    Args:
        folder: gets what they print.

    """

    def __init__(self, folder: Path):
        self._folder, self._server = folder, None
        self._number = 0
        self._last: Fork | None = None

    def start(self, code: str, *arguments: object) -> Fork:
        """Run Python code, which finds ``arguments`` by that name, in a process of its own; one at a time."""
        if self._server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            environment["TESTS"] = str(Path(__file__).parent)
            self._server = subprocess.Popen([sys.executable, "-c", _SERVER], env=environment, **pipes)
        if self._last is not None:
            self._last.end()  # of a test that failed
        self._number += 1
        said = self._folder / f"{self._number}.txt"
        self._server.stdin.write(json.dumps([code, [str(each) for each in arguments], str(said)]) + "\n")
        self._server.stdin.flush()
        self._last = Fork(int(self._server.stdout.readline()), said, self._server)
        return self._last

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            if self._last is not None:
                self._last.end()
            self._server.communicate()


class Fork:
    """One of them."""

    def __init__(self, pid: int, said: Path, server: subprocess.Popen):
        self.pid, self._said, self._server = pid, said, server
        self._status: int | None = None

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self._said.read_text() if self._said.exists() else ""

    def runs(self) -> bool:
        """Whether it has not ended: a zombie has."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it, unless it has ended."""
        if self.runs():
            self.send(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Its status when it has ended; negative: killed by that signal."""
        if self._status is None:
            self._status = int(self._server.stdout.readline())
        return self._status
