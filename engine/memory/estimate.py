"""Peak bytes of a training step, on fake tensors: no GPU, no arithmetic, no memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from engine.block import Block
from engine.build import prepare
from engine.config import Config
from engine.memory.tracker import MemoryTracker
from engine.message import Message


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


def estimate_step(blocks: list[Block], config: Config, message: Message) -> Estimate:
    """Bytes of all tensors alive at the peak of one optimizer step of ``config``'s schedule.

    Args:
        blocks: as ``build_blocks`` returns them, on the CPU; afterwards their tensors are fake and they are
            of no further use. Only their parameters take real memory, and no step is computed.
        config: schedule, optimizer, precision, checkpointing and accumulation.
        message: a micro-batch; only its shapes count.

    The second step is read: optimizer state is born in the first.

    Known limitations: counts tensors as PyTorch makes them on the CPU, each rounded up to 512 bytes. Not
    seen are convolution workspaces, fragmentation and a GPU's context; fp16's loss scaler is left out.
    """
    with FakeTensorMode():
        _make_fake([blocks[0].chain.model, *blocks])
        for block in blocks:
            block.scaled = False  # a scaler asks for values, and fake tensors have none
        config = replace(config, local=replace(config.local, compile=False))
        prepare(blocks, config, torch.device("cpu"))
        message = message.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        tracker = MemoryTracker()
        tracker.add(message.flatten()[0], "activations")
        for block in blocks:
            _follow(tracker, block)
        peaks, highest, categories = [0] * len(blocks), 0, tracker.peak
        with tracker:
            for sequence in range(2 * config.train.accumulate):
                update = (sequence + 1) % config.train.accumulate == 0
                # The batch stays alive through the step, as in a training loop.
                passing = replace(message, sequence=sequence)
                for number, block in enumerate(blocks):
                    tracker.reset_peak()
                    passing, _ = block.local_step(passing, update=update)
                    if sequence < config.train.accumulate:
                        continue
                    peaks[number] = max(peaks[number], tracker.peak_bytes)
                    if tracker.peak_bytes > highest:
                        highest, categories = tracker.peak_bytes, tracker.peak
    return Estimate(highest, {name: size for name, size in categories.items() if size}, peaks)


def _make_fake(modules: Iterable[nn.Module]) -> None:
    """Put a fake tensor in every parameter's and buffer's place; what was shared stays shared."""
    made: dict[int, torch.Tensor] = {}
    for root in modules:
        for module in root.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None or isinstance(tensor, FakeTensor):
                        continue
                    if id(tensor) not in made:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        wanted = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if wanted else empty
                    held[name] = made[id(tensor)]  # type: ignore[assignment]


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
