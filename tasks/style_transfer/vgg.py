"""VGG's features, frozen: what contents and styles are told by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
"""Of each stage; before every stage but the first the maps are halved."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class VGGConfig:
    """The frozen network that content features and losses are made with."""

    name: Literal["vgg16", "vgg19"] = "vgg19"
    """A network of torchvision, up to its last convolution of the fourth or fifth stage, as far as its weights go."""
    weights: str = ""
    """File with weights under torchvision's names; empty downloads torchvision's own; `random`: untrained ones, which
    serve to try the machinery and nothing else."""
    pixels: Literal["imagenet", "bytes"] = "imagenet"
    """What it sees: `imagenet`, ImageNet's mean taken off 0..1 and divided by its deviation, as torchvision's weights
    want it; `bytes`, the mean taken off 0..255."""


class FrozenConv(nn.Module):
    """A 3x3 convolution and ReLU whose weights are buffers: no optimizer sees them."""

    def __init__(self, weight: Tensor, bias: Tensor, saved: bool) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight, persistent=saved)
        self.register_buffer("bias", bias, persistent=saved)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(F.conv2d(x, self.weight, self.bias, padding=1))


class VGG(nn.Module):
    """torchvision's VGG up to the layers asked for; layers are called ``relu1_1`` to ``relu5_4``.

    Args:
        config: which network, whose weights, and what it sees.
        layers: what ``forward`` gives; the network ends with the last of them.
        saved: whether its weights are part of the state of what it is in.
        load: whether to read the weights at all; else they are random, to be replaced.

    Raises:
        ValueError: no such layer, or weights that cannot be had or do not go so far.
    """

    def __init__(self, config: VGGConfig, layers: Sequence[str], *, saved: bool, load: bool = True) -> None:
        super().__init__()
        self.layers, self.pixels = tuple(layers), config.pixels
        counts = CONVOLUTIONS[config.name]
        known = [f"relu{stage}_{n}" for stage, count in enumerate(counts, 1) for n in range(1, count + 1)]
        for layer in layers:
            if layer not in known:
                raise ValueError(f"{layer!r} is no layer of {config.name}; its layers are {', '.join(known)}")
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
        """Feature maps by layer of ``images`` (N, 3, H, W), 0 to 1; RGB."""
        x = (images - self.mean) / self.deviation if self.pixels == "imagenet" else (images - self.mean) * 255
        x = x.contiguous(memory_format=torch.channels_last)
        found, stage = {}, "1"
        for name, layer in self.named_children():
            if name[4] != stage:
                # A side of one pixel, of the smallest pictures, cannot be halved.
                x, stage = F.max_pool2d(x, 2, ceil_mode=min(x.shape[-2:]) < 2), name[4]
            x = layer(x)
            if name in self.layers:
                found[name] = x
        return found


def _weights(config: VGGConfig, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias by layer."""
    state = _state(config)
    found, at, stage = {}, 0, "1"
    for name in names:
        if name[4] != stage:
            stage, at = name[4], at + 1  # torchvision counts the pooling before
        keys = f"features.{at}.weight", f"features.{at}.bias"
        for key in keys:
            if key not in state:
                reached = f"goes as far as {list(found)[-1]}" if found else "holds no VGG"
                raise ValueError(
                    f"model.vgg.weights: {config.weights} {reached} and has no {key}; {names[-1]} of {config.name} "
                    "is asked for: see model.vgg.name, loss.style_layers and loss.content_layers"
                )
        weight, bias = (state[key].float() for key in keys)
        found[name], at = (weight, bias), at + 2  # and the ReLU after
    return found


def _state(config: VGGConfig) -> dict[str, Tensor]:
    if config.weights:
        path = Path(config.weights)
        if not path.is_file():
            raise ValueError(f"model.vgg.weights: no such file: {path}")
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(path)
            state: dict[str, Tensor] = torch.load(path, "cpu", weights_only=True)
            return state
        except Exception as error:
            cause = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:200]
            raise ValueError(f"model.vgg.weights: {path} cannot be read: {cause}") from error
    from torchvision.models import get_model_weights

    try:
        return dict(get_model_weights(config.name)["IMAGENET1K_V1"].get_state_dict(progress=True))
    except Exception as error:
        raise ValueError(
            f"model.vgg.weights: torchvision's {config.name} cannot be downloaded; give a file with its weights "
            f"({' '.join(str(error).split())[:120]})"
        ) from error
