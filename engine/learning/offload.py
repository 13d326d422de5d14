"""Keep what backward needs in main memory instead of on the GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

_copying = False


def standing_in() -> bool:
    """Whether the tensor that is being made stands for one in main memory, as on a CPU nothing else tells."""
    return _copying


def offloading(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which everything saved for backward goes to main memory and comes back when it is needed.

    On a GPU torch's own ``save_on_cpu`` with pinned memory. On a CPU, where there is nowhere to go, a
    stand-in that makes the same copies, so that accounting and tests need no GPU; it saves no memory.
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

        super().__init__(pack, lambda copy: copy.clone())
