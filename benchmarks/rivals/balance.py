"""Cut a network into pipeline stages by the measured time of each unit or local block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.fresh import in_fresh_process
from engine.distributed.balance import balance
from engine.distributed.timing import time_blocks
from engine.distributed.world import World
from engine.learning.optimizer import build_optimizer
from engine.memory.variant import Load

REPEATS = 5


def unit_seconds(argv: Sequence[str], load: Load, micro_batches: Sequence[int], threads: int) -> dict[int, list[float]]:
    """Seconds of a whole step in each unit, for each number of micro-batches, measured in a fresh process.

    A step is the forward and backward of every micro-batch and one update. The head and the loss count with the last
    unit.
    """
    return {parts: in_fresh_process(_measure, list(argv), load, parts, threads) for parts in micro_batches}


def block_seconds(argv: Sequence[str], load: Load, threads: int) -> list[float]:
    """Seconds of each block's local step on one micro-batch, timed as for ``placement`` but in a fresh process."""
    return in_fresh_process(_measure_blocks, list(argv), load, threads)


def cut(seconds: Sequence[float], stages: int) -> tuple[int, ...]:
    """Bounds of ``stages`` stages, of which the slowest is as fast as possible.

    Raises:
        ValueError: there are fewer units than stages.

    Example:
        >>> cut([1.0, 1.0, 2.0], 2)
        (0, 2, 3)
    """
    if stages > len(seconds):
        raise ValueError(f"--ranks: {stages} stages asked for, there are {len(seconds)} to cut into; take fewer")
    return tuple(balance(seconds, stages))


def _measure(argv: list[str], load: Load, micro_batches: int, threads: int) -> list[float]:
    torch.set_num_threads(threads)
    config, task = load(argv)
    chain, whole = task.build_chain(initial=False), task.example()
    message = whole.map(lambda tensor: tensor.chunk(micro_batches)[0])
    seconds = []
    for number, unit in enumerate(chain.units):
        parts = [unit, chain.head] if number == len(chain) - 1 else [unit]
        named = [item for part in parts for item in part.module.named_parameters()]
        optimizer = build_optimizer(config.optimizer, named) if named else None
        running, updating = [], []
        for _ in range(REPEATS + 1):
            x = message.x.detach().requires_grad_(number > 0)
            start = time.perf_counter()
            output = unit(message.with_x(x.view_as(x)))  # a view: a unit may change what it gets in place
            result = output.x
            if len(parts) > 1:
                result = task.loss(chain.head(output).x, message.targets)
            if result.requires_grad:
                result.backward(torch.ones_like(result))
            middle = time.perf_counter()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            running.append(middle - start)
            updating.append(time.perf_counter() - middle)
        seconds.append(micro_batches * statistics.median(running[1:]) + statistics.median(updating[1:]))
        message = replace(output, features={"x": output.x.detach()})
    return seconds


def _measure_blocks(argv: list[str], load: Load, threads: int) -> list[float]:
    torch.set_num_threads(threads)
    return time_blocks(*load(argv), World())
