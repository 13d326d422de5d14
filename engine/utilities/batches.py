"""Batches and their parts: the same samples in the same order, whatever loads them."""

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
    """Which part of every micro-batch a replica trains on: number ``index`` of ``count``.

    Example:
        >>> [Part(index, 3).of(8) for index in range(3)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
    """

    index: int
    count: int

    def of(self, samples: int) -> slice:
        """The samples of the part; parts differ by at most one."""
        size, more = divmod(samples, self.count)
        start = self.index * size + min(self.index, more)
        return slice(start, start + size + (self.index < more))


WHOLE = Part(0, 1)


def micro_batches(samples: int, most: int) -> list[int]:
    """``samples`` in as few micro-batches of at most ``most`` as will do; they differ by at most one.

    Example:
        >>> micro_batches(7, 3)
        [3, 2, 2]
    """
    parts = math.ceil(samples / most)
    return [samples // parts + (number < samples % parts) for number in range(parts)]


@dataclass(frozen=True)
class Batches:
    """How an epoch of ``count`` samples is divided.

    Args:
        batch: samples per optimizer step; the last may have fewer.
        accumulate: micro-batches of a full batch.
        drop_last: leave out a last batch that is not full.

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
        """Samples in a micro-batch, the last ones of an epoch apart."""
        return self.batch // self.accumulate

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.count // self.batch if self.drop_last else math.ceil(self.count / self.batch)

    def sizes(self) -> list[int]:
        """Samples of each batch."""
        return [min(self.batch, self.count - step * self.batch) for step in range(self.steps)]

    def smallest(self) -> int:
        """Samples in the smallest micro-batch."""
        return min(min(micro_batches(size, self.micro_batch)) for size in {*self.sizes()[-1:], self.batch})

    def shares(self, samples: int, part: Part = WHOLE) -> list[slice]:
        """Where the part of each micro-batch lies in a batch of ``samples``."""
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
    """Of every batch from ``start`` on in ``epoch``, the wanted part of each micro-batch, collated.

    Samples are asked for as (epoch, index), and may not depend on anything else.

    Args:
        shuffle: seed of the order, which differs from epoch to epoch; None keeps that of the data set.
    """
    order = list(range(batches.count))
    if shuffle is not None:
        generator = torch.Generator().manual_seed(derive(shuffle, "order", epoch))
        order = torch.randperm(batches.count, generator=generator).tolist()
    parts: list[list[list[tuple[int, int]]]] = []
    for step, size in list(enumerate(batches.sizes()))[start:]:
        batch = [(epoch, index) for index in order[step * batches.batch : step * batches.batch + size]]
        parts.append([batch[share] for share in batches.shares(size, part)])
    loader = DataLoader(
        dataset,
        batch_sampler=[samples for batch_parts in parts for samples in batch_parts],
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=_own_session,
    )
    loaded = iter(loader)
    try:
        for batch_parts in parts:
            yield [next(loaded) for _ in batch_parts]
    except ValueError as error:
        # A worker process wraps its traceback around the message; the last line is the cause.
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _own_session(worker: int) -> None:
    """torchrun signals a rank's whole session, but it is the rank that ends its workers, after the step."""
    os.setsid()
