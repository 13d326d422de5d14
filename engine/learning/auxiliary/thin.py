"""Make a module of convolutions and normalisations narrower or wider without editing its source."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def thin(module: nn.Module, width: float, name: str) -> nn.Module:
    """Multiply every channel count of ``module`` by ``width``, by replacing its layers in place.

    The new layers have new weights (He initialisation, fan out). A grouped convolution keeps the width of its groups
    and changes their number, so a depthwise convolution stays depthwise. If a module has a method ``thinned(width)``,
    its result takes the module's place.

    Args:
        name: name of the unit, for the error.

    Returns:
        ``module``, or its replacement if it is itself a layer.

    Raises:
        ValueError: a layer with parameters is of a kind that cannot be thinned. The message names the layer.
    """

    for path, child in list(module.named_modules()):  # a list, because the loop replaces modules
        if not (hasattr(child, "thinned") or any(True for _ in child.parameters(recurse=False))):
            continue
        try:
            new = _thinned(child, width)
        except ValueError as error:
            kind = type(child).__name__
            raise ValueError(
                f"local.auxiliary: width={width} cannot thin {kind} {path!r} of unit {name!r} ({error}); use width=1"
            ) from error
        if not path:  # the unit is a single layer, so there is no parent to put the new one into
            return new
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, new)
    return module


def _thinned(layer: nn.Module, width: float) -> nn.Module:
    """A new layer of exactly the same type. A subclass is refused, because it may do more than its base class."""
    thinned: Callable[[float], nn.Module] | None = getattr(layer, "thinned", None)
    if thinned is not None:
        return thinned(width)

    def scaled(channels: int) -> int:
        return max(1, round(channels * width))

    if type(layer) is nn.Conv2d:
        groups = 1
        if layer.groups > 1:
            groups = scaled(layer.in_channels) // (layer.in_channels // layer.groups)
        convolution = nn.Conv2d(
            scaled(layer.in_channels),
            scaled(layer.out_channels),
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            groups,
            layer.bias is not None,
            layer.padding_mode,
        )
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        return convolution
    if type(layer) is nn.BatchNorm2d:
        channels = scaled(layer.num_features)
        return nn.BatchNorm2d(channels, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    if type(layer) is nn.GroupNorm:
        return nn.GroupNorm(layer.num_groups, scaled(layer.num_channels), layer.eps, layer.affine)
    raise ValueError("not a Conv2d, BatchNorm2d or GroupNorm")
