"""Cross-attention: every place of the content takes what fits it of the painting."""

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
    """Content features, and beside them what they find in the painting's.

    The paper (arXiv 2404.13584) says cross-attention between both; ours is its form: queries of the normalised
    content, keys of the normalised and values of the plain style features at two scales, 256 wide, 4 heads, added to
    the content.

    Args:
        channels: of the content's features.
    """

    def __init__(self, channels: int, width: int = 256) -> None:
        super().__init__()
        self.norm, self.style_norm = InstanceNorm(), InstanceNorm()
        self.query = nn.Conv2d(channels, width, 1)
        self.keys = nn.ModuleList(nn.Conv2d(each, width, 1) for each in (NEAR, FAR))
        self.values = nn.ModuleList(nn.Conv2d(each, width, 1) for each in (NEAR, FAR))
        self.output = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor, features: Mapping[str, Any]) -> Tensor:
        """Of content features (N, C, H, W) and a message's style features; (N, C, H, W)."""
        maps = [features["style_near"], features["style_far"]]
        normal = self.norm(x)
        query = self.query(normal)
        if "mix" in features:  # each painting is asked
            query = query.repeat(len(features["mix"]), 1, 1, 1)
        keys = [key(self.style_norm(each)) for key, each in zip(self.keys, maps, strict=True)]
        values = [value(each) for value, each in zip(self.values, maps, strict=True)]
        found = F.scaled_dot_product_attention(_heads([query]), _heads(keys), _heads(values))
        found = found.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, tuple(x.shape[2:]))
        return normal + mixed(self.output(found), features)


def _heads(maps: list[Tensor]) -> Tensor:
    """Maps (N, C, H, W) as tokens of all of them: (N, heads, tokens, C / heads)."""
    tokens = torch.cat([each.flatten(2) for each in maps], dim=2).transpose(1, 2)
    return tokens.unflatten(2, (HEADS, -1)).transpose(1, 2)
