"""What all kinds of replication have in common: how replicas of one block run, update and hand out their state."""

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
    """The module that a wrapper (DDP, FSDP2, ZeRO) wraps: units, auxiliary network, head and loss of one block.

    The block itself would not do, because its forward runs the units alone, for evaluation. Wrappers attach to the
    tensors that forward returns, so the loss, from which backward starts, must be computed inside.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        parts = [*block.unit_modules, block.auxiliary, block.head_module, block.criterion]
        self.parts = nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])
        # Keep the block's methods, not the block: as an attribute it would be registered as a submodule, and every
        # parameter would occur twice.
        self._forward, self._autocast = block.train_forward, block.autocast

    def forward(self, message: Message) -> tuple[Message, Tensor]:
        with self._autocast():  # again, because DeepSpeed turns autocast off around its forward
            return self._forward(message)


class Replication(Replica):
    """One block on every rank of ``group``; each of the R replicas trains on its part of every micro-batch.

    Replicas average their gradients, and each loss is weighted by R * (samples of the part) / (samples of the batch).
    Up to rounding, the result is that of one process on the whole batch if dropout is 0, BatchNorm computes its
    statistics over all replicas, and the task's loss is a mean over samples, or averages its divisor over
    ``Task.group``. A method that a subclass does not override works as in a block that is not replicated.
    """

    def __init__(self, block: Block, group: dist.ProcessGroup) -> None:
        self.block, self.group, self.rank = block, group, dist.get_rank(group)
        self.whole = Whole(block)
        self.seed: tuple[int, ...] = (self.rank,)  # replicas have different samples, so each draws its own dropout

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
