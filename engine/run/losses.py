"""Losses of whole batches, from the reports of their micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.distributed.order import Order
from engine.learning.outcome import Report


class Losses:
    """Collects reports without looking at their numbers, so that nobody waits for a device until they are wanted."""

    def __init__(self) -> None:
        self._micro_batches: list[tuple[float, tuple[Report, ...]]] = []
        self._steps: list[tuple[int, list[tuple[float, tuple[Report, ...]]]]] = []

    def __len__(self) -> int:
        """Steps since the last ``take``."""
        return len(self._steps)

    def add(self, order: Order, share: float) -> None:
        """A micro-batch, and its share of the batch."""
        self._micro_batches.append((share, order.reports))

    def end_step(self, step: int) -> None:
        """The micro-batches so far were those of optimizer step ``step``."""
        self._steps.append((step, self._micro_batches))
        self._micro_batches = []

    def take(self) -> tuple[list[int], Tensor, tuple[Report, ...]]:
        """Steps since the last call, their losses (steps, blocks), and the newest reports."""
        steps, newest = [step for step, _ in self._steps], self._steps[-1][1][-1][1]
        losses = torch.stack([_whole(micro_batches) for _, micro_batches in self._steps])
        self._steps = []
        return steps, losses, newest


def _whole(micro_batches: list[tuple[float, tuple[Report, ...]]]) -> Tensor:
    """Each block's loss over a whole batch."""
    losses = [torch.stack([report.loss for report in reports]) * share for share, reports in micro_batches]
    return torch.stack(losses).sum(0)
