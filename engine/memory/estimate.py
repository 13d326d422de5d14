"""Peak bytes of a training step, on fake tensors: no GPU, no arithmetic, no memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.block import Block
from engine.memory.tracker import MemoryTracker
from engine.message import Message
from engine.schedules import Schedule


@dataclass(frozen=True)
class Estimate:
    """Bytes alive at the peak of a step, in all and by category.

    Categories: ``parameters`` and ``auxiliary`` (the auxiliary networks' parameters), ``gradients``,
    ``optimizer`` state, ``buffers``, ``activations`` (temporaries included). ``by_block_bytes`` has the
    peak within each block's local step.
    """

    peak_bytes: int
    by_category_bytes: dict[str, int]
    by_block_bytes: list[int]


def estimate_step(build: Callable[[], tuple[Schedule, Message]]) -> Estimate:
    """Bytes of all tensors alive at the peak of one training step of ``build``'s schedule on its message.

    ``build`` runs under fake tensors, so it may build a network of any size. The second step is read:
    optimizer state is born in the first.

    Known limitations: counts tensors as PyTorch makes them on the CPU, each rounded up to 512 bytes. Not
    seen are convolution workspaces, fragmentation and a GPU's context.
    """
    with FakeTensorMode():
        schedule, message = build()
        tracker = MemoryTracker()
        message.map(lambda tensor: _add(tracker, tensor))
        for block in schedule.blocks:
            _follow(tracker, block)
        with tracker:
            schedule.step(replace(message, sequence=0))
            tracker.reset_peak()
            peaks = []
            # The batch stays alive through the step, as in a training loop.
            passing = replace(message, sequence=1)
            highest, categories = 0, tracker.peak
            for block in schedule.blocks:
                tracker.reset_peak()
                passing, _ = block.local_step(passing)
                peaks.append(tracker.peak_bytes)
                if tracker.peak_bytes > highest:
                    highest, categories = tracker.peak_bytes, tracker.peak
    return Estimate(highest, {name: size for name, size in categories.items() if size}, peaks)


def _add(tracker: MemoryTracker, tensor: torch.Tensor) -> torch.Tensor:
    tracker.add([tensor], "activations")
    return tensor


def _follow(tracker: MemoryTracker, block: Block) -> None:
    """Make a block's state known, and have gradients and optimizer state counted as such when they appear."""
    optimizer = block.optimizer
    assert optimizer is not None

    def count_gradient(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        tracker.add([parameter.grad], "gradients")

    extra = set(block.auxiliary.parameters()) if block.auxiliary else set()
    for parameter in block.parameters():
        tracker.add([parameter], "auxiliary" if parameter in extra else "parameters")
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(count_gradient)  # type: ignore[no-untyped-call]
    tracker.add(block.buffers(), "buffers")

    def after_step(stepped: torch.optim.Optimizer, *_: object) -> None:
        for state in stepped.state.values():
            tracker.add((value for value in state.values() if isinstance(value, torch.Tensor)), "optimizer")

    optimizer.register_step_post_hook(after_step)
