"""Backpropagation through the whole network: the baseline, one block from first unit to head."""

from __future__ import annotations

from collections.abc import Sequence

from engine.block import Block
from engine.schedules.sequential import Sequential
from engine.timeline import Recorder


class EndToEnd(Sequential):
    """The one block holds every unit and the task's head, so its local loss is the task's loss.

    With ``local.checkpoint`` it is activation checkpointing per unit, local learning's true rival.
    """

    def __init__(self, blocks: Sequence[Block], recorder: Recorder | None = None) -> None:
        assert len(blocks) == 1, "end-to-end training is one block"
        super().__init__(blocks, recorder)
