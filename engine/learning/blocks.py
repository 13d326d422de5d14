"""The blocks of a network, and the encoder that trains together with them."""

from __future__ import annotations

from collections.abc import Iterable

from engine.learning.block import Block
from engine.learning.shared import SharedEncoder


class Blocks(list[Block]):
    """The blocks of a network, or of a stage of the pipeline, in order, and the encoder of shared conditioning if any.

    Args:
        encoder: makes the shared features that ``blocks`` read, and learns from their gradients.

    Example:
        >>> Blocks().learners
        []
    """

    def __init__(self, blocks: Iterable[Block] = (), encoder: SharedEncoder | None = None) -> None:
        super().__init__(blocks)
        self.encoder = encoder
        if encoder is not None:
            for block in self:
                block.conditioning = (encoder,)

    @property
    def learners(self) -> list[Block]:
        """Everything that trains: the blocks, then the encoder."""
        return [*self, *([self.encoder] if self.encoder is not None else [])]
