"""Bytes and time of real training steps, with a fresh process for every variant."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from engine.config import Config
from engine.learning.build import fresh_blocks, prepare
from engine.learning.outcome import BlockError
from engine.learning.schedules import find_schedule
from engine.memory.footprint import Footprint, count_bytes, optimizer_step
from engine.memory.variant import Load, Variant
from engine.network.message import Message
from engine.task import Task
from engine.utilities.console import progress_bar
from engine.utilities.device import choose_device, deterministic, resident_bytes
from engine.utilities.text import one_line

WARM_UP = 3
"""Steps of each variant that run before the timed ones."""


@dataclass(frozen=True)
class CudaMemory:
    """What CUDA's caching allocator and the driver report for one training step.

    ``allocated_bytes`` and ``reserved_bytes`` are the peaks of a step that starts with an empty cache. ``retries``
    counts how often the allocator had to give its cache back and try again. ``used_bytes`` is how much the device's
    memory in use has grown since before the process touched the device, by NVML; this includes the CUDA context, and
    anything that other processes did meanwhile. It is None if NVML does not know the device.
    """

    allocated_bytes: int
    reserved_bytes: int
    retries: int
    used_bytes: int | None


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step.

    ``footprint`` counts tensors exactly, on any device. ``resident_bytes`` is the peak of the process's resident set,
    ``resident_before_bytes`` its size before the network was built, which is that of Python and torch themselves.
    """

    footprint: Footprint
    resident_bytes: int
    resident_before_bytes: int
    cuda: CudaMemory | None = None

    @property
    def peak_bytes(self) -> int:
        """The peak: on a GPU that of the allocator, on a CPU that of all tensors."""
        return self.cuda.allocated_bytes if self.cuda else self.footprint.peak_bytes


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds of a step; if the variant ran out of memory, ``failure`` says so and they are missing."""

    memory: Memory | None
    seconds: list[float]
    failure: str = ""


def measure(
    variants: Sequence[Variant],
    argv: Sequence[str],
    load: Load,
    *,
    steps: int = 10,
    threads: int = 1,
    snapshots: Path | None = None,
) -> dict[str, Measured]:
    """Count the bytes of a step of each variant, then time ``steps`` steps of each.

    Every variant lives in a fresh process. The variants take turns (A B C A B C ...), so that a change in the machine's
    speed affects all of them alike. On a GPU, a variant gives its cache back at the end of its turn.

    Args:
        argv: the command line of the common config.
        load: makes a config and its task from a command line.
        threads: number of torch's threads in each process.
        snapshots: a folder for the CUDA allocator's history of a step, with one file per variant, which
            https://pytorch.org/memory_viz shows.

    Returns:
        What was measured, by the variant's name. A variant that ran out of memory has a failure instead.

    Raises:
        ValueError: a variant could not be built or failed in a step, for any reason other than memory.
    """
    # Spawn, not fork: CUDA does not survive a fork, and a forked process would begin with its parent's resident set.
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    found: dict[str, Memory | None] = {}
    failures: dict[str, str] = {}
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}

    def ask(name: str, question: Any) -> Any:
        """Ask a worker and return its answer. If it ran out of memory, record that, end the worker and return None."""
        process, pipe = workers[name]
        try:
            with suppress(BrokenPipeError):  # the last words of a worker that has ended can still be read below
                pipe.send(question)
            kind, answer = pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            # The system kills a process that takes too much main memory, without any word from it.
            kind, answer = "memory", f"its process was ended (exit code {process.exitcode}), perhaps for lack of memory"
        if kind == "error":
            raise ValueError(f"{name}: {answer}")
        if kind == "memory":
            failures[name] = answer
            seconds[name].clear()
            del workers[name]
            process.terminate()
            process.join()
        return answer if kind == "answer" else None

    try:
        with progress_bar() as bar:
            shown = bar.add_task("measuring", total=len(variants) + WARM_UP + steps)
            for variant in variants:
                here, there = context.Pipe()
                arguments = load, variant.words(argv), threads, there
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                # Only if the worker alone holds its end of the pipe does reading fail when the worker dies.
                there.close()
                workers[variant.name] = process, here
                snapshot = snapshots / f"{variant.name.replace(' ', '_')}.pickle" if snapshots else None
                found[variant.name] = ask(variant.name, ("memory", snapshot))
                bar.advance(shown)
            for number in range(WARM_UP + steps if steps else 0):
                for name in list(workers):
                    taken = ask(name, ("time", None))
                    if number >= WARM_UP and taken is not None:
                        seconds[name].append(taken)
                bar.advance(shown)
    finally:
        for process, _ in workers.values():
            process.terminate()
            process.join()
    return {
        variant.name: Measured(found[variant.name], seconds[variant.name], failures.get(variant.name, ""))
        for variant in variants
    }


def _work(load: Load, argv: list[str], threads: int, pipe: Connection) -> None:
    """The main function of a worker process: answer questions until the parent ends the process."""
    torch.set_num_threads(threads)
    try:
        config, task = load(argv)
        with deterministic(config.train.deterministic, choose_device(config.train.device)):
            stepper: Stepper | None = None
            while True:
                question, value = pipe.recv()
                stepper = stepper or Stepper(config, task)  # after the first question, so that its errors are answers
                pipe.send(("answer", stepper.time() if question == "time" else stepper.memory(value)))
    except Exception as error:
        name = "" if isinstance(error, ValueError | BlockError) else f"{type(error).__name__}: "
        pipe.send(("memory" if _out_of_memory(error) else "error", name + one_line(error)))


def _out_of_memory(error: BaseException) -> bool:
    """Whether an error means too little memory; not every allocator in torch raises an error of a type of its own."""
    cause = error.cause if isinstance(error, BlockError) else error
    if isinstance(cause, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    signs = "can't allocate memory", "out of memory", "ALLOC_FAILED"
    return isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in signs)


class Stepper:
    """Runs steps of one config on a synthetic micro-batch, in this process.

    Raises:
        ValueError: the config asks for something that this device cannot do.
    """

    def __init__(self, config: Config, task: Task) -> None:
        self.device = choose_device(config.train.device)
        self.config = config
        self._before_bytes = resident_bytes()[0]
        self._used = _Used() if self.device.type == "cuda" else None  # before anything creates a CUDA context
        self.blocks = fresh_blocks(config, task)
        prepare(self.blocks, config, self.device)
        self.schedule = find_schedule(config.local.schedule)(self.blocks)
        self.message: Message = task.example().to(self.device)

    def step(self) -> None:
        """Run one optimizer step with all its micro-batches."""
        optimizer_step(self.schedule, self.message, self.config.train.accumulate)

    def memory(self, snapshot: Path | None = None) -> Memory:
        """The bytes of a step in which every block has its optimizer state.

        Args:
            snapshot: file for the CUDA allocator's history of the step.

        Raises:
            ValueError: the network is compiled but on a CPU, or fp16's loss scaler skipped every update.
        """
        if self.config.local.compile and self.device.type == "cpu":
            raise ValueError(
                "local.compile: the memory of compiled code can be measured on a GPU only; set it to false"
            )
        for number in range(20):
            self.step()
            # A loss scaler skips updates until its scale has come down; only an update creates optimizer state.
            if all(block.skipped <= number for block in self.blocks):
                break
        else:
            raise ValueError("local.precision: fp16's loss scaler skipped all of 20 updates; use bf16")
        cuda = self._cuda(snapshot) if self.device.type == "cuda" else None
        footprint = count_bytes(self.blocks, self.config, self.message)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return Memory(footprint, resident_bytes()[1], self._before_bytes, cuda)

    def _cuda(self, snapshot: Path | None) -> CudaMemory:
        assert self._used is not None
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        retries = torch.cuda.memory_stats(self.device)["num_alloc_retries"]
        if snapshot is not None:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self.step()
        torch.cuda.synchronize(self.device)
        stats = torch.cuda.memory_stats(self.device)
        used = self._used.grown(self.device)
        if snapshot is not None:
            torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
        return CudaMemory(
            stats["allocated_bytes.all.peak"],
            stats["reserved_bytes.all.peak"],
            stats["num_alloc_retries"] - retries,
            used,
        )

    def time(self) -> float:
        """The seconds of one step."""
        if self.device.type == "cuda":
            self.step()  # fills the cache, which the end of the last turn emptied
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        taken = time.perf_counter() - start
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return taken


class _Used:
    """How much a GPU's memory in use has grown since this object was made, by NVML.

    Make it before the CUDA context, so that the growth includes the context.
    """

    def __init__(self) -> None:
        self._before = self._read()

    @staticmethod
    def _read() -> dict[str, int]:
        """The bytes in use on each GPU, by its UUID; empty without NVML."""
        import pynvml  # here, because only machines with a GPU have the driver's library that it needs

        try:
            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
            return {_text(pynvml.nvmlDeviceGetUUID(h)): int(pynvml.nvmlDeviceGetMemoryInfo(h).used) for h in handles}
        except pynvml.NVMLError:
            return {}

    def grown(self, device: torch.device) -> int | None:
        """The growth in bytes; None if NVML does not know the device (a partition of a GPU, for example)."""
        # By UUID, because CUDA_VISIBLE_DEVICES renumbers CUDA's devices but not NVML's.
        name, now = f"GPU-{torch.cuda.get_device_properties(device).uuid}", self._read()
        return now[name] - self._before[name] if name in now and name in self._before else None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
