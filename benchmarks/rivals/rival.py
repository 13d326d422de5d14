"""What every way to train is to the benchmark: something that steps in each of its ranks."""

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
    """A row of the benchmark to be; plain values, for they travel to fresh processes.

    Args:
        name: shown in tables; no two entries share one.
        maker: the class of the rival, as ``module:class``. Its module is imported in the ranks alone, before
            memory is counted.
        ranks: processes it takes.
        overrides: words that make its config out of the common one.
        micro_batches: parts of a batch that go through a pipeline one after another.
        bounds: where each pipeline stage starts, in units (of the local pipeline in blocks), and their number at
            the end; empty without stages.
        delay: seconds that every message between ranks takes longer.
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
    """What a rival is built from in one of its ranks; with more than one rank, torch's default group is up."""

    config: Config
    task: Task
    rank: int
    entry: Entry


class Rival(ABC):
    """One rank of a way to train. Every rank gets the same calls in the same order.

    Network, batch, initial weights and optimizer come from ``config`` and ``task`` alone, so they are the
    same for all.
    """

    @abstractmethod
    def __init__(self, place: Place) -> None: ...

    @abstractmethod
    def step(self) -> Tensor | None:
        """This rank's part of one optimizer step on the whole batch.

        A rank may return before the others are done, or before the step is over (a pipeline without a flush).

        Returns:
            The loss of the samples this rank has seen the end of, detached; None where it has seen none.
        """


def find(maker: str) -> type[Rival]:
    """The class that ``module:class`` names."""
    module, _, name = maker.partition(":")
    found: type[Rival] = getattr(importlib.import_module(module), name)
    return found


def load_network(place: Place) -> tuple[Chain, Message]:
    """The network and the whole batch."""
    return place.task.build_chain(initial=False), place.task.example()
