"""The ranks of a job: who is who, what they tell each other beside messages, and whose failure came first."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine.block import BlockError
from engine.config import PlacementConfig
from engine.device import choose_device
from engine.transport import GroupWire, Inbox, LinkError, Outbox

T = TypeVar("T")

FOREVER = timedelta(days=100)
"""For links: who waits for a message looks at the clock himself."""


def world_size() -> int:
    """Ranks of the job, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _job() -> str:
    """A name that no other launch of torchrun has, kept over its restarts; empty without torchrun.

    Its agent's store outlives the ranks. (Its counter of restarts does not tell: each host counts its own.)
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    return str(_store(False, timedelta(seconds=60)).compare_set("local_learning_job", "", uuid.uuid4().hex).decode())


def _store(serving: bool, timeout: timedelta) -> Any:
    """The store at which the ranks meet; torchrun's agent serves it, without one rank 0 does."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, None, serving, timeout, wait_for_workers=False)  # type: ignore[attr-defined]


def _meet(rank: int, size: int, seconds: float) -> Any:
    """A store of this start of the ranks alone, in which nothing of an earlier start can be taken for its own.

    torchrun's store keeps what ranks wrote before a restart, addresses of processes that are gone included. So every
    rank calls out a fresh number, rank 0 posts the list of all it hears, each rank confirms a list with its own
    number, and when all have confirmed the same one, its digest is the store's name::

        rank r: call/r    rank 0: list    rank r: seen/r    rank 0: go

    Raises:
        ValueError: some rank did not come within ``seconds``.
    """
    store = _store(rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True", timedelta(seconds=seconds))
    own, deadline = uuid.uuid4().hex, time.monotonic() + seconds

    def read(key: str) -> str:
        return str(store.get(key).decode()) if store.check([key]) else ""

    store.set(f"call/{rank}", own)
    while True:
        if rank == 0:
            calls = [read(f"call/{other}") for other in range(size)]
            posted = " ".join(calls) if all(calls) else ""
            store.set("list", posted)
            if posted and all(read(f"seen/{other}") == posted for other in range(1, size)):
                store.set("go", posted)
                break
        else:
            posted = read("list")
            if own in posted:
                store.set(f"seen/{rank}", posted)
                if read("go") == posted:
                    break
        if time.monotonic() > deadline:
            raise ValueError(f"rank {rank}: not all of {size} ranks came within {seconds:.0f} s; see placement.timeout")
        time.sleep(0.02)
    name = hashlib.sha256(posted.encode()).hexdigest()
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


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


def join(config: PlacementConfig, device: str) -> World:
    """Meet the other ranks that torchrun has started; alone if it has started none.

    Raises:
        ValueError: replicas do not divide the ranks, or NCCL is asked for without a GPU for each rank.
    """
    size, local = world_size(), int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        if config.replicas > 1:
            raise ValueError(f"placement.replicas: {config.replicas} replicas need as many ranks, there is 1")
        return World(device=choose_device(device), job=_job())
    if size % config.replicas:
        raise ValueError(f"placement.replicas: {config.replicas} does not divide the {size} ranks torchrun started")
    mine, own = choose_device(device), False
    if mine.type == "cuda":
        count = torch.cuda.device_count()
        own = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= count and mine.index is None
        mine = torch.device("cuda", local % count if mine.index is None else mine.index)
        torch.cuda.set_device(mine)
    rank, timeout = int(os.environ["RANK"]), timedelta(seconds=config.timeout)
    store = _meet(rank, size, config.timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    every: list[Any] = [None] * size
    dist.all_gather_object(every, own)
    if config.backend == "nccl" and not all(every):
        raise ValueError("placement.backend: nccl needs a GPU for each rank of every host; use gloo")
    nccl = all(every) and config.backend != "gloo"
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    links = dist.new_group(list(range(size)), timeout=FOREVER, backend=backend)
    stage_group = None
    for start in range(0, size, config.replicas) if config.replicas > 1 else ():
        members = list(range(start, start + config.replicas))
        group = dist.new_group(members, timeout=timeout, backend=backend)
        if rank in members:
            stage_group = group
    wire_device = mine if nccl else torch.device("cpu")
    return World(rank, size, config.replicas, mine, links, stage_group, config.timeout, _job(), wire_device)
