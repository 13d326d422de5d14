"""Losses of whole batches, computed from the reports of their micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.distributed.order import Order
from engine.learning.outcome import Report


class Losses:
    """Collects reports without reading their numbers, so that the host waits for the device only when it logs."""

    def __init__(self) -> None:
        self._micro_batches: list[tuple[float, tuple[Report, ...]]] = []
        self._steps: list[tuple[int, list[tuple[float, tuple[Report, ...]]]]] = []

    def __len__(self) -> int:
        """Number of steps since the last ``take``."""
        return len(self._steps)

    def add(self, order: Order, share: float) -> None:
        """Add the reports of a micro-batch, and its share of the batch."""
        self._micro_batches.append((share, order.reports))

    def end_step(self, step: int) -> None:
        """Close optimizer step ``step``: the micro-batches added since the last call belong to it."""
        self._steps.append((step, self._micro_batches))
        self._micro_batches = []

    def take(self) -> tuple[list[int], Tensor, tuple[Report, ...]]:
        """The steps since the last call, their losses with shape (steps, blocks), and the newest reports."""
        steps, newest = [step for step, _ in self._steps], self._steps[-1][1][-1][1]
        losses = torch.stack([_whole(micro_batches) for _, micro_batches in self._steps])
        self._steps = []
        return steps, losses, newest


def _whole(micro_batches: list[tuple[float, tuple[Report, ...]]]) -> Tensor:
    """The loss of each block over a whole batch, with shape (blocks)."""
    losses = [torch.stack([report.loss for report in reports]) * share for share, reports in micro_batches]
    return torch.stack(losses).sum(0)
