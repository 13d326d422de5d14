"""The smallest auxiliary network: the task's own head, directly on the block's output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from engine.learning.auxiliary.protocol import AuxiliaryNetwork, register
from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span
from engine.network.message import Message
from engine.task import Task


@register("greedy")
class Greedy(AuxiliaryNetwork):
    """Greedy layerwise learning (Belilovsky et al., ICML 2019): for a classifier, pooling and one linear layer."""

    uses_bank = False

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    @classmethod
    def build(cls, chain: Chain, span: Span, bank: FeatureBank, task: Task) -> Greedy:
        return cls(task.auxiliary_head(chain, _x_alone(chain.shapes()[span.stop - 1]), FeatureBank()))

    def forward(self, message: Message, bank: FeatureBank) -> Any:
        return self.head(_x_alone(message), FeatureBank())


def _x_alone(message: Message) -> Message:
    """The message without the maps of earlier stages that travel in it."""
    return replace(message, features={"x": message.x})
