"""Replicas with layers whose forward pass is a collective call must run the same layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from engine.learning.outcome import Refusal


def compare_order(
    names: Mapping[str, nn.Module], collective: Mapping[nn.Module, str], group: dist.ProcessGroup
) -> None:
    """Compare, before the first training pass of each module in ``collective``, that all replicas run the same one.

    Otherwise the collective calls of different layers would meet: the job would crash, or mix up tensors of the same
    size. Replicas with such modules draw the same random numbers, so only a network that chooses its layers by the
    input can make them differ.

    Known limitations: a module is compared at its first training pass only, so replicas that first diverge later are
    not refused; their statistics mix, or the job ends at ``placement.timeout``. So does a job in which only some
    replicas reach the last such module of a block.

    Args:
        names: the block's modules by name.
        collective: for each module whose forward pass is a collective call, the key of the config that makes it one.

    Raises:
        Refusal: in a local step, if replicas run different modules.
    """
    known = {module: name for name, module in names.items()}
    modules = [module for module in collective if module in known]

    def compare(number: int) -> None:
        numbers = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size(group))]
        dist.all_gather(numbers, torch.tensor(number), group=group)
        runs = [known[modules[int(other)]] for other in numbers]
        if len(set(runs)) > 1:
            where = ", ".join(f"{name!r} on replica {rank}" for rank, name in enumerate(runs))
            raise Refusal(
                f"with {collective[modules[number]]}, all replicas must run the same layers, but next come {where}; "
                "use placement.replication ddp or fsdp and placement.sync_batch_norm false"
            )

    for number, module in enumerate(modules):
        _before_first_pass(module, partial(compare, number))


def _before_first_pass(module: nn.Module, function: Callable[[], None]) -> None:
    def before(module: nn.Module, inputs: object) -> None:
        if module.training and torch.is_grad_enabled():
            handle.remove()
            function()

    handle = module.register_forward_pre_hook(before)
