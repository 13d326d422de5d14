"""Backpropagation through the whole network: the baseline, one block from first unit to head."""

from __future__ import annotations

from engine.learning.blocks import Blocks
from engine.learning.schedules.sequential import Sequential
from engine.utilities.recorder import Recorder


class EndToEnd(Sequential):
    """The one block holds every unit and the task's head, so its local loss is the task's loss.

    With ``local.recompute`` it is backpropagation with recomputed activations, local learning's true rival.
    """

    def __init__(self, blocks: Blocks, recorder: Recorder | None = None) -> None:
        assert len(blocks) == 1, "end-to-end training is one block"
        super().__init__(blocks, recorder)
