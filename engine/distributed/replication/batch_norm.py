"""BatchNorm whose statistics cover the samples of all replicas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as CudaSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from engine.distributed.replication.lockstep import different

SYNCHRONISED = "placement.sync_batch_norm true"


def synchronise(modules: Mapping[str, nn.Module], group: dist.ProcessGroup) -> list[_BatchNorm]:
    """Let every BatchNorm among ``modules`` compute its statistics over ``group`` while it trains, and return them.

    The modules keep their names and identities. Only their class changes: to a subclass whose forward calls the
    original forward with ``torch.nn.functional.batch_norm`` replaced meanwhile. Therefore a BatchNorm with a forward of
    its own (timm has one that includes an activation) works as well. In evaluation mode, in which some networks keep
    frozen BatchNorms, nothing is exchanged.
    """
    found: dict[_BatchNorm, str] = {}
    for name, module in modules.items():
        if isinstance(module, _BatchNorm):
            found.setdefault(module, name)
    made: dict[type[_BatchNorm], type[_BatchNorm]] = {}
    for number, (norm, name) in enumerate(found.items()):
        kind = type(norm)
        if kind not in made:
            made[kind] = _synchronised(kind, group)
        norm.__class__ = made[kind]
        vars(norm)["place"] = _Place(number, name)
    return list(found)


class _Place(NamedTuple):
    """Which BatchNorm of its block a module is."""

    number: int
    name: str


def _synchronised(kind: type[_BatchNorm], group: dist.ProcessGroup) -> type[_BatchNorm]:
    # torch.compile would trace past the replacement, so this forward stays out of its graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self: Any, *args: Any) -> Any:
        if not self.training:
            return kind.forward(self, *args)
        with _Replaced(group, self.place):
            return kind.forward(self, *args)

    return type(f"Synchronised{kind.__name__}", (kind,), {"forward": forward})


class _Replaced(TorchFunctionMode):
    """A context in which ``batch_norm`` below takes the place of torch's."""

    def __init__(self, group: dist.ProcessGroup, place: _Place) -> None:
        super().__init__()
        self.group, self.place = group, place

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            return batch_norm(self.group, self.place, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def batch_norm(
    group: dist.ProcessGroup,
    place: _Place,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` in training, as if the inputs of all replicas were one batch.

    Args:
        input: (N, C, ...); replicas may have different N.

    Raises:
        ValueError: all replicas together have a single value per channel.
        Refusal: on a CPU, if another replica runs another BatchNorm of the block.
    """
    assert training, "only training computes statistics"
    if input.is_cuda:
        replicas = dist.get_world_size(group)
        cuda: Tensor = CudaSyncBatchNorm.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, running_mean, running_var, eps, momentum, group, replicas
        )
        return cuda
    result: Tensor = _OnCPU.apply(input, weight, bias, running_mean, running_var, eps, momentum, group, place)  # type: ignore[no-untyped-call]
    return result


class _OnCPU(torch.autograd.Function):
    """The CPU form of torch's ``SyncBatchNorm``, which torch has for GPUs only.

    Like BatchNorm, it saves the input and two values per channel for backward. Shapes are (N, C, ...) for input and
    result, and (C) for everything else. With x^ = (x - mean) / deviation, n values per channel and sums over all
    replicas, dx = weight / deviation * (dy - sum(dy) / n - x^ * sum(dy * x^) / n).
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        group: dist.ProcessGroup,
        place: _Place,
    ) -> Tensor:
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        axes = [axis for axis in range(x.dim()) if axis != 1]
        # One collective for the count, the module's number and the sums. The counts differ where the parts of a
        # micro-batch do; the numbers must not.
        own = x.new_tensor([x.numel() // x.shape[1], place.number])
        total = _sum(torch.cat([own, x.sum(axes)]), group)
        if total[1] != place.number * dist.get_world_size(group):
            raise different(SYNCHRONISED, f"{place.name!r} on replica {dist.get_rank(group)} and another elsewhere")
        count, mean = total[0], total[2:] / total[0]
        if count == 1:
            raise ValueError(f"BatchNorm needs more than 1 value per channel over all replicas, got {tuple(x.shape)}")
        centred = x - _wide(mean, x)
        # A second collective, about the mean: E[x^2] - E[x]^2 would lose its digits where the mean is large.
        variance = _sum(centred.square().sum(axes), group) / count
        inverse = (variance + eps).rsqrt()
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                # As in torch, running_var holds the unbiased variance, while normalisation uses the biased one.
                running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
        ctx.save_for_backward(input, weight, mean, inverse, count)
        ctx.group, ctx.axes = group, axes
        result = centred.mul_(_wide(inverse, x))  # in place: ``centred`` is not needed again, backward recomputes it
        if weight is not None:
            result = result.mul_(_wide(weight, x))
        if bias is not None:
            result = result.add_(_wide(bias, x))
        return result.to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse, count = ctx.saved_tensors
        y = gradient.to(mean.dtype)
        normal = (input - _wide(mean, y)).mul_(_wide(inverse, y))
        # For weight and bias, each replica returns the gradient from its own samples: the replication averages the
        # gradients of parameters later. The gradient of the input needs the sums over all replicas.
        d_weight, d_bias = (y * normal).sum(ctx.axes), y.sum(ctx.axes)
        d_input = None
        if ctx.needs_input_grad[0]:
            sums = _sum(torch.stack([d_bias, d_weight]), ctx.group) / count
            scale = inverse if weight is None else inverse * weight
            d_input = (y - _wide(sums[0], y) - normal.mul_(_wide(sums[1], y))).mul_(_wide(scale, y)).to(input.dtype)
        needs = ctx.needs_input_grad
        return d_input, d_weight if needs[1] else None, d_bias if needs[2] else None, *[None] * 6


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(tensor, group=group)
    return tensor


def _wide(channels: Tensor, like: Tensor) -> Tensor:
    """(C) -> (1, C, 1, ...)."""
    return channels.view(1, -1, *[1] * (like.dim() - 2))
