"""MMEngine's optimizer wrappers, one per block, set up by the detector's own parameter names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from torch import Tensor, nn

from engine.learning.block import Block
from engine.run.checkpoint import AUXILIARY


class BlockOptimWrappers(OptimWrapperDict):
    """The wrappers of all blocks, which see the same iterations and usually have the same learning rates."""

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        for wrapper in self.values():
            wrapper.initialize_count_status(model, cur_iter, max_iters)

    def get_lr(self) -> dict[str, list[float]]:
        """The first block's rates, under MMEngine's usual names, if all blocks have the same; else each block's."""
        rates = [wrapper.get_lr() for wrapper in self.values()]
        bases = {tuple(rate.get("base_lr", rate["lr"])) for rate in rates}
        first: dict[str, list[float]] = rates[0]
        return first if len(bases) == 1 else super().get_lr()


def part_of(detector: nn.Module, block: Block) -> nn.Module:
    """The part of a detector's module tree that belongs to a block, with all modules under their own names.

    MMEngine's optimizer constructors decide by names and kinds of layers, which are then the same as in the whole
    detector. The auxiliary network is the submodule ``auxiliary``.
    """
    part = _part(detector, {id(parameter) for parameter in block.parameters()})
    if block.auxiliary is not None:
        part.add_module(AUXILIARY.rstrip("."), block.auxiliary)
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
        detector: the detector as it is trained now.
        config: the config from which MMEngine builds that optimizer.
        saved: the optimizer's state in a checkpoint of end-to-end training.

    Returns:
        None if ``saved`` has other groups, other settings in them, or other shapes: its numbers may then stand for
        other parameters, or its state may be that of another kind of optimizer.
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
    """A checkpoint's optimizer state for the detector's own parameters, as ``name:key`` -> tensor.

    Args:
        parameters: for each wrapper, names of the parameters in the order of its optimizer.
        saved: the state of each wrapper; empty if the checkpoint has none.
    """
    found = {}
    for wrapper, names in parameters.items():
        state = saved.get(wrapper, {}).get("state", {})
        for number, name in enumerate(names):
            for key, value in state.get(number, {}).items():
                if value is not None and not name.startswith(AUXILIARY):
                    found[f"{name}:{key}"] = torch.as_tensor(value)
    return found
