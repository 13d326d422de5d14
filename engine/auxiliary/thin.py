"""Make a module of convolutions and normalisations narrower or wider, without touching its source."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def thin(module: nn.Module, width: float, name: str) -> nn.Module:
    """``module`` with every channel count multiplied by ``width``; its own layers are replaced.

    Weights are drawn anew (He initialisation, fan out).

    Grouped convolutions keep the width of a group and change the number of groups; depthwise ones stay
    depthwise.

    Raises:
        ValueError: a layer with parameters is of a kind that cannot be thinned; names it.
    """

    def scaled(channels: int) -> int:
        return max(1, round(channels * width))

    for path, child in list(module.named_modules()):
        new: nn.Module
        if isinstance(child, nn.Conv2d):
            groups = 1
            if child.groups > 1:
                groups = scaled(child.in_channels) // (child.in_channels // child.groups)
            new = nn.Conv2d(
                scaled(child.in_channels),
                scaled(child.out_channels),
                child.kernel_size,  # type: ignore[arg-type]
                child.stride,  # type: ignore[arg-type]
                child.padding,  # type: ignore[arg-type]
                child.dilation,  # type: ignore[arg-type]
                groups,
                child.bias is not None,
                child.padding_mode,
            )
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(child, _BatchNorm):
            new = type(child)(
                scaled(child.num_features), child.eps, child.momentum, child.affine, child.track_running_stats
            )
        elif isinstance(child, nn.GroupNorm):
            new = nn.GroupNorm(child.num_groups, scaled(child.num_channels), child.eps, child.affine)
        elif any(True for _ in child.parameters(recurse=False)):
            kind = type(child).__name__
            raise ValueError(f"local.auxiliary: width={width} cannot thin {kind} {path!r} of unit {name!r}; use 1")
        else:
            continue
        if not path:
            return new
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, new)
    return module
