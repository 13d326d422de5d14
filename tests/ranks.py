"""Several ranks in processes of their own, for tests: a hang fails, nothing is left behind."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
ROOT = Path(__file__).parents[1]
# What ranks of the engine's tests import, the function's own needs included: each would take a rank seconds.
PRELOADED = [
    *("torch._dynamo", "engine.run.trainer", "engine.utilities.page", "engine.learning.auxiliary.glcan"),
    *("engine.learning.auxiliary.greedy", "matplotlib.backends.backend_svg", "tools.train"),
]
OWN = {
    "tests/tasks/detection": ["tests.tasks.detection.test_task"],
    "tests/tasks/super_resolution": ["tests.tasks.super_resolution.test_task"],
    "tests/tasks/style_transfer": [
        *("tests.tasks.style_transfer.scin.test_task", "tests.tasks.style_transfer.denoiser.test_task"),
        "tests.tasks.style_transfer.diffusion.test_prompt_task",
    ],
    "tests": [
        *("tests.engine.distributed.test_pipeline", "tasks.classification.timm_chain", "tasks.classification.task"),
        *("torchvision.transforms.v2", "sklearn.datasets"),
    ],
}
"""What the ranks of a folder's tests import besides; the first folder that holds the test counts."""


@dataclass
class Ended:
    """How a rank ended: what its function returned, its exit code, what it wrote to stderr, when."""

    value: Any
    code: int | None
    said: str
    seconds: float


def run_ranks(
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 240.0,
    stuck: Sequence[int] = (),
) -> list[Ended]:
    """Call ``function(*arguments)`` on each of ``count`` ranks, as torchrun would start them.

    Args:
        timeout: seconds in which all ranks have to end.
        stuck: ranks that must still be running when the others have ended; they are killed then.
    """
    store, began = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), time.monotonic()
    ranks = []
    for rank in range(count):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "OMP_NUM_THREADS": 1}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        here, there = CONTEXT.Pipe()
        words = {name: str(value) for name, value in environment.items()}
        process = CONTEXT.Process(target=_rank, args=(words, function, arguments, there), daemon=True)
        with _preloaded():
            process.start()
        there.close()
        ranks.append((process, here))
    ended: dict[int, Ended] = {}
    try:
        while len(ended) < count - len(stuck):
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
        assert all(ranks[rank][0].exitcode is None for rank in stuck), f"of ranks {sorted(stuck)}, some do not hang"
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    return [ended[rank] for rank in range(count) if rank in ended]


_SERVERS: dict[tuple[str, ...], forkserver.ForkServer] = {}


@contextlib.contextmanager
def _preloaded() -> Iterator[None]:
    """Processes started here are forks of a server that has imported the frameworks of the test that is running.

    Importing a framework takes each rank seconds. One server cannot have them all: they change what others see.
    """
    test = os.environ.get("PYTEST_CURRENT_TEST", "tests/")
    modules = tuple(PRELOADED + next(own for folder, own in OWN.items() if test.startswith(f"{folder}/")))
    if modules not in _SERVERS:
        _SERVERS[modules] = server = forkserver.ForkServer()
        server.set_forkserver_preload(list(modules))
        before = Path.cwd()
        os.chdir(ROOT)  # where it finds tests/
        try:
            server.ensure_running()
        finally:
            os.chdir(before)
    plain = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _SERVERS[modules].connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = plain


def start_forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """A process that calls ``function``, with all imports done; what it prints is dropped."""
    process = CONTEXT.Process(target=_silent, args=(function, arguments), daemon=True)
    with _preloaded():
        process.start()
    return process


def _silent(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        function(*arguments)


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """Meanwhile, what the engine would start as fresh interpreters are forks as ranks are, with all imports done.

    For tests of what such processes find; that they are fresh is the matter of tests/engine/memory/test_measure.py.
    """
    with mock.patch.object(multiprocessing, "get_context", return_value=CONTEXT), _preloaded():
        yield


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
