"""Replicas with everything whole on each: torch's DistributedDataParallel around one block."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from engine.distributed.replication.protocol import Replication, Whole
from engine.learning.block import Block
from engine.learning.optimizer import MakeOptimizer
from engine.network.message import Message


class DDP(Replication):
    """Averages gradients while backward still runs.

    Known limitation: torch refuses, at the next micro-batch, a block some of whose trainable parameters took no
    part in the loss.
    """

    def __init__(self, block: Block, group: dist.ProcessGroup, make_optimizer: MakeOptimizer) -> None:
        super().__init__(block, group)
        with warnings.catch_warnings():
            # Newer torch has another word for broadcast_buffers, which older torch does not know.
            warnings.simplefilter("ignore", FutureWarning)
            # The gradients are views of what is sent, not copies of it.
            self.wrapped = DistributedDataParallel(
                Whole(block), process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        block.attach(make_optimizer)

    def train_forward(self, message: Message, update: bool) -> tuple[Message, Tensor]:
        self.wrapped.require_backward_grad_sync = update
        result: tuple[Message, Tensor] = self.wrapped(message)
        return result
