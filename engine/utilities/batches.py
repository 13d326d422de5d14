"""Batches and their parts: the same samples in the same order, whichever rank or worker loads them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from engine.utilities.seed import derive


@dataclass(frozen=True)
class Part:
    """The part of every micro-batch that one replica trains on: part ``index`` of ``count``.

    Example:
        >>> [Part(index, 3).of(8) for index in range(3)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
    """

    index: int
    count: int

    def of(self, samples: int) -> slice:
        """The samples of this part, out of a micro-batch of ``samples``; sizes of parts differ by at most one."""
        size, more = divmod(samples, self.count)
        start = self.index * size + min(self.index, more)
        return slice(start, start + size + (self.index < more))


WHOLE = Part(0, 1)


def micro_batches(samples: int, most: int) -> list[int]:
    """Divide ``samples`` into the fewest micro-batches of at most ``most`` samples; their sizes differ by at most one.

    Returns:
        The size of each micro-batch. Even sizes keep the last one from being too small for BatchNorm.

    Example:
        >>> micro_batches(7, 3)
        [3, 2, 2]
    """
    parts = math.ceil(samples / most)
    return [samples // parts + (number < samples % parts) for number in range(parts)]


@dataclass(frozen=True)
class Batches:
    """How an epoch of ``count`` samples is divided into batches and micro-batches.

    Args:
        batch: samples per optimizer step; the last batch may have fewer.
        accumulate: number of micro-batches in a full batch.
        drop_last: whether to leave out a last batch that is not full.

    Example:
        >>> Batches(count=10, batch=4, accumulate=2).sizes()
        [4, 4, 2]
    """

    count: int
    batch: int
    accumulate: int = 1
    drop_last: bool = False

    @property
    def micro_batch(self) -> int:
        """Samples in a micro-batch; the last ones of an epoch may have fewer."""
        return self.batch // self.accumulate

    @property
    def steps(self) -> int:
        """Batches, and so optimizer steps, in an epoch."""
        return self.count // self.batch if self.drop_last else math.ceil(self.count / self.batch)

    def sizes(self) -> list[int]:
        """Number of samples in each batch."""
        return [min(self.batch, self.count - step * self.batch) for step in range(self.steps)]

    def smallest(self) -> int:
        """Samples in the smallest micro-batch of an epoch."""
        return min(min(micro_batches(size, self.micro_batch)) for size in {*self.sizes()[-1:], self.batch})

    def shares(self, samples: int, part: Part = WHOLE) -> list[slice]:
        """For each micro-batch of a batch of ``samples``, the slice of the batch that belongs to ``part``."""
        at, found = 0, []
        for size in micro_batches(samples, self.micro_batch):
            own = part.of(size)
            found.append(slice(at + own.start, at + own.stop))
            at += size
        return found


def load_batches(
    dataset: Dataset[Any],
    batches: Batches,
    epoch: int,
    *,
    start: int = 0,
    part: Part = WHOLE,
    shuffle: int | None = None,
    workers: int = 0,
) -> Iterator[list[Any]]:
    """Yield every batch of ``epoch`` from batch ``start`` on, as the collated part of each of its micro-batches.

    The data set is indexed by (epoch, index), and a sample may depend on nothing else.

    Args:
        shuffle: seed of the order, which differs from epoch to epoch; None keeps the order of the data set.
        workers: processes that load; 0 loads in this process.

    Raises:
        ValueError: the data set raised one (the message is that of the cause), or fails on its first sample in a way
            that a data set indexed otherwise does.
    """
    order = list(range(batches.count))
    if shuffle is not None:
        generator = torch.Generator().manual_seed(derive(shuffle, "order", epoch))
        order = torch.randperm(batches.count, generator=generator).tolist()
    # Index samples by step rather than skip them: a resumed run loads none of the samples before ``start``.
    parts: list[list[list[tuple[int, int]]]] = []
    for step, size in list(enumerate(batches.sizes()))[start:]:
        batch = [(epoch, index) for index in order[step * batches.batch : step * batches.batch + size]]
        parts.append([batch[share] for share in batches.shares(size, part)])
    loader = DataLoader(
        dataset,
        batch_sampler=[samples for batch_parts in parts for samples in batch_parts],
        num_workers=workers,
        generator=torch.Generator(),  # otherwise DataLoader draws a seed from the global generator, which training uses
        worker_init_fn=own_session,
    )
    loaded, first = iter(loader), True
    try:
        for batch_parts in parts:
            batch = [next(loaded) for _ in batch_parts]
            first = False
            yield batch
    except ValueError as error:
        raise ValueError(cause_of(error)) from error
    except (IndexError, KeyError, TypeError) as error:
        if not first:
            raise
        raise ValueError(
            f"{type(dataset).__name__} fails on its first batch: {type(error).__name__}: {cause_of(error)}; "
            "training_data() and test_data() are indexed by (epoch, index), see docs/extend.md"
        ) from error


def cause_of(error: Exception) -> str:
    """The message of a data set's error, without the worker's traceback that DataLoader puts in front of it."""
    return ["", *str(error).strip().splitlines()][-1].removeprefix(f"{type(error).__name__}: ")


def own_session(worker: int) -> None:
    """Give a worker process a session of its own.

    torchrun sends its signals to the whole session of a rank. A rank still needs its workers to finish the current
    step, so only the rank itself may end them.
    """
    os.setsid()
