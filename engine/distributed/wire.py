"""Wires: bytes from one rank to another."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

TICKETS, TENSORS = 1, 2  # tags


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> Any: ...


class Wire(Protocol):
    """Moves bytes from one rank to another; those of a tag arrive in the order they were sent."""

    device: torch.device
    """Where tensors must be to be sent."""

    def send(self, tensor: Tensor, tag: int) -> Work: ...

    def receive(self, tensor: Tensor, tag: int) -> Work: ...


class GroupWire:
    """Point-to-point transfers of torch.distributed: gloo through main memory, NCCL between GPUs."""

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


class Loopback:
    """Both ends in one process: a stand-in for tests and for looking at what a link does."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._sent: dict[int, queue.Queue[Tensor]] = {TICKETS: queue.Queue(), TENSORS: queue.Queue()}

    def send(self, tensor: Tensor, tag: int) -> Work:
        self._sent[tag].put(tensor.clone())
        return _Done(lambda: None)

    def receive(self, tensor: Tensor, tag: int) -> Work:
        return _Done(lambda: tensor.copy_(self._sent[tag].get()))


@dataclass
class _Done:
    finish: Callable[[], Any]

    def wait(self) -> Any:
        return self.finish()
