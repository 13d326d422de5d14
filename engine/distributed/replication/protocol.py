"""What every kind of replication is: how replicas of one block run, update and give out their state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn

from engine.learning.block import Block
from engine.learning.optimizer import load_state_by_name, state_by_name
from engine.learning.replica import Replica
from engine.network.message import Message


class Whole(nn.Module):
    """A block's units, auxiliary network and head under one forward that gives the loss: what gets wrapped.

    The block itself will not do: its forward is the units alone, as evaluation wants them. Wrappers look for
    tensors in what forward returns, so the loss, which backward starts from, is made in here.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        parts = [*block.unit_modules, block.auxiliary, block.head_module, block.criterion]
        self.parts = nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])
        # Methods, not the module: registered as a part, the block would contain itself.
        self._forward, self._autocast = block.train_forward, block.autocast

    def forward(self, message: Message) -> tuple[Message, Tensor]:
        with self._autocast():  # DeepSpeed switches autocast off around its forward
            return self._forward(message)


class Replication(Replica):
    """One block on every rank of ``group``, each with a part of every micro-batch.

    Gradients are averaged over the replicas. With each loss weighted by R * (samples of the part) / (samples of
    the whole), the result equals one process on the joined batch up to rounding, if dropout is 0, BatchNorm has its
    statistics over all replicas, and the task's loss is a mean over samples, or averages what it divides by over
    ``Task.group``. What is not overridden works as in a block that is not replicated.
    """

    def __init__(self, block: Block, group: dist.ProcessGroup) -> None:
        self.block, self.group, self.rank = block, group, dist.get_rank(group)

    @abstractmethod
    def train_forward(self, message: Message, update: bool) -> tuple[Message, Tensor]:
        raise NotImplementedError

    def train_backward(self, loss: Tensor) -> None:
        self.block.train_backward(loss)

    def train_update(self) -> Tensor:
        return self.block.train_update()

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        return self.block.named_state()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.block.named_state().items():
            if name in tensors:
                tensor.copy_(tensors[name])

    def optimizer_state(self) -> dict[str, Tensor]:
        assert self.block.optimizer is not None
        return state_by_name(self.block.optimizer, self.block.parameters_by_name())

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        assert self.block.optimizer is not None
        load_state_by_name(self.block.optimizer, self.block.parameters_by_name(), state)
