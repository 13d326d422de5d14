"""Replicas that shard nothing: torch's DistributedDataParallel around one block."""

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
    """Every replica has the whole block; gradients are averaged while backward still runs.

    Known limitation: if a trainable parameter takes no part in the loss, torch raises an error at the next micro-batch.
    """

    def __init__(self, block: Block, group: dist.ProcessGroup, make_optimizer: MakeOptimizer) -> None:
        super().__init__(block, group)
        with warnings.catch_warnings():
            # Newer versions of torch deprecate broadcast_buffers in favour of a name that older ones do not know.
            warnings.simplefilter("ignore", FutureWarning)
            # Gradients as views of the buckets that are sent save a copy of all gradients. Buffers are not broadcast:
            # BatchNorm either synchronises its statistics itself or keeps one set per replica.
            self.wrapped = DistributedDataParallel(
                Whole(block), process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        block.attach(make_optimizer)

    def train_forward(self, message: Message, update: bool) -> tuple[Message, Tensor]:
        self.wrapped.require_backward_grad_sync = update  # as ``no_sync`` does: average once per optimizer step
        result: tuple[Message, Tensor] = self.wrapped(message)
        return result
