"""Wires: they carry bytes from one rank to another."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Tags keep the two kinds apart, because several tickets are asked for before the tensors of the first one.
TICKETS, TENSORS = 1, 2


class Work(Protocol):
    """A transfer that has started."""

    def wait(self) -> Any:
        """Wait until it has ended."""
        ...


class Wire(Protocol):
    """Moves bytes from one rank to another. Transfers with the same tag arrive in the order in which they were sent."""

    device: torch.device
    """Device from which the wire sends tensors, and on which it receives them."""

    def send(self, tensor: Tensor, tag: int) -> Work:
        """Start to send ``tensor``, which must stay unchanged until the transfer has ended."""
        ...

    def receive(self, tensor: Tensor, tag: int) -> Work:
        """Start to receive into ``tensor``, whose size must be that of the tensor sent."""
        ...


class GroupWire:
    """Point-to-point transfers of torch.distributed: gloo through main memory, NCCL between GPUs.

    NCCL ignores tags. Tickets stay apart from tensors all the same: they are on the CPU, and so always travel by gloo.
    """

    def __init__(self, peer: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.peer, self.group, self.device = peer, group, device

    def send(self, tensor: Tensor, tag: int) -> Work:
        work = dist.isend(tensor, self.peer, self.group, tag)
        assert work is not None
        return work

    def receive(self, tensor: Tensor, tag: int) -> Work:
        work = dist.irecv(tensor, self.peer, self.group, tag)
        assert work is not None
        return work
