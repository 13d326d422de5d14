"""Features of a frozen VGG, by which contents and styles are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.utilities.text import one_line
from tasks.weights import read_weights

CHANNELS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
"""Number of convolutions in each stage; maps are halved before every stage but the first."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class VGGConfig:
    """The frozen network that computes content features and losses."""

    name: Literal["vgg16", "vgg19"] = "vgg19"
    """A network of torchvision, up to the last convolution of its fourth or fifth stage, as its weights allow."""
    weights: str = ""
    """File with weights under torchvision's names; empty downloads torchvision's own; `random` leaves the network
    untrained, which is only good for trying the machinery."""
    pixels: Literal["imagenet", "bytes"] = "imagenet"
    """How pixels are normalised: `imagenet` subtracts ImageNet's mean from 0..1 and divides by its deviation, as
    torchvision's weights expect; `bytes` subtracts the mean from 0..255."""


class FrozenConv(nn.Module):
    """A 3x3 convolution with ReLU whose weights are buffers, so that no optimizer sees them."""

    def __init__(self, weight: Tensor, bias: Tensor, saved: bool) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight, persistent=saved)
        self.register_buffer("bias", bias, persistent=saved)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(F.conv2d(x, self.weight, self.bias, padding=1))


class VGG(nn.Module):
    """torchvision's VGG up to the last requested layer; layers are called ``relu1_1`` to ``relu5_4``.

    Args:
        config: which network, which weights, and how pixels are normalised.
        layers: the layers that ``forward`` returns; the network ends with the last of them.
        saved: whether the weights are saved with the module that contains this network.
        load: whether to read the weights; otherwise they are random, and others are about to replace them.

    Raises:
        ValueError: a layer does not exist, or the weights are not available or do not reach that far.
    """

    def __init__(self, config: VGGConfig, layers: Sequence[str], *, saved: bool, load: bool = True) -> None:
        super().__init__()
        self.layers, self.pixels = tuple(layers), config.pixels
        counts = CONVOLUTIONS[config.name]
        known = [f"relu{stage}_{n}" for stage, count in enumerate(counts, 1) for n in range(1, count + 1)]
        for layer in layers:
            if layer not in known:
                raise ValueError(f"{layer!r} is not a layer of {config.name}; its layers are {', '.join(known)}")
        names = known[: 1 + max(known.index(layer) for layer in layers)]
        weights = _weights(config, names) if load and config.weights != "random" else {}
        before = 3
        for name in names:
            channels = CHANNELS[int(name[4]) - 1]
            shape = channels, before, 3, 3
            weight, bias = weights.get(name) or (nn.init.kaiming_normal_(torch.empty(shape)), torch.zeros(channels))
            if weight.shape != shape:
                raise ValueError(f"model.vgg: {name} of {config.weights} is {tuple(weight.shape)}, not {shape}")
            self.add_module(name, FrozenConv(weight, bias, saved))
            before = channels
        mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
        self.mean: Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.deviation: Tensor
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps by layer of RGB ``images`` (N, 3, H, W) from 0 to 1."""
        x = (images - self.mean) / self.deviation if self.pixels == "imagenet" else (images - self.mean) * 255
        x = x.contiguous(memory_format=torch.channels_last)
        found, stage = {}, "1"
        for name, layer in self.named_children():
            if name[4] != stage:
                # The smallest pictures reach a side of one pixel here, which cannot be halved: it is rounded up.
                x, stage = F.max_pool2d(x, 2, ceil_mode=min(x.shape[-2:]) < 2), name[4]
            x = layer(x)
            if name in self.layers:
                found[name] = x
        return found


def _weights(config: VGGConfig, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias by layer."""
    state = _state(config)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    at, stage = 0, "1"
    for name in names:
        if name[4] != stage:
            stage, at = name[4], at + 1  # torchvision numbers the pooling before the stage too
        keys = f"features.{at}.weight", f"features.{at}.bias"
        for key in keys:
            if key not in state:
                reached = f"goes as far as {list(found)[-1]}" if found else "holds no VGG"
                raise ValueError(
                    f"model.vgg.weights: {config.weights} {reached} and has no {key}; {names[-1]} of {config.name} "
                    "is asked for: see model.vgg.name, loss.style_layers and loss.content_layers"
                )
        weight, bias = (state[key].float() for key in keys)
        found[name], at = (weight, bias), at + 2  # the ReLU after it has a number too
    return found


def _state(config: VGGConfig) -> dict[str, Tensor]:
    if config.weights:
        state: dict[str, Tensor] = read_weights(Path(config.weights), "model.vgg.weights")
        return state
    from torchvision.models import get_model_weights

    try:
        return dict(get_model_weights(config.name)["IMAGENET1K_V1"].get_state_dict(progress=True))
    except Exception as error:
        raise ValueError(
            f"model.vgg.weights: torchvision's {config.name} cannot be downloaded; give a file with its weights "
            f"({one_line(error, 120)})"
        ) from error
