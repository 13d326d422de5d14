"""Make a module of convolutions and normalisations narrower or wider without editing its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def thin(module: nn.Module, width: float) -> nn.Module:
    """Multiply every channel count of ``module`` by ``width``, by changing its layers in place.

    What a layer is depends on its attributes, not on its class, so that a framework's own convolutions and
    normalisations are thinned too:

    - A convolution has ``in_channels``, ``out_channels``, ``groups`` and ``kernel_size``. It gets new weights (He
      initialisation, fan out). A grouped convolution keeps the width of its groups and changes their number, so a
      depthwise convolution stays depthwise. The convolution that predicts a deformable convolution's offsets keeps its
      outputs, and starts at zero.
    - A normalisation has ``num_features``, ``num_channels`` or a ``normalized_shape`` of one number.
    - A layer whose parameters are single numbers stays as it is.

    If a module has a method ``thinned(width)``, its result takes the module's place.

    Returns:
        ``module``, or its replacement if it has ``thinned`` itself.

    Raises:
        ValueError: a layer with parameters is of a kind that cannot be thinned. The message names the layer.
    """
    offsets = {id(child) for parent in module.modules() for child in _offset_convolutions(parent)}
    for path, child in list(module.named_modules()):  # a list, because the loop replaces modules
        try:
            thinned: Callable[[float], nn.Module] | None = getattr(child, "thinned", None)
            if thinned is None:
                _thin_layer(child, width, id(child) in offsets)
                continue
            new = thinned(width)
        except ValueError as error:
            raise ValueError(f"{type(child).__name__}{f' {path!r}' if path else ''}: {error}") from error
        if not path:  # the unit is a single layer, so there is no parent to put the new one into
            return new
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, new)
    return module


def _offset_convolutions(layer: nn.Module) -> Iterator[nn.Module]:
    """The convolutions that predict the offsets of a deformable convolution, whose number depends on its kernel."""
    if hasattr(layer, "deform_groups"):
        yield from (child for name, child in layer.named_children() if "offset" in name)


def _thin_layer(layer: nn.Module, width: float, offsets: bool) -> None:
    if all(hasattr(layer, key) for key in ("in_channels", "out_channels", "groups", "kernel_size", "weight")):
        _thin_convolution(layer, width, offsets)
        return
    for key in ("num_features", "num_channels", "normalized_shape"):
        channels = getattr(layer, key, None)
        if isinstance(channels, tuple) and len(channels) == 1:
            channels = channels[0]
        if isinstance(channels, int):
            _thin_normalisation(layer, channels, _scaled(channels, width))
            return
    if any(parameter.numel() > 1 for parameter in layer.parameters(recurse=False)):
        raise ValueError("neither a convolution nor a normalisation")


def _thin_convolution(layer: Any, width: float, offsets: bool) -> None:
    before = layer.in_channels, layer.out_channels
    after = _scaled(before[0], width), before[1] if offsets else _scaled(before[1], width)
    groups = after[0] // (before[0] // layer.groups) if layer.groups > 1 else 1
    for key, parts in (("groups", groups), ("deform_groups", getattr(layer, "deform_groups", 1))):
        if not parts or any(channels % parts for channels in after):
            raise ValueError(f"{after[0]} to {after[1]} channels are not divisible by {key} {parts}")
    old, new = _weight_sides(layer, before, layer.groups), _weight_sides(layer, after, groups)
    layer.in_channels, layer.out_channels, layer.groups = *after, groups
    for held, key, tensor in _own_tensors(layer):
        if tensor.shape[:2] == old:
            held[key] = _of_shape(tensor, (*new, *tensor.shape[2:]))
        elif tensor.dim() and len(tensor) == before[1]:
            held[key] = _of_shape(tensor, (after[1], *tensor.shape[1:]))
        elif tensor.numel() > 1:
            raise ValueError(f"{key} of shape {tuple(tensor.shape)} does not go by channels")
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()
    if offsets:
        for parameter in layer.parameters(recurse=False):
            nn.init.zeros_(parameter)
    else:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _weight_sides(layer: Any, channels: tuple[int, int], groups: int) -> tuple[int, int]:
    """The first two sides of the weight: (out, in / groups); of a transposed convolution (in, out / groups)."""
    first, second = channels if getattr(layer, "transposed", False) else channels[::-1]
    return first, second // groups


def _thin_normalisation(layer: Any, before: int, after: int) -> None:
    if after % getattr(layer, "num_groups", 1):
        raise ValueError(f"num_channels {after} is not divisible by num_groups {layer.num_groups}")
    for key in ("num_features", "num_channels", "normalized_shape"):
        if hasattr(layer, key):
            setattr(layer, key, (after,) if isinstance(getattr(layer, key), tuple) else after)
    for held, key, tensor in _own_tensors(layer):
        # Most are (C,), but some have axes for height and width: (1, C, 1, 1).
        shape = tuple(after if size == before else size for size in tensor.shape)
        if tensor.numel() > 1 and shape.count(after) != 1:
            raise ValueError(f"{key} of shape {tuple(tensor.shape)} does not go by channels")
        held[key] = _of_shape(tensor, shape)
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()


def _own_tensors(layer: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """The layer's own parameters and buffers: who holds it, its name, and itself."""
    held: list[dict[str, Any]] = [layer._parameters, layer._buffers]
    return [(holder, key, tensor) for holder in held for key, tensor in holder.items() if tensor is not None]


def _of_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape with values from ``tensor``, cut short or repeated along every axis."""
    values = tensor.detach()
    for axis, size in enumerate(shape):
        values = values.index_select(axis, torch.arange(size, device=values.device) % values.shape[axis])
    return nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))
