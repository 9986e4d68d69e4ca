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
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...cache.store import ActivationStore
from ...cache.stream import TokenStream
from ...cache.views import TokenBatch, View
from ..config import DataConfig
from ..plan import view_of
from .inputs import Inputs

_AHEAD = {"cuda": 2}


@dataclass(frozen=True)
class _Ready:
    batches: dict[View, TokenBatch]
    position: dict[str, int]  # of the stream, behind these batches
    copied: torch.cuda.Event | None


class BatchReader:
    """The batches of a stream, on a device, in the stream's order. Single consumer; :meth:`close` it.

    Args:
        stream: where they come from; it belongs to the feed from now on.
        device: where they go.
        ahead: batches made before they are asked for; None: as the device likes it.

    """

    def __init__(self, stream: TokenStream, device: torch.device, *, ahead: int | None = None):
        self._stream, self._device = stream, device
        self._most_ahead = _AHEAD.get(device.type, 0) if ahead is None else ahead
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "feed")
        self._ahead: deque[Future[_Ready]] = deque()
        self._position, self._waited = stream.position(), 0.0

    @property
    def seconds_waiting(self) -> float:
        """Time that training waited: for the thread, or without one for the disk."""
        return self._waited if self._most_ahead else self._stream.seconds_waiting

    @property
    def epoch(self) -> int:
        """Passes over the rows completed before the next batch."""
        return self._position["epoch"]

    def next_batches(self) -> dict[View, TokenBatch]:
        """The next batch of every view, its activations (bfloat16) on the device, whatever else it holds on the CPU.

        Raises:
            UsageError, StoreError: see :class:`~tcsae.cache.stream.TokenStream`.

        """
        ready = self._take() if self._most_ahead else self._make()
        if ready.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(ready.copied)
            for batch in ready.batches.values():
                batch.x_NWD.record_stream(current)  # its memory is not reused before this stream is done with it
        self._position = ready.position
        return ready.batches

    def add_view(self, view: View) -> None:
        """One view more from the next batch on. How many batches were made ahead, which is a matter of time, makes no
        difference: they are made again.
        """
        self._stop_gathering()
        if self._stream.position() != self._position:
            known = self._stream.views[0]
            self._stream.load_state_dict(self.state_dict(known), known)
        self._stream.add_view(view)

    def _take(self) -> _Ready:
        while len(self._ahead) <= self._most_ahead:
            self._ahead.append(self._thread.submit(self._make))
        began = time.perf_counter()
        ready = self._ahead.popleft().result()
        self._waited += time.perf_counter() - began
        return ready

    def _make(self) -> _Ready:
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            batches = self._stream.next_batches()
            on_device = [replace(each, x_NWD=each.x_NWD.to(self._device, non_blocking=True)) for each in batches]
            copied = None
            if self._copies is not None:
                copied = torch.cuda.Event()
                copied.record(self._copies)
        return _Ready(dict(zip(self._stream.views, on_device, strict=True)), self._stream.position(), copied)

    def state_dict(self, view: View) -> dict[str, Any]:
        """Where the stream stands behind the last batch taken, for a member that sees ``view``; plain JSON."""
        return {**self._position, "of": self._stream.identity(view)}

    def load_state_dict(self, state: dict[str, Any], view: View) -> None:
        """Go to such a position.

        Raises:
            UsageError: the state is of another stream.

        """
        self._stop_gathering()
        self._stream.load_state_dict(state, view)
        self._position = self._stream.position()

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


def open_stream(
    store: ActivationStore, data: Sequence[DataConfig], inputs: Inputs, *, pin_memory: bool = False
) -> TokenStream:
    """The batches of data configurations that differ in what they see of one stream."""
    first = data[0]
    return TokenStream(
        store,
        list(dict.fromkeys(map(view_of, data))),
        tokens_per_batch=first.batch_size,
        pool_tokens=first.pool or None,
        seed=first.seed,
        norm_limit=inputs.norm_limit,
        rows=inputs.rows,
        only=first.only,
        pin_memory=pin_memory,
    )


def open_batches(
    store: ActivationStore, data: Sequence[DataConfig], inputs: Inputs, device: torch.device
) -> BatchReader:
    """The same, on their way to a device."""
    return BatchReader(open_stream(store, data, inputs, pin_memory=device.type == "cuda"), device)
