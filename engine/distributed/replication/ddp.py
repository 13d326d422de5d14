"""Replicas that shard nothing: torch's DistributedDataParallel around one block."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.distributed.replication.base import Replication
from engine.learning.block import Block
from engine.learning.optimizer import MakeOptimizer
from engine.learning.outcome import Refusal
from engine.network.message import Message


class DDP(Replication):
    """Every replica has the whole block; gradients are averaged while backward still runs.

    A parameter may take part in the loss of some replicas only, or of none; torch looks for them in every step.
    """

    def __init__(self, block: Block, group: dist.ProcessGroup, make_optimizer: MakeOptimizer) -> None:
        super().__init__(block, group)
        _silence(block.device, group)
        with warnings.catch_warnings():
            # Newer versions of torch deprecate broadcast_buffers in favour of a name that older ones do not know.
            warnings.simplefilter("ignore", FutureWarning)
            # Gradients as views of the buckets that are sent save a copy of all gradients. Buffers are not broadcast:
            # BatchNorm either synchronises its statistics itself or keeps one set per replica.
            self.wrapped = DistributedDataParallel(
                self.whole,
                process_group=group,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=True,
            )
        block.attach(make_optimizer)

    def train_forward(self, message: Message, update: bool) -> tuple[Message, Tensor]:
        self.wrapped.require_backward_grad_sync = update  # as ``no_sync`` does: average once per optimizer step
        result: tuple[Message, Tensor] = self.wrapped(message)
        return result

    def train_backward(self, loss: Tensor) -> None:
        """Run backward from the loss.

        Raises:
            Refusal: a unit recomputes activations in torch's reentrant form, which DDP sees as a second backward pass.
        """
        try:
            super().train_backward(loss)
        except RuntimeError as error:
            if "mark a variable ready only once" in str(error):
                raise Refusal(
                    "with placement.replication ddp, a unit must not recompute in torch's reentrant form (checkpoint "
                    "without use_reentrant=False, MMDetection's with_cp); use local.recompute units in its place"
                ) from error
            raise


@functools.cache
def _silence(device: torch.device, group: dist.ProcessGroup) -> None:
    """Let torch say, unheard, that ``find_unused_parameters`` takes time where every parameter is used.

    It says so once per process, from C++ and straight to stderr, in a forward pass that uses every parameter. A later
    one may drop a layer, so the time is well spent: about 3 ms for a ResNet with 170 parameters on a CPU.
    """
    small = DistributedDataParallel(nn.Linear(1, 1).to(device), process_group=group, find_unused_parameters=True)
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            small(torch.ones(1, 1, device=device)).sum().backward()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
