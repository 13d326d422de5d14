"""Rendezvous: the processes that torchrun starts find each other and become a world."""

from __future__ import annotations

import hashlib
import importlib
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
"""Timeout of the process group that carries messages: in effect none. A link watches the clock itself while it waits,
and its error names both ranks and the order."""


def world_size() -> int:
    """Number of ranks of the job, from torchrun's environment; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _job() -> str:
    """A unique name for this launch of torchrun, which stays the same when torchrun restarts the ranks.

    It is empty without torchrun. The name lives in the store of torchrun's agent, which outlives the ranks. torchrun's
    counter of restarts would not do, because every host counts its own.
    """
    # The first rank to call compare_set stores its proposal; every other rank gets that value back.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    return str(_store(False, timedelta(seconds=60)).compare_set("local_learning_job", "", uuid.uuid4().hex).decode())


def _store(serving: bool, timeout: timedelta) -> Any:
    """The store at which the ranks meet: served by torchrun's agent, or by rank 0 (``serving``) if there is none."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, None, serving, timeout, wait_for_workers=False)  # type: ignore[attr-defined]


def _meet(rank: int, size: int, seconds: float) -> Any:
    """A store that only the ranks of this start use, so that none of them reads what an earlier start has written.

    After a restart, torchrun's store still holds what the previous ranks wrote, including the addresses of processes
    that are gone. Therefore every rank publishes a fresh number, rank 0 posts the list of all numbers, and each rank
    confirms a list that contains its own number. When all ranks have confirmed the same list, its digest becomes the
    prefix of the new store::

        rank r: call/r    rank 0: list    rank r: seen/r    rank 0: go

    Raises:
        ValueError: a rank did not arrive within ``seconds``.
    """
    store = _store(rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True", timedelta(seconds=seconds))
    own, deadline = uuid.uuid4().hex, time.monotonic() + seconds

    def read(key: str) -> str:
        return str(store.get(key).decode()) if store.check([key]) else ""

    store.set(f"call/{rank}", own)
    # Any key may still hold a value of an earlier start. That does no harm: a list with a stale number is never
    # confirmed, because its process is gone, and rank 0 posts a new list as soon as the new number arrives.
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
            raise ValueError(
                f"rank {rank}: not all of the {size} ranks arrived within {seconds:.0f} s; see placement.timeout"
            )
        time.sleep(0.02)  # poll: a blocking get would return a stale value at once
    name = hashlib.sha256(posted.encode()).hexdigest()
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def join(config: PlacementConfig, device: str) -> World:
    """Meet the other ranks that torchrun started; without torchrun, the world has one rank.

    Args:
        device: the value of ``train.device``.

    Raises:
        ValueError: ``placement.replicas`` does not divide the number of ranks, the backend is NCCL but some rank has no
            GPU of its own, the device does not exist, or a rank did not arrive in time.
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
        torch.cuda.set_device(mine)  # before any collective: NCCL and DeepSpeed use the current device
    # The first update of any optimizer imports torch._dynamo, which takes seconds. Import it before the ranks meet,
    # because a neighbour that waits for the first message counts those seconds against placement.timeout.
    importlib.import_module("torch._dynamo")
    rank, timeout = int(os.environ["RANK"]), timedelta(seconds=config.timeout)
    store = _meet(rank, size, config.timeout)
    # The default group carries small objects of the host, so gloo serves it even where tensors go by NCCL.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    every: list[Any] = [None] * size
    dist.all_gather_object(every, own)
    if config.backend == "nccl" and not all(every):
        raise ValueError("placement.backend: nccl needs a GPU for each rank of every host; use gloo")
    # NCCL refuses two ranks on one GPU, so all ranks must agree on the backend.
    nccl = all(every) and config.backend != "gloo"
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    links = dist.new_group(list(range(size)), timeout=FOREVER, backend=backend)
    # Every rank must create every group, in the same order, including the groups that it is not a member of.
    stage_group = None
    for start in range(0, size, config.replicas) if config.replicas > 1 else ():
        members = list(range(start, start + config.replicas))
        group = dist.new_group(members, timeout=timeout, backend=backend)
        if rank in members:
            stage_group = group
    wire_device = mine if nccl else torch.device("cpu")
    return World(rank, size, config.replicas, mine, links, stage_group, config.timeout, _job(), wire_device)
