"""Replicas with layers whose forward pass is a collective call must run the same layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.learning.outcome import Refusal

END = -1


def compare_order(
    block: nn.Module, names: Mapping[str, nn.Module], collective: Mapping[nn.Module, str], group: dist.ProcessGroup
) -> None:
    """Compare, before the first training pass of each module in ``collective``, that all replicas run the same one.

    Otherwise the collective calls of different layers would meet: the job would crash or wait for ever, or mix up
    tensors of the same size. Replicas with such modules draw the same random numbers, so only a network that chooses
    its layers by the input can make them differ.

    Known limitations: a module is compared at its first training pass only. If replicas diverge later, ZeRO compares
    which parameters take part in the loss, and synchronised BatchNorm on a CPU compares calls of the same width; other
    widths end the job with an error of the collective. On a GPU, BatchNorms of the same width can mix their statistics.

    Args:
        block: the module whose forward pass runs all others; while some of ``collective`` have not run, replicas also
            compare that they have reached its end.
        names: the block's modules by name.
        collective: for each module whose forward pass is a collective call, the key of the config that makes it one.

    Raises:
        Refusal: in a local step, if replicas run different modules.
    """
    known = {module: name for name, module in names.items()}
    modules = [module for module in collective if module in known]
    waiting: dict[int, RemovableHandle] = {}

    def compare(number: int) -> None:
        numbers = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size(group))]
        dist.all_gather(numbers, torch.tensor(number), group=group)
        runs = ["the end" if other == END else repr(known[modules[int(other)]]) for other in numbers]
        if len(set(runs)) > 1:
            key = collective[modules[max(int(other) for other in numbers)]]
            raise different(key, ", ".join(f"{name} on replica {rank}" for rank, name in enumerate(runs)))

    def before(module: nn.Module, inputs: object) -> None:
        number = numbered[module]
        if module.training and torch.is_grad_enabled() and number in waiting:
            waiting.pop(number).remove()
            compare(number)

    def after(module: nn.Module, inputs: object, outputs: object) -> None:
        if not waiting:
            last.remove()
        # A module in evaluation mode, such as a frozen BatchNorm, exchanges nothing, and may never do so.
        elif any(modules[number].training for number in waiting):
            compare(END)

    numbered = {module: number for number, module in enumerate(modules)}
    # In front, because ZeRO-3 gathers a module's parameters in such a hook of its own.
    waiting |= {number: module.register_forward_pre_hook(before, prepend=True) for module, number in numbered.items()}
    last = block.register_forward_hook(after)


def different(key: str, runs: str) -> Refusal:
    """What to say if replicas run different layers because of ``key``, a key of the config with its value."""
    return Refusal(
        f"with {key}, all replicas must run the same layers, but next come {runs}; use placement.replication ddp or "
        "fsdp and placement.sync_batch_norm false"
    )
