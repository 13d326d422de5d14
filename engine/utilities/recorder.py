"""Record what a rank did, and when."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Entry:
    """One thing that a rank did, from ``start`` to ``stop`` in seconds since 1970, by the clock of its machine.

    ``kind`` is ``train`` (a local step), ``evaluate``, ``wait`` (idle, waiting for a neighbour), ``save``, ...
    ``block`` and ``message`` are -1 where the entry belongs to none. Entries of one rank do not overlap.
    """

    rank: int
    block: int
    kind: str
    message: int
    start: float
    stop: float


class Recorder:
    """Keeps the newest ``limit`` entries of a rank, so that a long run does not fill memory.

    On a GPU, where the host only queues work, the times are those of CUDA events on the current stream.

    Example:
        >>> recorder = Recorder(rank=1, limit=2)
        >>> for message in range(3):
        ...     with recorder.span(block=4, kind="train", message=message):
        ...         pass
        >>> [entry.message for entry in recorder.entries]
        [1, 2]
    """

    def __init__(self, rank: int, device: torch.device | None = None, limit: int = 4096) -> None:
        self.rank, self._cuda = rank, device is not None and device.type == "cuda"
        self._kept: deque[tuple[int, str, int, Any, Any]] = deque(maxlen=limit)
        # Ranks can only be compared by the time of day, but that may jump backwards. Add a monotonic clock, which is
        # read for every entry, to a time of day that is read once.
        self._epoch = time.time() - time.perf_counter()
        self._first = self._now()
        if self._cuda:
            # CUDA events only tell the time between two of them, so the first one is tied to the time of day here.
            self._first.synchronize()
            self._epoch = time.time()

    @property
    def entries(self) -> list[Entry]:
        """The entries that were kept, oldest first. On a GPU this waits until all of them have ended."""
        return [
            Entry(self.rank, block, kind, message, self._seconds(start), self._seconds(stop))
            for block, kind, message, start, stop in self._kept
        ]

    @contextmanager
    def span(self, block: int, kind: str, message: int) -> Iterator[None]:
        """Record the code inside the ``with`` block, unless it raises."""
        start = self._now()
        yield
        self._kept.append((block, kind, message, start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, moment: Any) -> float:
        """A moment of ``_now``, in seconds since 1970."""
        if not self._cuda:
            return float(self._epoch + moment)
        moment.synchronize()
        return float(self._epoch + self._first.elapsed_time(moment) / 1000)  # elapsed_time is in milliseconds


def recording(recorder: Recorder | None, block: int, kind: str, message: int) -> AbstractContextManager[None]:
    """``recorder.span``, or an empty context without a recorder."""
    return nullcontext() if recorder is None else recorder.span(block, kind, message)
