"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is finished stays, and the last words say how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_signals(handler: Callable[[int, Any], Any] = signal.default_int_handler) -> Iterator[None]:
    """Inside, the three signals that ask a process to stop call ``handler``, by default to raise KeyboardInterrupt.

    Only the main thread can arrange for that; in others nothing changes. A signal that is ignored stays so: ``nohup``
    ignores SIGHUP.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for one in SIGNALS:
            if signal.getsignal(one) not in (signal.SIG_IGN, None):
                before[one] = signal.signal(one, handler)
    try:
        yield
    finally:
        for one, old in before.items():
            signal.signal(one, old)
