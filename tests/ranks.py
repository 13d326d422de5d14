"""Several ranks in processes of their own, for tests: a hang fails, nothing is left behind."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# So that a rank starts in no time; the first update of any optimizer imports torch._dynamo.
CONTEXT.set_forkserver_preload(["torch._dynamo", "engine.run.trainer", "tests.toy"])


@dataclass
class Ended:
    """How a rank ended: what its function returned, its exit code, what it wrote to stderr, when."""

    value: Any
    code: int | None
    said: str
    seconds: float


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Ended]:
    """Call ``function(*arguments)`` on each of ``count`` ranks, as torchrun would start them."""
    store, began = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), time.monotonic()
    ranks = []
    for rank in range(count):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "OMP_NUM_THREADS": 1}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        here, there = CONTEXT.Pipe()
        words = {name: str(value) for name, value in environment.items()}
        process = CONTEXT.Process(target=_rank, args=(words, function, arguments, there), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    ended: dict[int, Ended] = {}
    try:
        while len(ended) < count:
            assert time.monotonic() - began < timeout, f"ranks {set(range(count)) - set(ended)} hang"
            for rank, (process, pipe) in enumerate(ranks):
                if rank in ended:
                    continue
                if pipe.poll(0.01):
                    try:
                        value, said = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        value, said = None, ""
                    process.join(10)
                    ended[rank] = Ended(value, process.exitcode, said, time.monotonic() - began)
                elif process.exitcode is not None and not pipe.poll(0.01):
                    ended[rank] = Ended(None, process.exitcode, "", time.monotonic() - began)
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    return [ended[rank] for rank in range(count)]


def values(ended: list[Ended]) -> list[Any]:
    """What all ranks returned; none of them may have failed."""
    failed = [f"rank {rank} ended with {one.code}: {one.said}" for rank, one in enumerate(ended) if one.code]
    assert not failed, "\n".join(failed)
    return [one.value for one in ended]


def _rank(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...], pipe: Any) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    said = io.StringIO()

    def leave(code: int) -> None:
        pipe.send_bytes(pickle.dumps((None, said.getvalue())))
        real_exit(code)

    real_exit, os._exit = os._exit, leave  # so that a failing rank's words are heard here too
    value = None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(sys.stderr):
        try:
            value = function(*arguments)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=said)
            leave(1)
        finally:
            os._exit = real_exit
    pipe.send_bytes(pickle.dumps((value, said.getvalue())))  # by value: shared tensors would die with this process
    pipe.close()
