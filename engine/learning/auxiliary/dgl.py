"""The auxiliary network of Decoupled Greedy Learning (DGL)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.learning.auxiliary.protocol import AuxiliaryNetwork, register
from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span
from engine.network.layout import as_map
from engine.network.message import Message
from engine.task import Task


@register("dgl")
class DGL(AuxiliaryNetwork):
    """Pool to a quarter, three 1x1 convolutions, pool to 2x2, three-layer MLP (Belilovsky et al., ICML 2020).

    Pooling divides height and width by four each. The last layer of the MLP is the task's own head, which gets a flat
    vector. Tokens are treated as a map of height 1.

    Known limitation: on a GPU, the backward pass of adaptive pooling sums in no fixed order, so results there repeat
    only up to rounding.
    """

    uses_bank = False

    def __init__(self, channels: int, layout: str, head_of: Any) -> None:
        super().__init__()
        self.layout = layout
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.convolutions = nn.Sequential(*layers)
        flat = channels * 4  # the 2x2 map of every channel, flattened
        layers = []
        for _ in range(2):
            layers += [nn.Linear(flat, flat, bias=False), nn.BatchNorm1d(flat), nn.ReLU(inplace=True)]
        self.mlp = nn.Sequential(*layers)
        self.head = head_of(flat)

    @classmethod
    def build(cls, chain: Chain, span: Span, bank: FeatureBank, task: Task) -> DGL:
        message = chain.shapes()[span.stop - 1]
        channels = as_map(message.x, chain.layout).shape[1]

        def head_of(flat: int) -> nn.Module:
            # The head takes the width of its input from a meta tensor of that shape.
            return task.auxiliary_head(chain, message.with_x(torch.empty(2, flat, device="meta")), FeatureBank())

        return cls(channels, chain.layout, head_of)

    def forward(self, message: Message, bank: FeatureBank) -> Any:
        x: Tensor = as_map(message.x, self.layout)
        height, width = x.shape[-2:]
        x = F.adaptive_avg_pool2d(x, (max(1, height // 4), max(1, width // 4)))
        x = F.adaptive_avg_pool2d(self.convolutions(x), 2)
        return self.head(message.with_x(self.mlp(x.flatten(1))), FeatureBank())
