"""Ranks meet: torchrun's processes become a world."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.config import PlacementConfig
from engine.distributed.world import World
from engine.utilities.device import choose_device

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
