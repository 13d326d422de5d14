"""The ranks of a job: who is who, what they tell each other beside messages, and whose failure came first."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine.distributed.transport import Inbox, LinkError, Outbox
from engine.distributed.wire import GroupWire
from engine.learning.outcome import BlockError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank among the others: a mesh of pipeline stages x replicas.

    Ranks ``stage * replicas`` and on are a stage's replicas: with as many ranks a host as replicas, gradients
    stay within hosts and only messages travel between them::

        2 replicas       stage 0   stage 1   stage 2
        replica 0        rank 0 -> rank 2 -> rank 4      (main)
        replica 1        rank 1 -> rank 3 -> rank 5

    ``main`` is where a run's losses and figures come together: the last stage's replica 0. It alone writes
    logs and prints.
    """

    rank: int = 0
    size: int = 1
    replicas: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    links: dist.ProcessGroup | None = None
    """Of all ranks, for messages."""
    stage_group: dist.ProcessGroup | None = None
    """The replicas of this rank's stage; None if there is but one."""
    timeout: float = 300.0
    job: str = ""
    """Names this launch of torchrun, restarts included."""
    wire_device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def stages(self) -> int:
        return self.size // self.replicas

    @property
    def stage(self) -> int:
        return self.rank // self.replicas

    @property
    def replica(self) -> int:
        return self.rank % self.replicas

    @property
    def main(self) -> bool:
        return self.rank == self.size - self.replicas

    @property
    def first(self) -> bool:
        """Whether this rank reads the data and tells the course of the run."""
        return self.stage == 0

    def inbox(self, depth: int) -> Inbox | None:
        """The link from the stage before."""
        if self.first:
            return None
        peer = self.rank - self.replicas
        wire = GroupWire(peer, self.links, self.wire_device)
        return Inbox(wire, (self.rank, peer), self.device, depth=depth, timeout=self.timeout)

    def outbox(self, depth: int) -> Outbox | None:
        """The link to the next stage."""
        if self.stage == self.stages - 1:
            return None
        peer = self.rank + self.replicas
        wire = GroupWire(peer, self.links, self.wire_device)
        return Outbox(wire, (self.rank, peer), depth=depth, timeout=self.timeout)

    def from_main(self, value: T) -> T:
        """The main rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.size - self.replicas)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_over_replicas(self, *numbers: int) -> list[int]:
        """The sums of ``numbers`` over this stage's replicas."""
        return [int(number) for number in self.add_over_replicas(torch.tensor(numbers))]

    def add_over_replicas(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of ``values`` over this stage's replicas."""
        if self.stage_group is None:
            return values
        total = values.cpu()
        dist.all_reduce(total, group=self.stage_group)
        return total

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Of several ranks that fail, the first says why and the others say nothing: theirs follows from it.

        A rank notes its failure before its links break, so a failing rank comes before those that miss it. One
        that was killed notes nothing; the first to miss it says so.
        """
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            self.tell(error)
            # Threads and groups that wait for other ranks would hold up an orderly end.
            os._exit(2 if isinstance(error, ValueError) else 1)

    def tell(self, error: Exception) -> None:
        """Note this rank's failure and, if it is the job's first, say it; once. torchrun's SIGTERM is too late then."""
        if self.size == 1 or getattr(error, "told", False):
            return
        error.told = True  # type: ignore[attr-defined]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._first(str(error)):
            if isinstance(error, ValueError | LinkError):
                print(f"error: {error}", file=sys.stderr)
            elif isinstance(error, BlockError) and _lost(error.cause):
                print(f"error: rank {self.rank}: a replica of block {error.block} is gone: {error}", file=sys.stderr)
            else:
                print(f"error: rank {self.rank}: {error}", file=sys.stderr)
                traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()

    def _first(self, text: str) -> bool:
        try:
            store, mine = dist.distributed_c10d._get_default_store(), f"rank {self.rank}: {text}"
            return bool(store.compare_set("first_failure", "", mine).decode() == mine)
        except Exception:
            return True  # nobody is left to ask

    @contextmanager
    def one_of_a_host_first(self) -> Iterator[None]:
        """The first rank of each host goes ahead (and unpacks or downloads what the others then find)."""
        ahead = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if self.size > 1 and not ahead:
            dist.barrier()
        yield
        if self.size > 1 and ahead:
            dist.barrier()

    def leave(self) -> None:
        """Part from the other ranks."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def _lost(cause: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(cause, dist.DistError) or "by peer" in str(cause)
