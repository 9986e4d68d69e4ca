"""A background thread that does queued jobs in order.

The queue is bounded in bytes, so that a caller who is faster than the thread has to wait. A failure in the thread is
raised in the caller.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class BackgroundWorker:
    """Runs jobs one after the other in a thread.

    After a failure the rest of the queue is dropped, and every later call raises that failure.
    """

    def __init__(self, name: str, limit: int):
        self._limit, self._waiting, self._busy = limit, 0, False
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._closed = False
        self.seconds_blocked = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None], size: int) -> None:
        """Queue a job of ``size`` bytes. Waits while the limit is reached; a job larger than the limit runs alone."""
        with self._changed:
            began = time.perf_counter()
            while self._waiting and self._waiting + size > self._limit and self._failure is None:
                self._changed.wait()
            self.seconds_blocked += time.perf_counter() - began
            self._raise_failure()
            self._jobs.append((job, size))
            self._waiting += size
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until every job is done."""
        with self._changed:
            while (self._jobs or self._busy) and self._failure is None:
                self._changed.wait()
            self._raise_failure()

    def close(self) -> None:
        """Finish the running job, drop the rest and end the thread."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job, size = self._jobs.popleft()
                self._busy = True
            try:
                job()
            except BaseException as failure:  # raised later in the caller's thread
                with self._changed:
                    self._failure = failure
                    self._jobs.clear()
            with self._changed:
                self._busy = False
                self._waiting -= size
                del job
                self._changed.notify_all()
