"""Optimizers per block, their learning-rate course, and their state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from engine.config import OptimizerConfig

Named = list[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[Named], torch.optim.Optimizer]


def build_optimizer(config: OptimizerConfig, named: Named) -> torch.optim.Optimizer:
    """An optimizer over the parameters that want gradients.

    It works on lists of tensors, as torch's default is on a GPU, on every device: an update takes the same
    memory everywhere (up to a copy of the block's gradients), so an estimate made on a CPU holds on a GPU.
    """
    # A group, since there may be none: frozen units that shared conditioning learns through.
    parameters = [{"params": [parameter for _, parameter in named if parameter.requires_grad]}]
    momentum, decay = config.momentum, config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum, weight_decay=decay, nesterov=config.nesterov, foreach=True
        )
    return torch.optim.AdamW(parameters, config.lr, (momentum, 0.999), weight_decay=decay, foreach=True)


def rate_factor(config: OptimizerConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate at optimizer step ``step`` (from 0), as a fraction of ``config.lr``.

    A pure function of the step, so resuming needs no scheduler state and never loses momentum.

    Example:
        >>> config = OptimizerConfig(schedule="step", milestones=[2])
        >>> [rate_factor(config, step, steps_per_epoch=10, epochs=4) for step in (0, 19, 20)]
        [1.0, 1.0, 0.1]
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / math.ceil(warmup)
    if config.schedule == "cosine":
        done = (step - warmup) / max(1.0, epochs * steps_per_epoch - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "step":
        return float(config.gamma ** sum(step >= milestone * steps_per_epoch for milestone in config.milestones))
    return 1.0


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group; nothing else of the optimizer changes."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_by_name(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Tensor]:
    """Optimizer state as ``parameter name:state name`` -> tensor."""
    state = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                state[f"{name}:{key}"] = torch.as_tensor(value)
    return state


def load_state_by_name(optimizer: torch.optim.Optimizer, named: Named, state: Mapping[str, Tensor]) -> None:
    """Inverse of ``state_by_name``; parameters without saved state start fresh."""
    parameters = dict(named)
    optimizer.state.clear()
    for full, value in state.items():
        name, key = full.rsplit(":", 1)
        if name in parameters:
            parameter = parameters[name]
            # Step counters stay on the CPU, as the optimizers themselves keep them.
            target = parameter.device if value.shape == parameter.shape else value.device
            optimizer.state.setdefault(parameter, {})[key] = value.to(target, copy=True)
