"""Heads of auxiliary networks, which make an image at the high resolution from a block's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.bank import FeatureBank
from engine.network.message import Message
from tasks.super_resolution.config import Tail


class LightTail(nn.Module):
    """A light copy of a network's end: last convolution, global skip, upsampling.

    The early map ``shallow`` is added where the backbone adds it (GLCAN's global part); if it has another number of
    channels than the features, a 1x1 convolution adapts it. The head predicts the difference to the bicubically
    enlarged image (our choice). If a message has only ``x``, both are left out.

    Args:
        channels: channels of the features.
        shallow: channels of the early map; 0 if there is none.
        larger: how many times larger the output is than the features.
        scale: how many times larger the output is than the low-resolution image.
        tail: ``direct``: one convolution to 3 larger^2 channels and one pixel shuffle, so that only the image is at the
            high resolution; ``own``: the steps of EDSR with ``channels`` channels, that is a convolution and a pixel
            shuffle for each doubling (or one of each for a tripling), and a last convolution.
        image_range: how many times larger the values of the features are than those of images.
    """

    def __init__(self, channels: int, shallow: int, larger: int, scale: int, tail: Tail, image_range: float) -> None:
        super().__init__()
        self.scale, self.image_range = scale, image_range
        self.last = nn.Conv2d(channels, channels, 3, 1, 1)
        self.skip = nn.Conv2d(shallow, channels, 1, bias=False) if shallow not in (0, channels) else nn.Identity()
        self.upsample = upsampling(channels, larger, tail)

    def forward(self, message: Message, bank: FeatureBank) -> Tensor:
        features = self.last(message.x)
        if "shallow" in message.features:
            features = features + self.skip(message.features["shallow"])
        image: Tensor = self.upsample(features) / self.image_range
        if "image" not in message.features:
            return image + 0.5
        return image + enlarged(message.features["image"], self.scale)


def upsampling(channels: int, larger: int, tail: Tail) -> nn.Sequential:
    """Layers from ``channels`` maps to an image of three channels, ``larger`` times as large; see ``LightTail``."""
    if tail == "direct":
        return nn.Sequential(nn.Conv2d(channels, 3 * larger**2, 3, 1, 1), nn.PixelShuffle(larger))
    doublings = larger.bit_length() - 1
    steps = [2] * doublings if larger == 2**doublings else [larger]
    layers: list[nn.Module] = []
    for step in steps:
        layers += [nn.Conv2d(channels, channels * step**2, 3, 1, 1), nn.PixelShuffle(step)]
    return nn.Sequential(*layers, nn.Conv2d(channels, 3, 3, 1, 1))


@torch.no_grad()
def enlarged(image: Tensor, scale: int) -> Tensor:
    """``image`` (N, 3, H, W), enlarged bicubically."""
    return F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
