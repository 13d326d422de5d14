"""MMEngine's optimizer wrappers, one a block, set up by the detector's own parameter names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from torch import Tensor, nn

from engine.learning.block import Block

OF_AUXILIARY = "auxiliary."
"""What the names of auxiliary networks' parameters begin with, here and in ``paramwise_cfg``."""


class BlockOptimWrappers(OptimWrapperDict):
    """Wrappers of all blocks, which see the same iterations and as a rule have the same learning rates."""

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        for wrapper in self.values():
            wrapper.initialize_count_status(model, cur_iter, max_iters)

    def get_lr(self) -> dict[str, list[float]]:
        """The first block's, under MMEngine's usual names, if all have the same; else each block's."""
        rates = [wrapper.get_lr() for wrapper in self.values()]
        bases = {tuple(rate.get("base_lr", rate["lr"])) for rate in rates}
        first: dict[str, list[float]] = rates[0]
        return first if len(bases) == 1 else super().get_lr()


def part_of(detector: nn.Module, block: Block) -> nn.Module:
    """The part of a detector's module tree that a block has, its own modules under their own names.

    What MMEngine's optimizer constructors go by, names and kinds of layers, is then as in the whole detector. The
    auxiliary network is in it as ``auxiliary``.
    """
    part = _part(detector, {id(parameter) for parameter in block.parameters()})
    if block.auxiliary is not None:
        part.add_module(OF_AUXILIARY.rstrip("."), block.auxiliary)
    return part


def _part(module: nn.Module, wanted: set[int]) -> nn.Module:
    part = nn.Module()
    for name, child in module.named_children():
        own = {id(parameter) for parameter in child.parameters()}
        if own & wanted:
            part.add_module(name, child if own <= wanted else _part(child, wanted))
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in wanted:
            part.register_parameter(name, parameter)
    return part


def names_in_order(block: Block) -> list[str]:
    """Names of a block's parameters in the order in which its optimizer numbers them."""
    assert block.optimizer is not None
    names = {id(parameter): name for name, parameter in block.parameters_by_name()}
    return [names[id(parameter)] for group in block.optimizer.param_groups for parameter in group["params"]]


def names_end_to_end(detector: nn.Module, config: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str] | None:
    """Names of a detector's parameters in the order in which one optimizer for all of them numbers them.

    Args:
        detector: as it is trained now.
        config: what MMEngine builds that optimizer from.
        saved: the optimizer's state in a checkpoint of end-to-end training.

    Returns:
        None if ``saved`` has other groups, other settings in them, or other shapes: its numbers may mean other
        parameters, or its state be another optimizer's.
    """
    optimizer = build_optim_wrapper(detector, config).optimizer
    groups, others = optimizer.state_dict()["param_groups"], saved.get("param_groups", [])
    if [group["params"] for group in groups] != [other["params"] for other in others]:
        return None
    if any(group.keys() - other.keys() for group, other in zip(groups, others, strict=True)):
        return None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in saved["state"].items():
        shapes = {value.shape for value in state.values() if isinstance(value, Tensor) and value.dim() > 0}
        if shapes - {parameters[number].shape}:
            return None
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def optimizer_by_name(parameters: Mapping[str, Sequence[str]], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The optimizers' state that a checkpoint has of the detector's own parameters, as ``name:key`` -> tensor.

    Args:
        parameters: names of each wrapper's parameters in their optimizer's order.
        saved: the state of each wrapper; nothing in a checkpoint without.
    """
    found = {}
    for wrapper, names in parameters.items():
        state = saved.get(wrapper, {}).get("state", {})
        for number, name in enumerate(names):
            for key, value in state.get(number, {}).items():
                if value is not None and not name.startswith(OF_AUXILIARY):
                    found[f"{name}:{key}"] = torch.as_tensor(value)
    return found
