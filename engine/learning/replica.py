"""What a block asks of the replication that it may be under: to run, to update, and to give out its state."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from engine.network.message import Message


class Replica(Protocol):
    """One of several ranks' copies of a block; the ranks train on different parts of every micro-batch.

    Everything but ``train_forward`` is collective: every replica calls it, in the same order. The kinds of
    replication are in ``engine.distributed.replication``.
    """

    rank: int
    """Among the replicas."""

    def train_forward(self, message: Message, update: bool) -> tuple[Message, Tensor]:
        """Output and loss. ``update``: the optimizer steps after this micro-batch, so gradients must be averaged."""
        ...

    def train_backward(self, loss: Tensor) -> None:
        """Backward from the loss."""
        ...

    def train_update(self) -> Tensor:
        """Clip, step, free the gradients; the gradient norm of the whole block (nan without clipping)."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which every replica has the whole parameters, to be read only."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Whole parameters and buffers under the names of ``Block.named_state``."""
        ...

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over whole parameters and buffers."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole optimizer state as ``parameter name:state name`` -> tensor."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """As ``engine.learning.optimizer.load_state_by_name``."""
        ...
