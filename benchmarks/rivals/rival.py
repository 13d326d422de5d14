"""A way to train as the benchmark sees it: something that takes steps in each of its ranks."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from engine.config import Config
from engine.network.chain import Chain
from engine.network.message import Message
from engine.task import Task


@dataclass(frozen=True)
class Entry:
    """A future row of the benchmark, in plain values, since it is sent to fresh processes.

    Args:
        name: name in tables, different for every entry.
        maker: the class of the rival, as ``module:class``. Its module is imported only in the ranks, before memory is
            counted.
        ranks: number of processes.
        overrides: words that turn the common config into the config of this entry.
        micro_batches: number of parts of a batch that pass through a pipeline one after another.
        bounds: where each pipeline stage starts, in units or, for the local pipeline, in blocks, followed by the number
            of all units or blocks; empty without stages.
        delay: seconds by which every message between ranks is delayed.
    """

    name: str
    maker: str
    ranks: int = 1
    overrides: tuple[str, ...] = ()
    micro_batches: int = 1
    bounds: tuple[int, ...] = ()
    delay: float = 0.0


@dataclass(frozen=True)
class Place:
    """What a rival is built from in one of its ranks; with several ranks, torch's default group exists already."""

    config: Config
    task: Task
    rank: int
    entry: Entry


class Rival(ABC):
    """One rank of a way to train. Every rank gets the same calls in the same order.

    Network, batch, initial weights and optimizer depend only on ``config`` and ``task``, so they are the same for all
    rivals.
    """

    @abstractmethod
    def __init__(self, place: Place) -> None: ...

    @abstractmethod
    def step(self) -> Tensor | None:
        """This rank's part of one optimizer step on the whole batch.

        A rank may return before the other ranks, and in a pipeline without a flush even before the step is over.

        Returns:
            The detached loss of the samples whose loss this rank has computed; None if there are none.
        """


def find(maker: str) -> type[Rival]:
    """The class that ``module:class`` names."""
    module, _, name = maker.partition(":")
    found: type[Rival] = getattr(importlib.import_module(module), name)
    return found


def load_network(place: Place) -> tuple[Chain, Message]:
    """The network and the whole batch."""
    return place.task.build_chain(initial=False), place.task.example()
