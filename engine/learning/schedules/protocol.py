"""What every schedule does with the blocks of a network, or of one stage of the pipeline."""

from __future__ import annotations

from typing import Any, Protocol

from engine.learning.blocks import Blocks
from engine.learning.outcome import Report
from engine.network.message import Message
from engine.utilities.recorder import Recorder


class Schedule(Protocol):
    """Runs messages through blocks: all blocks of a network, or those of one stage of the pipeline."""

    blocks: Blocks

    def __init__(self, blocks: Blocks, recorder: Recorder | None = None) -> None: ...

    def step(self, message: Message, *, update: bool = True, weight: float = 1.0) -> tuple[Message, list[Report]]:
        """Run one local step of every block on one micro-batch.

        Args:
            update: whether the optimizers step after this micro-batch.
            weight: this micro-batch's share of the batch.

        Returns:
            The message that the last of these blocks sends, and a report of each block.

        Raises:
            BlockError: a block failed.
        """
        ...

    def settle(self) -> None:
        """Order all later work of the caller's stream, such as reading weights or reports, after the steps so far."""
        ...

    def predict(self, message: Message) -> Any:
        """The task's prediction, without gradients; in a stage before the last, the message that the stage sends."""
        ...
