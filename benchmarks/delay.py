"""Simulate a long way between ranks: every message of torch.distributed is delayed."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


class _Delayed:
    """A send that begins later."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.work: dist.Work | None = None

    def wait(self, *arguments: Any) -> Any:
        self.begun.wait()
        return None if self.work is None else self.work.wait(*arguments)

    def is_completed(self) -> bool:
        return self.begun.is_set()


def delay_sends(seconds: float) -> None:
    """Have every ``isend`` of this process begin ``seconds`` later; sends stay in order and do not delay each other.

    The pipelines of this project and of torch send only by ``isend``. Collectives are not delayed.
    """
    real = dist.isend
    waiting: queue.Queue[tuple[float, _Delayed, tuple[Any, ...], dict[str, Any]]] = queue.Queue()

    def isend(*arguments: Any, **named: Any) -> _Delayed:
        delayed = _Delayed()
        waiting.put((time.monotonic() + seconds, delayed, arguments, named))
        return delayed

    def send() -> None:
        while True:
            due, delayed, arguments, named = waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            delayed.work = real(*arguments, **named)
            delayed.begun.set()

    threading.Thread(target=send, daemon=True).start()
    # torch's pipelines ask whether an operation is one of the two they know, so both names must be this one.
    dist.isend = distributed_c10d.isend = isend  # type: ignore[assignment]
