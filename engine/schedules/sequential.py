"""One block after another in one process: the reference that every other schedule must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from engine.block import Block, Report
from engine.message import Message


class Schedule(Protocol):
    """Runs messages through blocks."""

    blocks: Sequence[Block]

    def __init__(self, blocks: Sequence[Block]) -> None: ...

    def step(self, message: Message, *, update: bool = True, weight: float = 1.0) -> list[Report]:
        """One local step of every block on one micro-batch."""
        ...

    def predict(self, message: Message) -> Any:
        """The task's prediction, without gradients."""
        ...


class Sequential:
    """Each block runs its whole local step, then passes the message on::

        block 0   F B U
        block 1         F B U
        block 2               F B U        F forward, B backward, U update

    At any time one block's activations are alive, so peak memory is the largest block's.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks

    def step(self, message: Message, *, update: bool = True, weight: float = 1.0) -> list[Report]:
        reports = []
        for block in self.blocks:
            message, report = block.local_step(message, update=update, weight=weight)
            reports.append(report)
        return reports

    @torch.no_grad()
    def predict(self, message: Message) -> Any:
        for block in self.blocks[:-1]:
            message = block(message)
        return self.blocks[-1].predict(message)
