"""Style features, two maps and a code, from the Perception Encoder or from VGG."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.style_transfer.scin.instance import InstanceNorm, instance_statistics

NEAR, FAR = 256, 512
"""Channels of the maps at 1/8 and at 1/16 of the painting's resolution."""
CODE = 2 * (NEAR + FAR)
"""Length of a style code: the mean and deviation of each channel of both maps."""
NAMES = ("style_near", "style_far", "style_code")


def style_code(near: Tensor, far: Tensor) -> Tensor:
    """The style code (N, ``CODE``): means and deviations of both maps' channels."""
    parts = [part.flatten(1) for features in (near, far) for part in instance_statistics(features)]
    return torch.cat(parts, dim=1)


class PerceptionEncoder(nn.Module):
    """The trainable style encoder of arXiv 2404.13584, in a form of our own.

    The paper only names it and says that it learns with the network. Our form follows the same laboratory's AesUST: a
    trunk like a discriminator's, with four 4x4 convolutions of stride 2 and 64, 128, 256 and 512 channels, instance
    normalisation after all but the first, and leaky ReLU. It returns the maps of the last two convolutions and a code
    of their statistics, taken before the normalisation that would remove them.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 64, 128, NEAR, FAR)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 4, 2, 1) for before, after in itertools.pairwise(channels)
        )
        self.norm = InstanceNorm()

    def forward(self, style: Tensor) -> dict[str, Tensor]:
        """Map paintings (N, 3, H, W) to maps (N, 256, H/8, W/8) and (N, 512, H/16, W/16) and the code."""
        x, raw = style * 2 - 1, []
        for number, convolution in enumerate(self.convolutions):
            x = convolution(x)
            raw.append(x)
            x = F.leaky_relu(x if number == 0 else self.norm(x), 0.2)
            if number == 2:
                near = x
        return dict(zip(NAMES, (near, x, style_code(raw[2], raw[3])), strict=True))


def vgg_style(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same features from VGG's ``relu3_1`` and ``relu4_1``, each at half its resolution."""
    near, far = (F.avg_pool2d(features[name], 2) for name in ("relu3_1", "relu4_1"))
    # The scale of VGG's features depends on its weights. Unnormalised, the code could drown the patches beside it.
    code = style_code(features["relu3_1"], features["relu4_1"])
    return dict(zip(NAMES, (near, far, F.layer_norm(code, code.shape[1:])), strict=True))
