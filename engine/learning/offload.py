"""Offload: keep the tensors that backward needs in main memory instead of on the GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

# To a dispatch mode (memory tracker, work counter), a stand-in's copy looks like any other clone on the CPU. This flag
# tells them that it stands for a transfer to main memory.
_copying = False


def standing_in() -> bool:
    """Whether the tensor that is being made right now stands for a copy in main memory."""
    return _copying


def offloading(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which every tensor that autograd saves moves to main memory and comes back when backward needs it.

    On a GPU this is torch's own ``save_on_cpu`` with pinned memory; its copies are synchronous. On a CPU, where there
    is no other memory, it is a stand-in that makes the same copies, so that accounting and tests need no GPU; it saves
    no memory.
    """
    if device.type == "cuda":
        return save_on_cpu(pin_memory=True)
    return _StandIn()


class _StandIn(saved_tensors_hooks):
    def __init__(self) -> None:
        def pack(tensor: Tensor) -> Tensor:
            global _copying
            _copying = True
            try:
                return tensor.clone()
            finally:
                _copying = False

        super().__init__(pack, lambda copy: copy.clone())  # the way back to the GPU makes a new tensor as well
