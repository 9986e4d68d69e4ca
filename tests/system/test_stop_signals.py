"""Whatever asks a command to stop does what Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from tcsae.evaluate import run as evaluation
from tcsae.pipeline import main
from tcsae.system.stop_signals import SIGNALS, stop_signals


@pytest.mark.parametrize("name", SIGNALS)
def test_each_interrupts_and_is_as_before_afterwards(name):
    before = signal.getsignal(name)
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), name)
    assert signal.getsignal(name) is before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_change_nothing():
    seen = []

    def look():
        with stop_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_command_that_is_told_to_stop_says_so(monkeypatch, capsys, name):
    monkeypatch.setattr(evaluation, "evaluate", lambda _: os.kill(os.getpid(), getattr(signal, name)))
    assert main(["evaluate"]) == 130
    assert "stopped. What was committed stays; the same command goes on from there." in capsys.readouterr().err
