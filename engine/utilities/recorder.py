"""Notes what a rank did when."""

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
    """One thing a rank did, in seconds since 1970 by the clock of its machine.

    ``kind`` is ``train`` (a local step), ``evaluate``, ``wait`` (for a neighbour: idle), ``save``, ...; ``block`` and
    ``message`` are -1 where there is none. Entries of one rank do not overlap.
    """

    rank: int
    block: int
    kind: str
    message: int
    start: float
    stop: float


class Recorder:
    """Keeps the newest ``limit`` entries of a rank, so that a long run grows no list.

    On a GPU, where the host only queues work, times are those of events on the stream that works.

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
        # Ranks compare by the time of day; within a rank time must never go back, as that of the day may.
        self._epoch = time.time() - time.perf_counter()
        self._first = self._now()
        if self._cuda:
            self._first.synchronize()
            self._epoch = time.time()

    @property
    def entries(self) -> list[Entry]:
        """Oldest first."""
        return [
            Entry(self.rank, block, kind, message, self._seconds(start), self._seconds(stop))
            for block, kind, message, start, stop in self._kept
        ]

    @contextmanager
    def span(self, block: int, kind: str, message: int) -> Iterator[None]:
        """Record what runs inside; what fails is not recorded."""
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
        """Since 1970."""
        if not self._cuda:
            return float(self._epoch + moment)
        moment.synchronize()
        return float(self._epoch + self._first.elapsed_time(moment) / 1000)


def recording(recorder: Recorder | None, block: int, kind: str, message: int) -> AbstractContextManager[None]:
    """``recorder.span``; nothing where nothing is recorded."""
    return nullcontext() if recorder is None else recorder.span(block, kind, message)
