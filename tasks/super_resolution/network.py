"""Build one of BasicSR's networks from the config."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from engine.utilities.text import one_line
from tasks.super_resolution.config import ModelConfig
from tasks.weights import load_weights

CHANNELS = {"EDSR": {"num_in_ch": 3, "num_out_ch": 3}, "RCAN": {"num_in_ch": 3, "num_out_ch": 3}}
CHANNELS["RRDBNet"] = CHANNELS["EDSR"]
SWINIR = {"upsampler": "pixelshuffle", "window_size": 8}
"""Arguments of the networks that have no default, or whose default does not enlarge."""

KEYS = ("params_ema", "params")
"""Keys of the weights in BasicSR's files; averaged weights come first, as when BasicSR itself tests."""


def build_network(config: ModelConfig, initial: bool = True) -> nn.Module:
    """The network that the config names, in training mode.

    Args:
        initial: load ``config.weights``, if any.

    Raises:
        ValueError: the network has no such scale or argument, or the weights do not fit.
    """
    kind, options = config.name, dict(config.options)
    network_class: Any = ARCH_REGISTRY.get(kind)
    scale_key = "scale" if kind == "RRDBNet" else "upscale"
    if scale_key in options:
        raise ValueError(f"model.options: {scale_key} is model.scale; take it out")
    takes = [name for name in inspect.signature(network_class).parameters if name not in ("kwargs", scale_key)]
    for name in options:
        if name not in takes:
            raise ValueError(f"model.options: {kind} has no argument {name!r}; known: {', '.join(takes)}")
    options = {**CHANNELS.get(kind, {}), **(SWINIR if kind == "SwinIR" else {}), **options}
    check_scale(kind, config.scale, options.get("upsampler", ""))
    try:
        network: nn.Module = network_class(**options, **{scale_key: config.scale})
    except Exception as error:
        raise ValueError(f"model.options: {kind}: {one_line(error, 300)}") from error
    if initial and config.weights:
        load_weights(network, Path(config.weights), keys=KEYS)
    return network.train()


def check_scale(kind: str, scale: int, upsampler: str = "") -> None:
    """Refuse a scale that the network does not support, for which BasicSR would build another network.

    Raises:
        ValueError: the scale is not supported; the message names those that are.
    """
    power = scale > 1 and scale & (scale - 1) == 0
    has, known = {
        "MSRResNet": (scale in (2, 3, 4), "2, 3 and 4"),
        "RRDBNet": (scale in (2, 4), "2 and 4"),
        "nearest+conv": (scale == 4, "4 alone"),
        "pixelshuffledirect": (scale > 1, "any of 2 or more"),
    }.get(upsampler or kind, (power or scale == 3, "powers of 2, and 3"))
    if not has:
        name = f"{kind} with upsampler {upsampler}" if upsampler else kind
        raise ValueError(f"model.scale: {name} has no scale {scale}; it has {known}")


def side_multiple(network: Any) -> int:
    """The number of pixels of which the sides of the input must be multiples."""
    kind = type(network).__name__
    if kind == "SwinIR":
        return int(network.layers[0].residual_group.blocks[0].window_size)
    return {1: 4, 2: 2}.get(network.scale, 1) if kind == "RRDBNet" else 1


def image_range(network: Any) -> float:
    """How many times larger the values in the network's maps are than those of images; 255 in EDSR, for example."""
    return float(getattr(network, "img_range", 1.0))
