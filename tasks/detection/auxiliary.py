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
    """A task that can build its head for only some levels."""

    def level_head(self, chain: Chain, message: Message) -> nn.Module:
        """A head on only the levels that ``message`` has maps for."""
        ...


class Levels(AuxiliaryNetwork):
    """The detector's own head on only the levels that a block can see.

    This is the level-matched head of the GLCAN group's released RetinaNet code: the maps of the block and of those
    before it make a local FPN, and each level learns the objects of the sizes that it is responsible for.
    """

    uses_bank = False

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    @classmethod
    def build(cls, chain: Chain, span: Span, bank: FeatureBank, task: Task) -> Levels:
        return cls(cast(WithLevels, task).level_head(chain, chain.shapes()[span.stop - 1]))

    def forward(self, message: Message, bank: FeatureBank) -> Any:
        return self.head(message, FeatureBank())
