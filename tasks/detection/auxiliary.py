"""Auxiliary networks that only detectors have."""

from __future__ import annotations

from typing import Any

from torch import nn

from engine.auxiliary import AuxiliaryNetwork, register
from engine.bank import FeatureBank
from engine.chain import Chain
from engine.cut import Span
from engine.message import Message
from engine.task import Task


@register("levels")
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
        from tasks.detection.task import Detection  # that one imports this file

        assert isinstance(task, Detection)
        return cls(task.level_head(chain, chain.shapes()[span.stop - 1]))

    def forward(self, message: Message, bank: FeatureBank) -> Any:
        return self.head(message, FeatureBank())
