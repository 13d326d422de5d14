"""Bytes and time of real training steps, every variant in a fresh process of its own."""

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


@dataclass(frozen=True)
class CudaMemory:
    """What CUDA's caching allocator and the driver say of one training step.

    ``allocated`` and ``reserved`` are peaks of a step that starts without a cache, ``retries`` the times in
    it that the allocator had to give its cache back and try again. ``used`` is what the device's memory in
    use has grown by since before the process touched it (by NVML: the context included, and whatever others
    did meanwhile; None where NVML does not know the device).
    """

    allocated_bytes: int
    reserved_bytes: int
    retries: int
    used_bytes: int | None


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step.

    ``footprint`` counts tensors, exactly, on any device. ``resident`` is the peak of the process's resident
    set, ``resident_before`` what it was before the network was built (Python and torch themselves).
    """

    footprint: Footprint
    resident_bytes: int
    resident_before_bytes: int
    cuda: CudaMemory | None = None

    @property
    def peak_bytes(self) -> int:
        """On a GPU the allocator's peak, on a CPU that of all tensors."""
        return self.cuda.allocated_bytes if self.cuda else self.footprint.peak_bytes


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds of a step, or why there are none: the variant ran out of memory."""

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
    """Count the bytes of each variant's step, then time ``steps`` of them.

    Every variant lives in a fresh process. They step in turns (A B C A B C ...), so that drift of the
    machine's speed meets all alike; on a GPU a variant gives its cache back when its turn is over.

    Args:
        snapshots: a folder for the CUDA allocator's history of a step, one file a variant, as
            https://pytorch.org/memory_viz shows it.

    Raises:
        ValueError: a variant cannot be built or stepped, for any reason but memory.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    found: dict[str, Memory | None] = {}
    failures: dict[str, str] = {}
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}

    def ask(name: str, question: Any) -> Any:
        """A worker's answer; None, and the worker is gone, if it ran out of memory."""
        process, pipe = workers[name]
        try:
            with suppress(BrokenPipeError):  # what a worker that has ended said last can still be read
                pipe.send(question)
            kind, answer = pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            kind, answer = "memory", f"its process was ended (exit code {process.exitcode}), for want of memory?"
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
                there.close()  # the worker's end is its own, so that its death is noticed here
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
    """A worker: answers questions until it is ended."""
    torch.set_num_threads(threads)
    try:
        config, task = load(argv)
        with deterministic(config.train.deterministic, choose_device(config.train.device)):
            stepper: Stepper | None = None
            while True:
                question, value = pipe.recv()
                stepper = stepper or Stepper(config, task)
                pipe.send(("answer", stepper.time() if question == "time" else stepper.memory(value)))
    except Exception as error:
        name = "" if isinstance(error, ValueError | BlockError) else f"{type(error).__name__}: "
        pipe.send(("memory" if _out_of_memory(error) else "error", name + one_line(error)))


def _out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory; not all of torch's allocators and libraries have an error of their own."""
    cause = error.cause if isinstance(error, BlockError) else error
    if isinstance(cause, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    signs = "can't allocate memory", "out of memory", "ALLOC_FAILED"
    return isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in signs)


class Stepper:
    """Steps of one config on a made-up micro-batch, in this process.

    Raises:
        ValueError: what is asked for cannot be had on this device.
    """

    def __init__(self, config: Config, task: Task) -> None:
        self.device = choose_device(config.train.device)
        self.config = config
        self._before_bytes = resident_bytes()[0]
        self._used = _Used() if self.device.type == "cuda" else None
        self.blocks = fresh_blocks(config, task)
        prepare(self.blocks, config, self.device)
        self.schedule = find_schedule(config.local.schedule)(self.blocks)
        self.message: Message = task.example().to(self.device)

    def step(self) -> None:
        """One optimizer step: all its micro-batches."""
        optimizer_step(self.schedule, self.message, self.config.train.accumulate)

    def memory(self, snapshot: Path | None = None) -> Memory:
        """Bytes of a step in which every block has optimizer state."""
        if self.config.local.compile and self.device.type == "cpu":
            raise ValueError("local.compile: a CPU has no allocator to ask what compiled code takes; set it false")
        for number in range(20):
            self.step()
            # A loss scaler leaves the first updates out, until its scale has come down.
            if all(block.skipped <= number for block in self.blocks):
                break
        else:
            raise ValueError("local.precision: fp16's loss scaler has left out every one of 20 updates; use bf16")
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
        """Seconds of one step."""
        if self.device.type == "cuda":
            self.step()  # fills the cache that the turn before gave back
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
    """Growth of a GPU's memory in use since this was made, by NVML; made before CUDA's context is."""

    def __init__(self) -> None:
        self._before = self._read()

    @staticmethod
    def _read() -> dict[str, int]:
        """Bytes in use of each GPU, by its UUID; nothing where NVML is not there."""
        import pynvml  # needs the driver's library, so only where there is a GPU

        try:
            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
            return {_text(pynvml.nvmlDeviceGetUUID(h)): int(pynvml.nvmlDeviceGetMemoryInfo(h).used) for h in handles}
        except pynvml.NVMLError:
            return {}

    def grown(self, device: torch.device) -> int | None:
        """Bytes; None where NVML does not know the device (a part of a GPU, say)."""
        # By UUID: CUDA_VISIBLE_DEVICES renumbers CUDA's devices, not NVML's.
        name, now = f"GPU-{torch.cuda.get_device_properties(device).uuid}", self._read()
        return now[name] - self._before[name] if name in now and name in self._before else None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
