"""What is counted, and work in a process of its own that may be killed."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Tally:
    """What one section promises, and how often it was kept."""

    name: str
    promise: str
    tried: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)

    def count(self, kept: bool, what: str) -> None:
        """One more try."""
        self.tried += 1
        self.survived += kept
        if not kept:
            self.failures.append(what)
            print(f"  {self.name}: {what}", file=sys.stderr, flush=True)


@dataclass
class Ended:
    """How a child ended: its status (negative: killed by that signal) and what it said."""

    status: int
    said: str

    @property
    def in_one_sentence(self) -> bool:
        """Whether it ended well, with one line of error, or with a report that names what it could not measure."""
        errors = [line for line in self.said.splitlines() if line.startswith(("error: ", "  failed "))]
        return self.status == 0 or (self.status in (1, 2) and len(errors) == 1 and "Traceback" not in self.said)


def child(work: Callable[[], int], *, memory: int | None = None) -> Ended:
    """Run in a process of its own: forked, so that torch need not be imported again."""
    with tempfile.TemporaryFile("w+", errors="replace") as words:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(words.fileno(), 1)
                os.dup2(words.fileno(), 2)
                torch.set_num_threads(1)
                if memory:
                    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
                status = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, code = os.waitpid(pid, 0)
        words.seek(0)
        return Ended(os.waitstatus_to_exitcode(code), words.read())
