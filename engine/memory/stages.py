"""The bytes of a pipeline's stages, estimated on fake tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.config import Config
from engine.learning.blocks import Blocks
from engine.learning.build import arriving_messages, fresh_blocks, prepare
from engine.memory.estimate import fake_message, faking, make_fake
from engine.memory.footprint import count_bytes
from engine.task import Task


class Sizes:
    """The bytes of any stage, from an estimate of each block on its own.

    Raises:
        ValueError: as ``faking``.
    """

    def __init__(self, config: Config, task: Task) -> None:
        blocks = fresh_blocks(config, task)
        arriving = arriving_messages(blocks, task)
        sizes = [sum(tensor.nbytes for tensor in message.tensors()) for message in arriving]
        # Messages that wait at one end of a link, in addition to the one that the stage works on: up to ``depth``
        # messages, as large as the one that arrives at each block. Nothing leaves the last block.
        self._waiting = [config.placement.depth * size for size in [*sizes, 0]]
        self._states, self._peaks = [], []
        plain = replace(config, local=replace(config.local, compile=False))
        with faking():
            make_fake([blocks[0].chain.model, *blocks])
            for block, message in zip(blocks, arriving, strict=True):
                block.scaled = False  # a loss scaler reads values, and fake tensors have none
                alone = Blocks([block])
                prepare(alone, plain, torch.device("cpu"))
                self._peaks.append(count_bytes(alone, plain, fake_message(message)).peak_bytes)
                assert block.optimizer is not None
                held = [*block.parameters(), *block.buffers()]
                held += [value for state in block.optimizer.state.values() for value in state.values()]
                self._states.append(sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor)))

    def stage(self, start: int, stop: int) -> float:
        """The bytes at the peak of a stage with blocks ``start`` to ``stop - 1``.

        This is the state of all its blocks, the largest peak of one local step beyond that block's state, and the
        messages that wait at both ends.
        """
        beyond = max(p - s for p, s in zip(self._peaks[start:stop], self._states[start:stop], strict=True))
        links = (self._waiting[start] if start else 0) + self._waiting[stop]
        return sum(self._states[start:stop]) + beyond + links
