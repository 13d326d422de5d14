"""Optimizers of blocks, the schedule of their learning rate, and their state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from engine.config import OptimizerConfig

Named = list[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[Named], torch.optim.Optimizer]


def build_optimizer(config: OptimizerConfig, named: Named) -> torch.optim.Optimizer:
    """An optimizer over the parameters that require gradients.

    It updates lists of tensors (``foreach``) on every device, which is torch's default only on a GPU. An update then
    takes the same memory everywhere, up to a copy of the block's gradients, so an estimate made on a CPU holds on a
    GPU.
    """
    # torch refuses an empty list of parameters, but accepts a group without any. A block of frozen units that read
    # shared conditioning has no parameters of its own to train.
    parameters = [{"params": [parameter for _, parameter in named if parameter.requires_grad]}]
    momentum, decay = config.momentum, config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum, weight_decay=decay, nesterov=config.nesterov, foreach=True
        )
    return torch.optim.AdamW(parameters, config.lr, (momentum, 0.999), weight_decay=decay, foreach=True)


def rate_factor(config: OptimizerConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate at optimizer step ``step`` (counted from 0), as a fraction of ``config.lr``.

    This is a pure function of the step, so a resumed run needs no scheduler state, and optimizers are never rebuilt,
    which would lose their momentum.

    Example:
        >>> config = OptimizerConfig(schedule="step", milestones=[2])
        >>> [rate_factor(config, step, steps_per_epoch=10, epochs=4) for step in (0, 19, 20)]
        [1.0, 1.0, 0.1]
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / math.ceil(warmup)  # not step / warmup: a first step at rate 0 would change nothing
    if config.schedule == "cosine":
        done = (step - warmup) / max(1.0, epochs * steps_per_epoch - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "step":
        return float(config.gamma ** sum(step >= milestone * steps_per_epoch for milestone in config.milestones))
    return 1.0


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group; the rest of the optimizer stays as it is."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_by_name(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Tensor]:
    """Optimizer state as tensors under the names ``PARAMETER:STATE``."""
    state = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:  # SGD without momentum keeps a buffer of None
                state[f"{name}:{key}"] = torch.as_tensor(value)
    return state


def load_state_by_name(optimizer: torch.optim.Optimizer, named: Named, state: Mapping[str, Tensor]) -> None:
    """The inverse of ``state_by_name``; parameters without saved state start fresh."""
    parameters = dict(named)
    optimizer.state.clear()
    for full, value in state.items():
        name, key = full.rsplit(":", 1)
        if name in parameters:
            parameter = parameters[name]
            # torch's optimizers keep step counters on the CPU, because reading one must not wait for a GPU. The copy
            # keeps the optimizer from writing into the saved tensors.
            target = parameter.device if value.shape == parameter.shape else value.device
            optimizer.state.setdefault(parameter, {})[key] = value.to(target, copy=True)
