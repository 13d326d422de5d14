"""What a replicated block asks of its replication: to run, to update, and to hand out its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.network.message import Message


class Replica(Protocol):
    """One rank's copy of a block that several ranks own; they train on different parts of every micro-batch.

    Any method may exchange tensors between replicas, so all replicas call every method, in the same order. The kinds of
    replication are in ``engine.distributed.replication``.
    """

    rank: int
    """Rank of this process among the replicas."""
    seed: tuple[int, ...]
    """What tells this replica's random numbers from those of the others; empty if all replicas draw the same."""

    def train_forward(self, message: Message, update: bool) -> tuple[Message, Tensor]:
        """Return output and loss. With ``update``, the optimizer steps next, so backward must average gradients."""
        ...

    def train_backward(self, loss: Tensor) -> None:
        """Run backward from the loss."""
        ...

    def train_update(self) -> Tensor:
        """Clip, step and free the gradients; return the gradient norm of the whole block (nan without clipping)."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which every replica has the whole parameters and may read them."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Whole parameters and buffers, under the names of ``Block.named_state``."""
        ...

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load whole parameters and buffers; each replica keeps its shard of them."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole optimizer state, under the names ``PARAMETER:STATE``."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Load whole optimizer state, as ``engine.learning.optimizer.load_state_by_name`` does."""
        ...


def fill_unused(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Give each parameter that has a gradient on some replicas only a gradient of 0 on the others.

    A network may drop layers at random or choose them by its input, and then replicas use different parameters. They
    must still reduce the same gradients, or their collectives would not match. A parameter without a gradient on any
    replica keeps none, so the optimizer leaves it alone, as in one process. This is a collective call.
    """
    # On the CPU, where the host need not wait for a GPU's backward pass.
    replicas = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    dist.all_reduce(replicas, group=group)
    for parameter, used in zip(parameters, replicas.tolist(), strict=True):
        if used and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
