"""Style Consistency Instance Normalization, and AdaIN as an alternative to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.style_transfer.scin.encoder import CODE
from tasks.style_transfer.scin.instance import InstanceNorm

PATCHES = 8
"""Number of patches along each side of the painting, at every resolution."""
HEADS = 4


def mixed(values: Tensor, features: Mapping[str, Any]) -> Tensor:
    """``values`` (M N, ...) of M paintings, averaged to (N, ...) with the weights ``mix`` (M) if there are any."""
    if "mix" not in features:
        return values
    weights = features["mix"]
    each = values.unflatten(0, (len(weights), -1))
    result: Tensor = (each * weights.view(-1, *[1] * (each.dim() - 1))).sum(0).to(values.dtype)
    return result


class SCIN(nn.Module):
    """SCIN(x, s) = gamma(s) (x - mean(x)) / deviation(x) + beta(s), arXiv 2404.13584.

    From the paper: a transformer reads patch embeddings of the painting and yields one scale and one bias per channel;
    mean and deviation are per instance and channel. Our choices: 8 x 8 patches at every resolution, one more token from
    the style code, learnt positions, pre-norm layers, gamma and beta from the average of the tokens, and gamma as an
    offset from 1, so that training starts at plain instance normalisation.

    Args:
        channels: channels of ``x``.
        side: side in pixels to which the painting is scaled (16, 32, 64, 128 in the four stages).
        width, depth: width and number of layers of the transformer.
    """

    def __init__(self, channels: int, side: int, width: int, depth: int) -> None:
        super().__init__()
        self.side, patch = side, side // PATCHES
        self.norm = InstanceNorm()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.code = nn.Linear(CODE, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + PATCHES**2, width))
        layers = [
            nn.TransformerEncoderLayer(width, HEADS, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)  # nn.TransformerEncoder would copy one layer, so that all start alike
        ]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(width))
        self.affine = nn.Linear(width, 2 * channels)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x: Tensor, features: Mapping[str, Any]) -> Tensor:
        """Normalise maps (N, C, H, W) by a message's features ``style`` (N, 3, h, w) and ``style_code``."""
        small = F.interpolate(features["style"], (self.side, self.side), mode="bilinear", antialias=True)
        patches = self.embed(small * 2 - 1).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.code(features["style_code"])[:, None], patches], dim=1) + self.positions
        affine = mixed(self.affine(self.layers(tokens).mean(1)).float(), features)
        gamma, beta = affine[..., None, None].chunk(2, dim=1)
        result: Tensor = self.norm(x, 1 + gamma, beta)
        return result


class AdaIN(nn.Module):
    """Content features with the painting's statistics (Huang and Belongie 2017, arXiv 1703.06868).

    Args:
        level: which of the message's ``style_statistics`` to use.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level, self.norm = level, InstanceNorm()

    def forward(self, x: Tensor, features: Mapping[str, Any]) -> Tensor:
        mean, deviation = (mixed(part, features) for part in features["style_statistics"][self.level])
        result: Tensor = self.norm(x, deviation, mean)
        return result


class Unchanged(nn.Module):
    """No normalisation, as in AdaIN's decoder."""

    def forward(self, x: Tensor, features: Mapping[str, Any]) -> Tensor:
        return x
