"""One block after another in one process: the reference that every other schedule must match bit for bit."""

from __future__ import annotations

from typing import Any

import torch

from engine.learning.blocks import Blocks
from engine.learning.outcome import Report
from engine.network.message import Message
from engine.utilities.recorder import Recorder, recording


class Sequential:
    """Each block runs its whole local step, then passes the message on::

        block 0   F B U
        block 1         F B U
        block 2               F B U        F forward, B backward, U update

    Only one block's activations are alive at any time, so the peak is that of the largest block.

    Args:
        recorder: records which block ran when.
    """

    def __init__(self, blocks: Blocks, recorder: Recorder | None = None) -> None:
        self.blocks, self.encoder, self.recorder = blocks, blocks.encoder, recorder

    def step(self, message: Message, *, update: bool = True, weight: float = 1.0) -> tuple[Message, list[Report]]:
        reports, encoder = [], self.encoder
        if encoder is not None:
            with recording(self.recorder, encoder.index, "train", message.sequence):
                message = encoder.encode(message)
        for block in self.blocks:
            with recording(self.recorder, block.index, "train", message.sequence):
                message, report = block.local_step(message, update=update, weight=weight)
            reports.append(report)
        if encoder is not None:
            with recording(self.recorder, encoder.index, "train", message.sequence):
                encoder.learn(update)
        return message, reports

    def settle(self) -> None:
        """Do nothing: all work is on the caller's stream already."""

    @torch.no_grad()
    def predict(self, message: Message) -> Any:
        *before, last = self.blocks
        with recording(self.recorder, -1, "evaluate", message.sequence):
            for block in (*([self.encoder] if self.encoder is not None else []), *before):
                message = block(message)
            return last.predict(message) if last.span.last else last(message)  # the head is on the last stage alone
