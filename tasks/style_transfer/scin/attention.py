"""Cross-attention: every position of the content takes from the painting what fits it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.style_transfer.scin.encoder import FAR, NEAR
from tasks.style_transfer.scin.instance import InstanceNorm
from tasks.style_transfer.scin.scin import mixed

HEADS = 4


class CrossAttention(nn.Module):
    """Normalised content features plus what they attend to in the painting's features.

    The paper (arXiv 2404.13584) says that content and style meet by cross-attention. Its form is our choice: queries
    from the normalised content features, keys from the normalised and values from the plain style features at two
    scales, 256 channels, 4 heads, and the result added to the content.

    Args:
        channels: channels of the content features.
    """

    def __init__(self, channels: int, width: int = 256) -> None:
        super().__init__()
        self.norm, self.style_norm = InstanceNorm(), InstanceNorm()
        self.query = nn.Conv2d(channels, width, 1)
        self.keys = nn.ModuleList(nn.Conv2d(each, width, 1) for each in (NEAR, FAR))
        self.values = nn.ModuleList(nn.Conv2d(each, width, 1) for each in (NEAR, FAR))
        self.output = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor, features: Mapping[str, Any]) -> Tensor:
        """Map content features (N, C, H, W) and a message's style features to (N, C, H, W)."""
        maps = [features["style_near"], features["style_far"]]
        normal: Tensor = self.norm(x)
        query = self.query(normal)
        if "mix" in features:  # several paintings: the same queries go to each of them
            query = query.repeat(len(features["mix"]), 1, 1, 1)
        keys = [key(self.style_norm(each)) for key, each in zip(self.keys, maps, strict=True)]
        values = [value(each) for value, each in zip(self.values, maps, strict=True)]
        found = F.scaled_dot_product_attention(_heads([query]), _heads(keys), _heads(values))
        found = found.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, tuple(x.shape[2:]))
        return normal + mixed(self.output(found), features)


def _heads(maps: list[Tensor]) -> Tensor:
    """The positions of all maps (N, C, H, W) as one sequence of tokens (N, heads, tokens, C / heads)."""
    tokens = torch.cat([each.flatten(2) for each in maps], dim=2).transpose(1, 2)
    result: Tensor = tokens.unflatten(2, (HEADS, -1)).transpose(1, 2)
    return result
