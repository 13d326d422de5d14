"""Auxiliary networks that only detectors have."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import nn

from engine.learning.auxiliary import AuxiliaryNetwork
from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span
from engine.network.message import Message
from engine.task import Task


class WithLevels(Protocol):
    """A task whose head can be had for some levels alone."""

    def level_head(self, chain: Chain, message: Message) -> nn.Module:
        """A head on the levels that ``message`` has maps for."""
        ...


class Levels(AuxiliaryNetwork):
    """The detector's own head on the levels a block can see, and on no others.

    The level-matched head of the GLCAN group's released RetinaNet code: the block's map and those before it make a
    local FPN, and each of its levels learns the objects of the sizes it stands for.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    @classmethod
    def build(cls, chain: Chain, span: Span, bank: FeatureBank, task: Task) -> Levels:
        return cls(cast(WithLevels, task).level_head(chain, chain.shapes()[span.stop - 1]))

    def forward(self, message: Message, bank: FeatureBank) -> Any:
        return self.head(message, FeatureBank())
