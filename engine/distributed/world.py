"""The ranks of a job: their roles, what they exchange apart from messages, and how they report a failure."""

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
from engine.utilities.command import report_failure
from engine.utilities.console import first_of_host

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks, which form a mesh of pipeline stages x replicas.

    The replicas of a stage have consecutive ranks, beginning with ``stage * replicas``. With as many ranks per host as
    replicas, gradients therefore stay within a host, and only messages travel between hosts::

        2 replicas       stage 0   stage 1   stage 2
        replica 0        rank 0 -> rank 2 -> rank 4      (main)
        replica 1        rank 1 -> rank 3 -> rank 5

    The main rank is replica 0 of the last stage, where losses and predictions come out. Only the main rank writes logs
    and prints.
    """

    rank: int = 0
    size: int = 1
    replicas: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    links: dist.ProcessGroup | None = None
    """Process group of all ranks, for messages."""
    stage_group: dist.ProcessGroup | None = None
    """Process group of the replicas of this rank's stage; None if there is only one replica."""
    timeout: float = 300.0
    job: str = ""
    """Name of this launch of torchrun, which stays the same over restarts."""
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
        """Whether this is the main rank, which logs and prints."""
        return self.rank == self.size - self.replicas

    @property
    def first(self) -> bool:
        """Whether this rank belongs to the first stage, which reads the data and issues the orders."""
        return self.stage == 0

    def inbox(self, depth: int) -> Inbox | None:
        """The link from the same replica of the stage before; None in the first stage."""
        if self.first:
            return None
        peer = self.rank - self.replicas
        wire = GroupWire(peer, self.links, self.wire_device)
        return Inbox(wire, (self.rank, peer), self.device, depth=depth, timeout=self.timeout)

    def outbox(self, depth: int) -> Outbox | None:
        """The link to the same replica of the next stage; None in the last stage."""
        if self.stage == self.stages - 1:
            return None
        peer = self.rank + self.replicas
        wire = GroupWire(peer, self.links, self.wire_device)
        return Outbox(wire, (self.rank, peer), depth=depth, timeout=self.timeout)

    def from_main(self, value: T) -> T:
        """The main rank's value, on every rank (a collective call)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.size - self.replicas)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank (a collective call)."""
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
        total = values.cpu()  # the sum is small and rare: spare the GPU a collective
        dist.all_reduce(total, group=self.stage_group)
        return total

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A context in which only the first rank that fails prints its error; the others fail because of it.

        A rank records its failure before its links break, so it is ahead of the ranks that miss it. A rank that was
        killed records nothing; then the first rank that misses it prints the error.
        """
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            self.tell(error)
            # An orderly exit would wait for threads and process groups that wait for other ranks. The exit code is 2
            # for a user's error, as in ``run_tool``.
            os._exit(2 if isinstance(error, ValueError) else 1)

    def tell(self, error: Exception) -> None:
        """Record this rank's failure, and print it if it is the first of the job; a second call does nothing."""
        if self.size == 1 or getattr(error, "told", False):
            return
        error.told = True  # type: ignore[attr-defined]
        # torchrun sends SIGTERM to all ranks as soon as one has ended, which must not cut off the message.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        first = self._first(f"rank {self.rank}: {error}")
        report_failure(f"error: {first}")
        if first == f"rank {self.rank}: {error}":
            if isinstance(error, ValueError | LinkError):
                print(f"error: {error}", file=sys.stderr)
            elif isinstance(error, BlockError) and _lost(error.cause):
                print(f"error: rank {self.rank}: a replica of block {error.block} is gone: {error}", file=sys.stderr)
            else:
                print(f"error: rank {self.rank}: {error}", file=sys.stderr)
                traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()

    def _first(self, mine: str) -> str:
        """What the first rank that failed has said; ``mine`` if that is this one."""
        try:
            return str(dist.distributed_c10d._get_default_store().compare_set("first_failure", "", mine).decode())
        except Exception:
            return mine  # the store is gone with the process that served it, so there is nothing left to ask

    @contextmanager
    def one_of_a_host_first(self) -> Iterator[None]:
        """A context that the first rank of each host passes through before the others enter it.

        It may unpack or download files, which the others then find.
        """
        # The barrier is one collective: the first ranks reach it on leaving, the others on entering.
        ahead = first_of_host()
        if self.size > 1 and not ahead:
            dist.barrier()
        yield
        if self.size > 1 and ahead:
            dist.barrier()

    def leave(self) -> None:
        """Wait for the other ranks, then leave the process groups."""
        if self.size > 1:
            dist.barrier()  # a rank that left early would break collectives that others are still in
            dist.destroy_process_group()


def _lost(cause: BaseException) -> bool:
    """Whether a collective failed because another rank is gone; gloo raises a RuntimeError with this text."""
    return isinstance(cause, dist.DistError) or "by peer" in str(cause)
