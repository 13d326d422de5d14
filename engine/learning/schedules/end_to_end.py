"""Backpropagation through the whole network, the baseline: one block from the first unit to the head."""

from __future__ import annotations

from engine.learning.blocks import Blocks
from engine.learning.schedules.sequential import Sequential
from engine.utilities.recorder import Recorder


class EndToEnd(Sequential):
    """The one block holds every unit and the task's head, so its local loss is the task's loss.

    With ``local.recompute`` this is backpropagation with activation checkpointing, the strongest rival of local
    learning.
    """

    def __init__(self, blocks: Blocks, recorder: Recorder | None = None) -> None:
        assert len(blocks) == 1, "end-to-end training is one block"
        super().__init__(blocks, recorder)
