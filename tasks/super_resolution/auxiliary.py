"""Auxiliary networks that only super-resolution has."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor, nn

from engine.learning.auxiliary import AuxiliaryNetwork
from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span
from engine.network.message import Message
from engine.task import Task
from tasks.super_resolution.heads import upsampling
from tasks.super_resolution.network import image_range


class Enlarging(Protocol):
    """A task that knows by how much its network enlarges."""

    def enlargement(self, chain: Chain, x: Tensor) -> int:
        """How many times larger the output is than the map ``x``."""
        ...


class LocalSR(AuxiliaryNetwork):
    """The recipe of the GLCAN group's released super-resolution code, repaired.

    Three 3x3 convolutions at full width, the early map added to their output, then its own upsampling tail, as large as
    EDSR's. The released code forgets to register these networks, so that they never learn, and computes the global skip
    but drops it. Here they learn, and the skip is added.
    """

    uses_bank = False

    def __init__(self, channels: int, scale: int, image_range: float) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(*(nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(3)))
        self.upsample, self.image_range = upsampling(channels, scale, "own"), image_range

    @classmethod
    def build(cls, chain: Chain, span: Span, bank: FeatureBank, task: Task) -> LocalSR:
        x = chain.shapes()[span.stop - 1].x
        return cls(x.shape[1], cast(Enlarging, task).enlargement(chain, x), image_range(chain.model))

    def forward(self, message: Message, bank: FeatureBank) -> Any:
        features = self.convolutions(message.x)
        if "shallow" in message.features:
            features = features + message.features["shallow"]
        return self.upsample(features) / self.image_range + 0.5
