"""Batches that are on the GPU before they are asked for: gathered by a thread, and copied while the batch before
trains.

On CUDA they are gathered into page-locked memory and copied on a stream of their own, so that neither gathering nor the
copy takes time from a step. On a CPU a thread more would take a core from the step, a fifth of its time where steps are
small: there every batch is gathered when it is asked for. What a checkpoint keeps is the stream's position behind the
last batch that was taken, not behind the last that was gathered.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...cache.store import ActivationStore
from ...cache.windows import WindowBatch, WindowStream
from ..config import DataConfig
from .inputs import Inputs

_AHEAD = {"cuda": 2}


@dataclass(frozen=True)
class _Ready:
    batch: WindowBatch
    state: dict[str, Any]  # of the stream, behind this batch
    copied: torch.cuda.Event | None


class Feed:
    """The batches of a stream, on a device, in the stream's order. Single consumer; :meth:`close` it.

    Args:
        stream: where they come from; it belongs to the feed from now on.
        device: where they go.
        ahead: batches made before they are asked for; None: as the device likes it.

    """

    def __init__(self, stream: WindowStream, device: torch.device, *, ahead: int | None = None):
        self._stream, self._device, self.window = stream, device, stream.window
        self._most_ahead = _AHEAD.get(device.type, 0) if ahead is None else ahead
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "feed")
        self._ahead: deque[Future[_Ready]] = deque()
        self._state, self._waited = stream.state_dict(), 0.0

    @property
    def seconds_waiting(self) -> float:
        """Time that training waited: for the thread, or without one for the disk."""
        return self._waited if self._most_ahead else self._stream.seconds_waiting

    @property
    def epoch(self) -> int:
        """Passes over the rows completed before the next batch."""
        return self._state["epoch"]

    def next_batch(self) -> WindowBatch:
        """The next batch, its activations (bfloat16) on the device.

        Raises:
            UsageError, StoreError: see :class:`~tcsae.cache.windows.WindowStream`.

        """
        ready = self._take() if self._most_ahead else self._make()
        if ready.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(ready.copied)
            ready.batch.x_NWD.record_stream(current)  # its memory is not reused before this stream is done with it
        self._state = ready.state
        return ready.batch

    def _take(self) -> _Ready:
        while len(self._ahead) <= self._most_ahead:
            self._ahead.append(self._thread.submit(self._make))
        began = time.perf_counter()
        ready = self._ahead.popleft().result()
        self._waited += time.perf_counter() - began
        return ready

    def _make(self) -> _Ready:
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            batch = self._stream.next_batch()
            on_device = replace(batch, x_NWD=batch.x_NWD.to(self._device, non_blocking=True))
            copied = None
            if self._copies is not None:
                copied = torch.cuda.Event()
                copied.record(self._copies)
        return _Ready(on_device, self._stream.state_dict(), copied)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands behind the last batch taken; plain JSON."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to such a position.

        Raises:
            UsageError: the state is of another stream.

        """
        self._stop_gathering()
        self._stream.load_state_dict(state)
        self._state = self._stream.state_dict()

    def _stop_gathering(self) -> None:
        for future in self._ahead:
            future.cancel()
        wait(self._ahead)
        self._ahead.clear()

    def close(self) -> None:
        """End the thread, and the stream's."""
        self._stop_gathering()
        self._thread.shutdown()
        self._stream.close()


def open_stream(store: ActivationStore, data: DataConfig, inputs: Inputs, *, pin_memory: bool = False) -> WindowStream:
    """The windows of a data configuration."""
    return WindowStream(
        store,
        window=data.window,
        tokens_per_batch=data.batch_size,
        pool_tokens=data.pool or None,
        seed=data.seed,
        norm_limit=inputs.norm_limit,
        rows=inputs.rows,
        together=2 if data.siblings else 1,
        pin_memory=pin_memory,
    )


def open_feed(store: ActivationStore, data: DataConfig, inputs: Inputs, device: torch.device) -> Feed:
    """The same, on their way to a device."""
    return Feed(open_stream(store, data, inputs, pin_memory=device.type == "cuda"), device)
