"""Variants of one config, each stepped in a process of its own, in turns."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from engine.build import build_blocks, prepare
from engine.config import Config, parse, task_name
from engine.log import progress_bar
from engine.memory import Estimate, estimate_step
from engine.message import Message
from engine.schedules import SCHEDULES, Schedule
from engine.task import Task
from engine.trainer import choose_device
from tasks import find_task


@dataclass(frozen=True)
class Variant:
    """A name and the overrides that make it out of the common config."""

    name: str
    overrides: tuple[str, ...]

    def load(self, argv: Sequence[str]) -> tuple[Config, Task]:
        argv = [*argv, *self.overrides]
        entry = find_task(task_name(argv))
        config = parse(entry.config, argv)
        return config, entry.build(config)


END_TO_END = Variant("end-to-end", ("--local.schedule", "end_to_end", "--local.checkpoint", "false"))
CHECKPOINTED = Variant(
    "end-to-end + activation checkpointing", ("--local.schedule", "end_to_end", "--local.checkpoint", "true")
)


@dataclass(frozen=True)
class Timing:
    """Seconds per step: median, smallest and largest."""

    median: float
    least: float
    most: float


def build_schedule(config: Config, task: Task) -> Schedule:
    """The schedule of a config with its blocks on the config's device, ready to step."""
    chain = task.build_chain(initial=False)
    blocks = build_blocks(chain, config, task)
    prepare(blocks, config, choose_device(config.train.device))
    return SCHEDULES[config.local.schedule](blocks)


def first_batch(task: Task) -> Message:
    """The first micro-batch of training."""
    return next(task.batches(0, 0))[0]


def estimate_variant(variant: Variant, argv: Sequence[str], batch: int = 0) -> Estimate:
    """Peak bytes on fake tensors, at ``batch`` samples or the config's own number of them."""
    config, task = variant.load(argv)
    message = first_batch(task)
    if batch:
        message = message.map(lambda t: torch.empty((batch, *t.shape[1:]), dtype=t.dtype, device="meta"))
    return estimate_step(build_blocks(task.build_chain(initial=False), config, task), config, message)


def time_variants(
    variants: Sequence[Variant], argv: Sequence[str], warmup: int = 2, steps: int = 10, threads: int = 1
) -> dict[str, Timing]:
    """Seconds per training step of each variant, on the first batch of its data.

    Every variant lives in a fresh process; they step in turns (A B C A B C ...), so that drift of the
    machine's speed meets all alike.
    """
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[Variant, Any, Connection]] = []
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    try:
        for variant in variants:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(variant, list(argv), threads, there), daemon=True)
            process.start()
            there.close()  # the worker's end is its own, so that its death is noticed here
            workers.append((variant, process, here))
        for variant, _, pipe in workers:
            _answer(variant, pipe)
        with progress_bar() as bar:
            shown = bar.add_task("timing", total=warmup + steps)
            for number in range(warmup + steps):
                for variant, _, pipe in workers:
                    pipe.send(True)
                    taken = _answer(variant, pipe)
                    if number >= warmup:
                        seconds[variant.name].append(taken)
                bar.advance(shown)
    finally:
        for _, process, _ in workers:
            process.terminate()
            process.join()
    return {name: Timing(statistics.median(taken), min(taken), max(taken)) for name, taken in seconds.items()}


def _answer(variant: Variant, pipe: Connection) -> float:
    try:
        return float(pipe.recv())
    except EOFError as error:
        raise ValueError(f"the process of variant {variant.name!r} has died; out of memory?") from error


def _work(variant: Variant, argv: list[str], threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    config, task = variant.load(argv)
    schedule = build_schedule(config, task)
    device = choose_device(config.train.device)
    message = first_batch(task).to(device)
    pipe.send(0.0)
    sequence = 0
    while pipe.recv():
        start = time.perf_counter()
        schedule.step(Message(message.features, message.targets, sequence=sequence))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        pipe.send(time.perf_counter() - start)
        sequence += 1


def header(argv: Sequence[str], threads: int, **more: Any) -> dict[str, Any]:
    """What a reader needs to judge and repeat the figures."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "arguments": " ".join(argv),
        **more,
    }
