"""What a replicated block asks of its replication: to run, to update, and to hand out its state."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from engine.network.message import Message


class Replica(Protocol):
    """One rank's copy of a block that several ranks own; they train on different parts of every micro-batch.

    Any method may exchange tensors between replicas, so all replicas call every method, in the same order. The kinds of
    replication are in ``engine.distributed.replication``.
    """

    rank: int
    """Rank of this process among the replicas."""

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
